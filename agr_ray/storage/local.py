"""Storage on local disks and mounted drives."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from agr_ray.storage import trees
from agr_ray.storage.atomic import file_etag, sync, unchanged, write_whole
from agr_ray.storage.backend import ObjectInfo
from agr_ray.storage.errors import (
    ChangedObject,
    MissingObject,
    ObjectTooLarge,
    StorageFailed,
    StorageUnavailable,
)
from agr_ray.storage.temporary import PREFIX, in_folder
from agr_ray.storage.uri import local_path, utf8_key, utf8_uri

if TYPE_CHECKING:
    import pyarrow.fs

_LEADS_NOWHERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
"""Error codes of a broken link, of a link to itself, and of a file that was deleted since its folder was read."""


class LocalBackend:
    """Local files. A file's etag is its size and modification time."""

    def list(self, uri: str, on_unreadable: Callable[[str], None] | None) -> Iterator[ObjectInfo]:
        """Yield the files below a folder. Links are followed, except to a folder that contains them."""
        root = local_path(uri)
        try:
            info = os.stat(root)
            is_folder = stat.S_ISDIR(info.st_mode)
            if is_folder:
                os.scandir(root).close()
                os.stat(os.path.join(root, "."))
        except OSError as error:
            raise StorageUnavailable(f"folder {root} can't be listed: {error.strerror}") from error
        if not is_folder:
            raise StorageUnavailable(f"{root} is not a folder")
        return _walk(root, "", ((info.st_dev, info.st_ino),), on_unreadable)

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> tuple[bytes, str]:
        """Return a file's bytes and etag, checked before and after reading."""
        path = local_path(uri)
        try:
            # Before opening, because opening a pipe could block forever.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise StorageFailed(f"{path} is not a file")
            with open(path, "rb") as file:
                info = os.fstat(file.fileno())
                found_etag = file_etag(info)
                if etag is not None and found_etag != etag:
                    raise ChangedObject(f"{path} has size and time {found_etag}, and was listed with {etag}")
                if max_bytes is not None and info.st_size > max_bytes:
                    raise ObjectTooLarge(f"{path} has {info.st_size} bytes, and {max_bytes} are allowed")
                data = file.read()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingObject(f"{path} does not exist") from error
        except OSError as error:
            raise StorageFailed(f"{path}: {error.strerror}") from error
        if len(data) != info.st_size:
            raise ChangedObject(f"{path} changed while it was read: {info.st_size} bytes became {len(data)}")
        return data, found_etag

    def write(self, uri: str, data: bytes | IO[bytes], *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write a temporary file and move it into place."""
        whole = data if isinstance(data, bytes) else data.read()
        return write_whole(local_path(uri), lambda file: file.write(whole), if_absent=if_absent, if_match=if_match)

    def write_with(self, uri: str, fill: Callable[[IO[bytes]], object]) -> None:
        """Let `fill` write a temporary file beside the target, then move it into place."""
        write_whole(local_path(uri), fill)

    def copy(self, source: str, target: str) -> None:
        """Copy a file through memory."""
        self.write(target, self.read(source)[0])

    def move(self, source: str, target: str) -> None:
        """Rename a file; copy it if `target` is on another file system."""
        before, after = local_path(source), local_path(target)
        try:
            in_folder(os.path.dirname(after), partial(os.replace, before, after))
            sync(os.path.dirname(after))
        except FileNotFoundError as error:
            raise MissingObject(f"{source} does not exist") from error
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise StorageUnavailable(f"{before} can't be moved to {after}: {error.strerror or error}") from error
            self.copy(source, target)
            self.delete(source)

    def exists(self, uri: str) -> bool:
        """Return whether there is a file or folder."""
        return os.path.exists(local_path(uri))

    def is_folder(self, uri: str) -> bool:
        """Return whether it is a folder, or a link to one."""
        return os.path.isdir(local_path(uri))

    def delete(self, uri: str, *, if_match: str | None = None) -> None:
        """Delete a file, with `if_match` while it is locked."""
        path = local_path(uri)
        if if_match is not None:
            with unchanged(path, if_match):
                os.unlink(path)
            return
        with _deleting(path):
            os.unlink(path)

    def upload_tree(self, source: Path, names: Sequence[str], uri: str, *, marker: str, overwrite: bool) -> None:  # noqa: ARG002
        """Copy the folder beside its place and move it there."""
        trees.publish_folder(source, local_path(uri), overwrite=overwrite)

    def download_tree(self, uri: str, target: str) -> None:
        """Copy the folder beside `target` and move it there."""
        trees.publish_folder(Path(local_path(uri)), target, overwrite=False)

    def move_tree(self, source: str, target: str) -> None:
        """Rename the folder; copy it if `target` is on another file system."""
        trees.move_folder(local_path(source), local_path(target))

    def delete_tree(self, uri: str) -> None:
        """Delete the folder."""
        with _deleting(local_path(uri)) as path:
            shutil.rmtree(path)

    def delete_if_empty(self, uri: str) -> None:
        """Delete the folder if it is empty."""
        with contextlib.suppress(OSError):  # not empty, or not there
            os.rmdir(local_path(uri))

    def probe(self, uri: str, *, write: bool) -> None:
        """Do nothing: local errors need no slow request to show up."""

    def s3_address(self, uri: str) -> None:  # noqa: ARG002
        """Return None: a local file is in no bucket."""
        return

    def arrow_filesystem(self, uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return pyarrow's local filesystem."""
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), local_path(uri)

    @contextlib.contextmanager
    def library_errors(self, uri: str) -> Iterator[None]:
        """Turn pyarrow's errors, which are Python's own, into this package's."""
        try:
            yield
        except FileNotFoundError as error:
            raise MissingObject(f"{uri} does not exist") from error
        except OSError as error:
            raise StorageFailed(f"{uri}: {error}") from error


@contextlib.contextmanager
def _deleting(path: str) -> Iterator[str]:
    """Yield the path; it need not exist.

    Raises:
        StorageUnavailable: it can't be deleted.
    """
    try:
        yield path
    except FileNotFoundError:
        pass
    except OSError as error:
        # With a file in place of one of its folders, the path does not exist either.
        if os.path.lexists(path):
            raise StorageUnavailable(f"{path} can't be deleted: {error.strerror or error}") from error


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], on_unreadable: Callable[[str], None] | None
) -> Iterator[ObjectInfo]:
    try:
        with os.scandir(folder) as entries:
            # A folder sorts as its name and a slash, so the walk follows the order of whole keys, as S3 does.
            ordered = sorted(
                (entry.name + "/" * _is_folder(entry), entry.path)
                for entry in entries
                if not entry.name.startswith(PREFIX)
            )
        if ordered:
            os.stat(os.path.join(folder, "."))  # fails if names can be listed but files can't be opened
    except FileNotFoundError:
        return  # deleted while the walk was under way
    except OSError as error:
        if on_unreadable is not None and isinstance(error, PermissionError):
            on_unreadable(folder)
            return
        raise StorageUnavailable(f"folder {folder} can't be listed: {error.strerror}") from error
    for name, path in ordered:
        try:
            info = os.stat(path)
        except OSError as error:
            if error.errno in _LEADS_NOWHERE:
                continue
            if on_unreadable is None or not isinstance(error, PermissionError):
                raise StorageUnavailable(f"{path} can't be listed: {error.strerror}") from error
            on_unreadable(path)
            continue
        if name.endswith("/"):
            identity = (info.st_dev, info.st_ino)
            if identity not in above:
                yield from _walk(path, prefix + name, (*above, identity), on_unreadable)
        elif stat.S_ISREG(info.st_mode):
            # A key is encoded where its URI is, so that it fits into a table.
            yield ObjectInfo(utf8_uri(path), utf8_key(prefix + name), file_etag(info), info.st_size)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether it is a folder, or a link to one; false for a link that can't be followed."""
    try:
        return entry.is_dir()
    except OSError:
        return False

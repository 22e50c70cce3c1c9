"""Trees: folders of files that are published, fetched, moved and deleted as one.

A local tree is copied beside its place and moved there. S3 can't move anything: a tree goes there object by object,
its marker last, so a reader that finds the marker finds the whole tree.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

from agr_ray.storage import uri as uris
from agr_ray.storage.atomic import sync
from agr_ray.storage.backend import Backend, ObjectInfo
from agr_ray.storage.errors import MissingObject, StorageFailed, StorageUnavailable
from agr_ray.storage.temporary import OLD, in_folder, temporary_folder_beside

DEFAULT_MARKER: Final = "meta.json"
"""The file of a tree that is written last; its presence shows that the tree is complete."""
NUM_COPIES: Final = 16
"""Number of parallel copy requests to a server."""


def upload(backend: Backend, local_dir: str, uri: str, *, marker: str, overwrite: bool) -> None:
    """Publish a local folder; see `Storage.upload_tree`."""
    source = Path(local_dir)
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    if marker not in names:
        raise ValueError(f"{local_dir} holds no {marker}, which marks a tree as whole")
    backend.upload_tree(source, names, uri, marker=marker, overwrite=overwrite)


def download(backend: Backend, uri: str, local_dir: str, *, marker: str) -> None:
    """Copy a tree to a new local folder; see `Storage.download_tree`."""
    if not backend.exists(uris.join(uri, marker)):
        raise MissingObject(f"{uri} holds no {marker}: nothing is there, or its upload did not finish")
    backend.download_tree(uri, uris.local_path(local_dir))


def publish_folder(source: Path, target: str, *, overwrite: bool) -> None:
    """Copy a local folder beside `target`, then move it there.

    Raises:
        FileExistsError: `target` exists, and `overwrite` is false.
        StorageUnavailable: it can't be written.
    """
    if os.path.lexists(target) and not overwrite:
        raise FileExistsError(f"{target} exists and is not overwritten")
    try:
        with temporary_folder_beside(target) as temporary:
            fresh, old = os.path.join(temporary, "fresh"), os.path.join(temporary, OLD, os.path.basename(target))
            os.mkdir(os.path.dirname(old))
            shutil.copytree(source, fresh)
            for folder, _, names in os.walk(fresh):
                for name in names:
                    sync(os.path.join(folder, name))
                sync(folder)
            if os.path.lexists(target):
                os.rename(target, old)
            try:
                os.rename(fresh, target)
            except OSError:
                if os.path.lexists(old):
                    os.rename(old, target)
                raise
            sync(os.path.dirname(target))
    except OSError as error:
        raise StorageUnavailable(f"{target} can't be written: {error.strerror or error}") from error


def move_folder(source: str, target: str) -> None:
    """Move a local folder atomically. A `source` that does not exist is ignored.

    Raises:
        StorageUnavailable: it can't be moved.
    """
    if not os.path.isdir(source):
        return
    try:
        try:
            in_folder(os.path.dirname(target), partial(os.rename, source, target))
        except OSError as error:
            if error.errno != errno.EXDEV:  # `target` may be on another file system
                raise
            publish_folder(Path(source), target, overwrite=False)
        sync(os.path.dirname(target))
    except OSError as error:
        raise StorageUnavailable(f"{source} can't be moved to {target}: {error.strerror or error}") from error


def upload_objects(
    backend: Backend, source: Path, names: Sequence[str], uri: str, *, marker: str, overwrite: bool
) -> None:
    """Write the files of a local folder one by one, the marker last. While an old tree is replaced there is no marker.

    Raises:
        FileExistsError: there is a marker, and `overwrite` is false.
    """
    if not overwrite and backend.exists(uris.join(uri, marker)):
        raise FileExistsError(f"{uri} exists and is not overwritten")
    backend.delete(uris.join(uri, marker))
    for key in {info.key for info in backend.list(uri, None)} - set(names):
        backend.delete(uris.join(uri, key))  # of the tree that is replaced
    for name in [*(name for name in names if name != marker), marker]:
        with open(source / name, "rb") as file:
            backend.write(uris.join(uri, name), file)


def download_objects(infos: Iterable[ObjectInfo], target: str, fetch: Callable[[ObjectInfo, str], None]) -> None:
    """Make the local folder `target`, whole or not at all, of the objects that `fetch` copies to local paths.

    Raises:
        FileExistsError: `target` exists.
        StorageFailed: an object's key leads out of the folder.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists and is not overwritten")
    with temporary_folder_beside(target) as temporary:
        fresh = os.path.join(temporary, "fresh")
        os.mkdir(fresh)
        for info in infos:
            if uris.leaves_folder(info.key):
                raise StorageFailed(f"{info.uri} would be written outside {target}")
            path = Path(fresh, info.key)
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(info, str(path))
        os.rename(fresh, target)


def copy_objects(backend: Backend, source: str, target: str, copy: Callable[[str, str], None]) -> None:
    """Copy every object below `source` to `target`, several at a time. A `source` that does not exist is ignored."""
    if not backend.exists(source):
        return
    with ThreadPoolExecutor(NUM_COPIES) as pool:
        infos = backend.list(source, on_unreadable=None)
        copies = [pool.submit(copy, info.uri, uris.join(target, info.key)) for info in infos]
        for each in copies:
            each.result()

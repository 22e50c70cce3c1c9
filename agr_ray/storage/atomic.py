"""Local files written whole or not at all, also under a condition: only if absent, or only if unchanged."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import IO, Final

from agr_ray.storage.errors import ChangedObject, MissingObject, StorageUnavailable
from agr_ray.storage.temporary import temporary_file

_MAX_FLOCK_S = 30.0
_NOT_SUPPORTED: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""Error codes with which file systems report an unsupported operation."""
_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
"""Linux constants that Python does not define."""


def file_etag(info: os.stat_result) -> str:
    """Return a local file's counterpart of an ETag: its size and modification time."""
    return f"{info.st_size}-{info.st_mtime_ns}"


def write_whole(
    path: str, fill: Callable[[IO[bytes]], object], *, if_absent: bool = False, if_match: str | None = None
) -> str:
    """Let `fill` write a temporary file beside `path`, move it into place in one step, and return its etag.

    Raises:
        FileExistsError: `if_absent`, and the file exists.
        ChangedObject, MissingObject: `if_match`, and the file has another etag or does not exist.
        StorageUnavailable: the file can't be written.
    """
    folder = os.path.dirname(path)
    is_taken = False
    try:
        with temporary_file(folder) as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            etag = file_etag(os.fstat(file.fileno()))
            if if_absent:
                try:
                    _move_to_free_name(file.name, path)
                except FileExistsError:
                    is_taken = True  # it was then, even if its owner has deleted it since
                    raise
            elif if_match is not None:
                with unchanged(path, if_match):
                    os.replace(file.name, path)
            else:
                os.replace(file.name, path)
            sync(folder)
    except OSError as error:
        if is_taken:
            raise FileExistsError(f"{path} exists and is not overwritten") from error
        raise StorageUnavailable(f"{path} can't be written: {error.strerror or error}") from error
    return etag


@contextlib.contextmanager
def unchanged(path: str, etag: str) -> Iterator[None]:
    """Keep other conditional writers from `path` until the block ends, if its file still has the etag.

    The file itself is locked, so nothing is left beside it, and the system unlocks it when a process dies. A writer
    that waited for a file that was replaced meanwhile finds that its path names another one.

    Raises:
        ChangedObject, MissingObject: the file has another etag, or does not exist.
        StorageUnavailable: it can't be opened or replaced.
    """
    try:
        # Writable, because NFS gives exclusive locks only on writable files.
        with open(path, "r+b") as file:
            _flock(file, path)
            info = os.fstat(file.fileno())
            if not os.path.samestat(info, os.stat(path)) or file_etag(info) != etag:
                raise ChangedObject(f"{path} is not the file that was read: its size or time differs")
            yield
    except FileNotFoundError as error:
        raise MissingObject(f"{path} does not exist") from error
    except OSError as error:
        raise StorageUnavailable(f"{path} can't be written: {error.strerror or error}") from error


def sync(path: str) -> None:
    """Make the file or folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network drives can't sync folders.
        if error.errno not in _NOT_SUPPORTED or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def _move_to_free_name(temporary: str, path: str) -> None:
    """Move a file atomically to a name that must be free.

    exFAT, FAT and some network drives have no hard links. There, use Linux's no-replace rename. If that is not
    supported either, first create an empty file of the name.

    Raises:
        FileExistsError: another file has the name.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        if not _rename_without_replacing(temporary, path):
            _take_name_and_replace(temporary, path)


def _rename_without_replacing(temporary: str, path: str) -> bool:
    """Rename without replacing; return False if the system or the file system does not support it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), path)


def _take_name_and_replace(temporary: str, path: str) -> None:
    # The lock keeps processes that read the empty file from replacing it, as `unchanged` would.
    with open(path, "x+b") as taken:
        with contextlib.suppress(OSError):  # without flock, the name alone must do
            fcntl.flock(taken, fcntl.LOCK_EX)
        now = os.stat(path)
        if not os.path.samestat(os.fstat(taken.fileno()), now) or now.st_size:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        os.replace(temporary, path)


def _flock(file: IO[bytes], path: str) -> None:
    """Lock a file against other conditional writers. They hold the lock only briefly, unless they are stopped.

    Raises:
        StorageUnavailable: another process holds it for longer than `_MAX_FLOCK_S`.
    """
    deadline = time.monotonic() + _MAX_FLOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageUnavailable(
                    f"{path} can't be written: another process has locked it for {_MAX_FLOCK_S:g} s; is it stopped?"
                ) from None
        time.sleep(0.01)

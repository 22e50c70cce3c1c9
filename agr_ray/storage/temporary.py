"""Temporary files and folders beside their target; a writer fills them, then moves them into place.

A live writer holds a lock on its own temporary. The system releases the lock when the writer dies, and the next
writer in the same folder then deletes the temporary.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Final, TypeVar

T = TypeVar("T")

PREFIX: Final = ".tmp-"
"""Prefix of the names of temporaries, which are never listed."""
OLD: Final = "old"
"""Folder, in a temporary one, that holds the tree being replaced."""
_LIVE: Final = "live"
"""File in a temporary folder that its writer keeps locked."""
_MAX_ATTEMPTS: Final = 1000
_cleaned: set[tuple[int, str]] = set()
"""Pairs of a process and a folder in which it has deleted stale temporaries."""


@contextlib.contextmanager
def temporary_file(folder: str) -> Iterator[IO[bytes]]:
    """Yield an empty new file in `folder`, open; delete it at the end unless it was moved away."""
    _delete_stale(folder)
    while True:
        path = _new_name(folder)
        file = in_folder(folder, partial(_new_file, path))
        with file:
            if not _lock_as_live(file, path):
                continue  # another process considered it stale before it was locked
            try:
                yield file
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            return


@contextlib.contextmanager
def temporary_folder_beside(path: str) -> Iterator[str]:
    """Yield a new folder beside `path`; at the end, delete everything that was not moved out of it."""
    folder = os.path.dirname(path)
    _delete_stale(folder)
    while True:
        temporary = _new_name(folder)
        in_folder(folder, partial(os.mkdir, temporary))
        lock = os.path.join(temporary, _LIVE)
        try:
            file = open(lock, "x+b")  # noqa: SIM115  # closed below
        except FileNotFoundError:
            continue  # another process has deleted the folder: make another
        with file:
            if not _lock_as_live(file, lock):
                continue
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return


def in_folder(folder: str, make: Callable[[], T]) -> T:
    """Make `folder` if needed, and return what `make` returns, which puts the first file or folder into it.

    Another process may delete the folder whenever it is empty, even between two steps of `os.makedirs`.
    """
    num_attempts = 0
    while True:
        try:
            os.makedirs(folder, exist_ok=True)
            return make()
        except (FileExistsError, FileNotFoundError):
            num_attempts += 1
            if num_attempts == _MAX_ATTEMPTS or os.path.isfile(folder):
                raise


def _new_name(folder: str) -> str:
    return os.path.join(folder, PREFIX + uuid.uuid4().hex)


def _new_file(path: str) -> IO[bytes]:
    return open(path, "x+b")


def _lock_as_live(file: IO[bytes], path: str) -> bool:
    """Lock a new temporary file; return False if another process has deleted it meanwhile."""
    with contextlib.suppress(OSError):  # without locks, stale files can't be recognised, and are never deleted
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _delete_stale(folder: str) -> None:
    """Delete temporaries of killed writers in `folder`; only once per process, because folders can be large."""
    if (os.getpid(), folder) in _cleaned:
        return
    _cleaned.add((os.getpid(), folder))
    try:
        with os.scandir(folder) as entries:
            temporaries = [
                (entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries if entry.name.startswith(PREFIX)
            ]
    except (FileNotFoundError, NotADirectoryError):  # the folder is yet to be made, or can't be
        return
    for path, is_folder in temporaries:
        # Any error means that its writer is alive, or that we may not delete it.
        with contextlib.suppress(OSError):
            if is_folder and not os.listdir(path):
                os.rmdir(path)  # its writer died before locking it, or will make another one
                continue
            with open(os.path.join(path, _LIVE) if is_folder else path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_folder:
                    _put_back(path)
                    shutil.rmtree(path)
                else:
                    os.unlink(path)


def _put_back(temporary: str) -> None:
    """Move the old tree back if its writer died after moving it away and before moving the new one into place."""
    old = os.path.join(temporary, OLD)
    for name in os.listdir(old) if os.path.isdir(old) and not os.path.islink(old) else []:
        target = os.path.join(os.path.dirname(temporary), name)
        if not os.path.lexists(target):
            os.rename(os.path.join(old, name), target)

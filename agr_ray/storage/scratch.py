"""Private temporary folders that are deleted eventually, even if their process is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

PREFIX: Final = "agr-ray-scratch-"
MIN_AGE_S: Final = 60.0
"""Minimum age of a stale folder: the process of a younger one may not have locked it yet."""


@contextmanager
def scratch_folder() -> Iterator[str]:
    """Yield a new folder that only this user can read, and delete it at the end.

    The folder is locked while its process lives, so each call can also delete the folders that killed processes of
    this user have left on this machine.
    """
    _delete_abandoned()
    folder = tempfile.mkdtemp(prefix=PREFIX)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _delete_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, locked by its process, or gone
            info = folder.lstat()
            if folder.is_symlink() or info.st_uid != os.getuid() or time.time() - info.st_mtime < MIN_AGE_S:
                continue
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)

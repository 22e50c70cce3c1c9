"""Private folders on the local disk for checkpoints that are being uploaded."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path
from tempfile import gettempdir, mkdtemp


def outgoing_folder(run_uri: str) -> Path:
    """Make a new folder for a checkpoint, with an unpredictable name, that no other user can read or write."""
    return Path(mkdtemp(prefix=_prefix(run_uri)))


def delete_leftovers(run_uri: str) -> None:
    """Delete the folders that killed workers of this run have left on this machine.

    The temporary folder is shared: entries of other users, and links, are left alone, whatever their names.
    """
    with os.scandir(gettempdir()) as entries:
        for entry in entries:
            if entry.name.startswith(_prefix(run_uri)):
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid():
                    shutil.rmtree(entry.path, ignore_errors=True)


def _prefix(run_uri: str) -> str:
    return f"agr-ray-{hashlib.sha256(run_uri.encode()).hexdigest()[:16]}-"

"""Record of everything that `cluster/local.sh up` created in a folder. Nothing else is used, replaced or deleted there.

The marker file lists each entry by name and inode number, and the folder itself by its inode number. So a link, folder
or file that replaced an entry is recognised as foreign, and so is a copy of the whole folder.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from servers import write_private

MARKER: Final = "made-by-local-sh.json"
_NEW_MARKER: Final = f"{MARKER}.new"
"""Temporary file left by a kill while the marker was being written."""


@dataclass(frozen=True)
class Claims:
    """The entries that `up` created in a folder."""

    folder: Path

    def claim(self) -> None:
        """Create the folder, or claim it if it is empty or already claimed.

        Raises:
            RuntimeError: the folder belongs to another user, or holds files that `up` did not make.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True)
            is_made = True
        except FileExistsError:
            is_made = False
        if not self.folder.is_dir() or self.folder.stat().st_uid != os.getuid():
            raise RuntimeError(f"{self.folder}: is not a folder that you own; choose another --folder")
        if self.is_claimed():
            return
        if {path.name for path in self.folder.iterdir()} - {_NEW_MARKER}:
            raise RuntimeError(f"{self.folder}: is not empty, and `up` did not make it; choose another --folder")
        self._write({"inode": self.folder.stat().st_ino, "is_made": is_made, "inodes": {}, "elsewhere": {}})

    def is_claimed(self) -> bool:
        """Return whether `up` has claimed the folder.

        Raises:
            RuntimeError: the marker was tampered with.
        """
        return self._read() is not None

    def make_folder(self, name: str) -> Path:
        """Make a folder that only its owner may enter, or return the existing one.

        Raises:
            RuntimeError: something else has the folder's name.
        """
        path = self.folder / name
        if self._make_room(name):
            path.mkdir(mode=0o700)
            self._note(name)
        return path

    def write(self, name: str, text: str) -> None:
        """Write a file that only its owner may read.

        Raises:
            RuntimeError: something else has the file's name.
        """
        self._make_room(name)
        path = self.folder / name
        write_private(path, "")
        self._note(name)  # record it while it is still empty: losing track of an empty file does no harm
        path.write_text(text)

    def link(self, name: str, target: Path) -> None:
        """Make a link to a new folder elsewhere, which is deleted together with the link.

        Raises:
            RuntimeError: something else has the link's name.
        """
        marker = self._claimed()
        marker["elsewhere"][name] = [str(target), target.lstat().st_ino]
        self._write(marker)
        self._make_room(name)
        (self.folder / name).symlink_to(target)
        self._note(name)

    def has(self, name: str) -> bool:
        """Return whether the entry of this name is still the one that was created: same inode, kind and user."""
        marker = self._read()
        if marker is None or name not in marker["inodes"]:
            return False
        is_kind = stat.S_ISLNK if name in marker["elsewhere"] else _is_file_or_folder
        return _is_mine(self.folder / name, is_kind, marker["inodes"][name])

    def delete(self, name: str) -> bool:
        """Delete the entry if it is ours; return whether the name is free now. A foreign entry is left alone."""
        marker, path = self._claimed(), self.folder / name
        if self.has(name):
            if name in marker["elsewhere"]:
                target, inode = marker["elsewhere"][name]
                if _is_mine(Path(target), stat.S_ISDIR, inode):
                    shutil.rmtree(target)
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        for entries in (marker["inodes"], marker["elsewhere"]):
            entries.pop(name, None)
        self._write(marker)
        return not os.path.lexists(path)

    def release(self) -> None:
        """Remove the marker, and also the folder if `up` made it and it is empty."""
        is_made = self._claimed()["is_made"]
        (self.folder / _NEW_MARKER).unlink(missing_ok=True)
        (self.folder / MARKER).unlink()
        if is_made and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _make_room(self, name: str) -> bool:
        """Return whether the name is free. An existing entry must be ours, or empty; an empty one becomes ours."""
        path = self.folder / name
        if not os.path.lexists(path):
            return True
        if not self.has(name):
            is_empty = _is_mine(path, _is_file_or_folder) and (
                not any(path.iterdir()) if path.is_dir() else not path.stat().st_size
            )
            if not is_empty:
                raise RuntimeError(f"{path}: `up` did not make it; move it away, or choose another --folder")
            self._note(name)
        return False

    def _note(self, name: str) -> None:
        marker = self._claimed()
        marker["inodes"][name] = (self.folder / name).lstat().st_ino
        self._write(marker)

    def _claimed(self) -> dict[str, Any]:
        """Return the marker's content; the folder must be claimed."""
        marker = self._read()
        assert marker is not None, f"{self.folder} is not claimed"
        return marker

    def _read(self) -> dict[str, Any] | None:
        """Return the marker's content; None if there is no marker, or it belongs to another folder or user."""
        path = self.folder / MARKER
        if not _is_mine(path, stat.S_ISREG):
            return None
        try:
            marker = json.loads(path.read_text())
            content = {name: marker[name] for name in ("inode", "is_made", "inodes", "elsewhere")}
        except (ValueError, KeyError, TypeError):
            raise RuntimeError(f"{path}: was changed since `up` wrote it; delete the folder by hand") from None
        return content if content["inode"] == self.folder.stat().st_ino else None

    def _write(self, marker: dict[str, Any]) -> None:
        """Replace the marker atomically."""
        new = self.folder / _NEW_MARKER
        write_private(new, json.dumps(marker, indent=2) + "\n")
        new.replace(self.folder / MARKER)


def _is_mine(path: Path, is_kind: Callable[[int], bool], inode: int | None = None) -> bool:
    """Return whether the path is an entry of this kind and user with the inode number; links are not followed."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return False
    return is_kind(info.st_mode) and info.st_uid == os.getuid() and inode in (None, info.st_ino)


def _is_file_or_folder(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)

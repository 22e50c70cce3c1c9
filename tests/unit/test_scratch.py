"""Temporary folders: private, and deleted even if their process was killed."""

from __future__ import annotations

import os
import signal
import stat
import tempfile
from pathlib import Path

import pytest

from agr_ray.storage import scratch
from agr_ray.storage.scratch import scratch_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_private_and_deleted_at_the_end(temporary: Path) -> None:
    with scratch_folder() as folder:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        Path(folder, "file").write_text("x")
    assert list(temporary.iterdir()) == []


def test_leftovers_of_a_killed_process_are_deleted_but_not_those_of_a_live_one(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = os.fork()
    if not process:
        with scratch_folder() as folder:
            Path(folder, "file").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    (left,) = temporary.iterdir()
    monkeypatch.setattr(scratch, "MIN_AGE_S", 0.0)
    with scratch_folder() as living:
        assert not left.exists()
        with scratch_folder() as other:
            assert sorted(map(str, temporary.iterdir())) == sorted([living, other])


def test_links_are_not_followed(
    temporary: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path_factory.mktemp("precious")
    (precious / "file").write_text("x")
    (temporary / f"{scratch.PREFIX}link").symlink_to(precious)
    monkeypatch.setattr(scratch, "MIN_AGE_S", 0.0)
    with scratch_folder():
        assert (precious / "file").exists()

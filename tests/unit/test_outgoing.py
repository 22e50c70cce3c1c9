"""Outgoing checkpoints are in folders where no other user can read, create or delete them."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import pytest

from agr_ray.storage.outgoing import delete_leftovers, outgoing_folder

RUN = "s3://bucket/runs/first"


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_private_and_new_each_time() -> None:
    folders = [outgoing_folder(RUN) for _ in range(3)]

    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700] * 3
    assert len({folder.name for folder in folders}) == 3


def test_leftovers_of_a_killed_worker_are_deleted_but_not_another_runs_folder() -> None:
    left, other = outgoing_folder(RUN), outgoing_folder("s3://bucket/runs/second")
    (left / "weights.safetensors").write_bytes(b"w")

    delete_leftovers(RUN)

    assert (left.exists(), other.exists()) == (False, True)


def test_a_symbolic_link_by_another_user_is_not_followed(shared: Path) -> None:
    name = outgoing_folder(RUN).name
    victim = shared / "victim"
    victim.mkdir()
    (victim / "thesis").write_text("years of work")
    planted = shared / f"{name}x"
    planted.symlink_to(victim)

    delete_leftovers(RUN)

    assert planted.is_symlink()
    assert (victim / "thesis").exists()

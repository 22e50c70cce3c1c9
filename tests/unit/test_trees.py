"""Trees of files on the local disk."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from agr_ray.storage import (
    MissingObject,
    Storage,
    StorageUnavailable,
)


@pytest.fixture
def storage() -> Storage:
    return Storage()


def test_a_tree_is_uploaded_and_downloaded_completely(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "weights").write_bytes(b"w")
    (source / "meta.json").write_text("{}")
    uri = str(tmp_path / "out" / "checkpoint")

    storage.upload_tree(str(source), uri)
    storage.download_tree(uri, str(tmp_path / "back"))

    assert (tmp_path / "back" / "deep" / "weights").read_bytes() == b"w"
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoint"]


def test_an_existing_tree_is_replaced_only_on_request(storage: Storage, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(name)
        (tmp_path / name / f"only-{name}").write_text("x")
    uri = str(tmp_path / "out")
    storage.upload_tree(str(tmp_path / "one"), uri)

    with pytest.raises(FileExistsError, match="not overwritten"):
        storage.upload_tree(str(tmp_path / "two"), uri)
    storage.upload_tree(str(tmp_path / "two"), uri, overwrite=True)

    assert sorted(os.listdir(uri)) == ["meta.json", "only-two"]


def test_a_tree_that_cannot_be_written_gives_one_line(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "meta.json").write_text("{}")
    (tmp_path / "file").write_text("x")

    for write in (storage.upload_tree, storage.download_tree):
        with pytest.raises(StorageUnavailable, match=r"file/out can't be written: File exists"):
            write(str(tmp_path / "source"), str(tmp_path / "file" / "out"))


def test_a_tree_without_its_marker_does_not_exist(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()

    with pytest.raises(ValueError, match=r"meta\.json"):
        storage.upload_tree(str(tmp_path / "source"), str(tmp_path / "out"))
    with pytest.raises(MissingObject, match=r"meta\.json"):
        storage.download_tree(str(tmp_path / "source"), str(tmp_path / "back"))
    assert not (tmp_path / "out").exists()


def test_a_tree_moved_aside_by_a_killed_writer_is_restored(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "meta.json").write_text("old")
    source = tmp_path / "source"
    source.mkdir()
    (source / "meta.json").write_text("new")
    process = os.fork()
    if not process:
        rename = os.rename

        def rename_or_die(old: str, new: str) -> None:
            if new == str(folder):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(old, new)

        os.rename = rename_or_die  # type: ignore[assignment]
        Storage().upload_tree(str(source), str(folder), overwrite=True)
    os.waitpid(process, 0)
    assert not folder.exists()

    process = os.fork()  # a process that has not cleaned this folder yet
    if not process:
        Storage().write(str(tmp_path / "other.txt"), b"x")
        os._exit(0)
    os.waitpid(process, 0)

    assert (folder / "meta.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "other.txt", "source"]

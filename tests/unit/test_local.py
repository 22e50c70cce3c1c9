"""Listing, reading, copying and deleting local files."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from agr_ray.schema import Status
from agr_ray.storage import (
    ChangedObject,
    MissingObject,
    ObjectTooLarge,
    Storage,
    StorageFailed,
    StorageUnavailable,
)

_NOBODY = 65534
ODD_NAMES = ["a b.jpg", "ünï/日本.jpg", "p%20q%.jpg", "h#h.jpg", "e=1/f+g.jpg", "q?x&y.jpg", "back\\slash.jpg"]


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_listed_and_read_back(storage: Storage, tmp_path: Path, name: str) -> None:
    storage.write(storage.join(str(tmp_path), name), name.encode())

    (info,) = storage.list(str(tmp_path))

    assert info.key == name
    assert storage.read(info.uri, etag=info.etag) == name.encode()


def test_a_name_that_is_not_utf8_gets_a_uri_that_reads_it_and_fits_a_table(storage: Storage, tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9 1.jpg")
    with open(path, "wb") as file:
        file.write(b"coffee")

    (info,) = storage.list(str(tmp_path))

    assert info.key == "caf%E9%201.jpg"
    assert pa.array([info.uri])[0].as_py() == info.uri
    assert storage.read(info.uri, etag=info.etag) == b"coffee"


def test_listing_follows_the_order_of_whole_keys_as_s3_does(storage: Storage, tmp_path: Path) -> None:
    keys = ["a.jpg", "a/z.jpg", "a0.jpg", "B.jpg", "a-1.jpg", "a/b/c.jpg", "é.jpg"]
    for key in keys:
        storage.write(storage.join(str(tmp_path), key), b"x")

    assert [info.key for info in storage.list(str(tmp_path))] == sorted(keys, key=str.encode)


def test_listing_keeps_the_wanted_suffixes_in_either_case(storage: Storage, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.JPG", "c.png", "README", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()

    assert [info.key for info in storage.list(str(tmp_path), [".jpg"])] == ["a.jpg", "b.JPG"]


def test_a_link_to_a_folder_that_holds_it_is_not_followed_for_ever(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"x")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "real")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")

    keys = [info.key for info in storage.list(str(tmp_path))]

    assert keys == ["other/a.jpg", "real/a.jpg"]


@pytest.mark.parametrize("name", ["none", "file"])
def test_listing_a_file_is_rejected(storage: Storage, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"x")

    with pytest.raises(StorageUnavailable, match=name):
        list(storage.list(str(tmp_path / name)))


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Yield a folder as a non-root user, because permissions do not restrict root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        if os.geteuid() == 0:
            os.chown(folder, _NOBODY, _NOBODY)
            os.seteuid(_NOBODY)
        try:
            yield Path(folder)
        finally:
            if os.getuid() == 0:
                os.seteuid(0)


@pytest.mark.parametrize("mode", [0o000, 0o400], ids=["not listed", "listed and not entered"])
def test_an_unreadable_subfolder_among_others_is_skipped_and_named(
    storage: Storage, unprivileged: Path, capsys: pytest.CaptureFixture[str], mode: int
) -> None:
    for name in ("a", "lost+found", "z/deep", "z/shut"):
        (unprivileged / name).mkdir(parents=True)
        (unprivileged / name / "1.jpg").write_bytes(b"x")
    for name in ("lost+found", "z/shut"):
        (unprivileged / name).chmod(mode)
    uri = str(unprivileged)

    keys = [info.key for info in storage.list_readable(uri, [".jpg"])]
    with pytest.raises(StorageUnavailable, match=r"lost\+found can't be listed"):
        list(storage.list(uri))
    for name in ("lost+found", "z/shut"):
        (unprivileged / name).chmod(0o700)

    assert keys == ["a/1.jpg", "z/deep/1.jpg"]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: skipping {uri}/lost+found: this user may not list it",
        f"warning: skipping {uri}/z/shut: this user may not list it",
        f"warning: 2 folders and links below {uri} were skipped",
    ]


@pytest.mark.parametrize("target", ["a.jpg", "deep"])
def test_only_a_link_into_an_unreadable_folder_is_skipped_with_its_name(
    storage: Storage, unprivileged: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    (unprivileged / "shut" / "deep").mkdir(parents=True)
    (unprivileged / "shut" / "a.jpg").write_bytes(b"x")
    (unprivileged / "photos").mkdir()
    (unprivileged / "photos" / "b.jpg").symlink_to(unprivileged / "shut" / target)
    for name in ("a.jpg", "c.jpg"):
        (unprivileged / "photos" / name).write_bytes(b"x")
    uri = str(unprivileged / "photos")
    (unprivileged / "shut").chmod(0)

    keys = [info.key for info in storage.list_readable(uri)]
    with pytest.raises(StorageUnavailable, match=r"b\.jpg can't be listed: Permission denied"):
        list(storage.list(uri))
    (unprivileged / "shut").chmod(0o700)

    assert keys == ["a.jpg", "c.jpg"]
    assert capsys.readouterr().err == f"warning: skipping {uri}/b.jpg: this user may not list it\n"


def test_a_failed_lookup_of_a_file_is_an_error(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    stat = os.stat

    def fail(path: str, **kwargs: Any) -> os.stat_result:
        if str(path).endswith("a.jpg"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return stat(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        with pytest.raises(StorageUnavailable, match=r"a\.jpg can't be listed: Input/output error"):
            list(storage.list_readable(str(tmp_path)))


@pytest.mark.parametrize("mode", [0o000, 0o400])
def test_an_unreadable_root_is_an_error(storage: Storage, unprivileged: Path, mode: int) -> None:
    root = unprivileged / "photos"
    root.mkdir()
    (root / "1.jpg").write_bytes(b"x")
    root.chmod(mode)

    with pytest.raises(StorageUnavailable, match="photos can't be listed"):
        list(storage.list_readable(str(root)))
    root.chmod(0o700)


def test_unfinished_files_are_not_listed(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / ".tmp-0").mkdir()
    (tmp_path / ".tmp-0" / "a.jpg").write_bytes(b"x")

    assert list(storage.list(str(tmp_path))) == []


def test_reading_a_missing_file_gives_a_status(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(MissingObject, match=r"gone\.jpg") as caught:
        storage.read(str(tmp_path / "gone.jpg"))

    assert caught.value.status is Status.MISSING


def test_a_file_that_changed_since_it_was_listed_is_rejected(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"old")
    (info,) = storage.list(str(tmp_path))
    os.utime(path, ns=(1, 1))

    with pytest.raises(ChangedObject) as caught:
        storage.read(info.uri, etag=info.etag)

    assert caught.value.status is Status.CHANGED


def test_a_file_over_the_limit_is_rejected_and_one_at_the_limit_is_read(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")

    assert storage.read(str(path), max_bytes=5) == b"12345"
    with pytest.raises(ObjectTooLarge, match="5 bytes, and 4") as caught:
        storage.read(str(path), max_bytes=4)
    assert caught.value.status is Status.TOO_LARGE


def test_reading_a_folder_or_a_pipe_fails_instead_of_waiting(storage: Storage, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")

    for path in (tmp_path, tmp_path / "pipe.jpg"):
        with pytest.raises(StorageFailed) as caught:
            storage.read(str(path))
        assert caught.value.status is Status.FAILED


def test_a_file_is_copied_completely_or_not_at_all(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")

    storage.copy(str(tmp_path / "a"), str(tmp_path / "new" / "b"))
    with pytest.raises(MissingObject, match="none"):
        storage.copy(str(tmp_path / "none"), str(tmp_path / "new" / "b"))

    assert (tmp_path / "new" / "b").read_bytes() == b"x"
    assert os.listdir(tmp_path / "new") == ["b"]


def test_a_move_needs_an_existing_file_and_leaves_nothing_behind(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"before")

    storage.move(str(tmp_path / "a"), str(tmp_path / "b"))
    storage.move(str(tmp_path / "b"), str(tmp_path / "new" / "c"))

    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "new"]
    assert (tmp_path / "new" / "c").read_bytes() == b"a"
    with pytest.raises(MissingObject, match="a does not exist"):
        storage.move(str(tmp_path / "a"), str(tmp_path / "new" / "c"))
    assert (tmp_path / "new" / "c").read_bytes() == b"a"


def test_delete_and_exists(storage: Storage, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    storage.write(path, b"x")
    assert storage.exists(path)

    storage.delete(path)
    storage.delete(path)

    assert not storage.exists(path)
    assert storage.exists(str(tmp_path))


def test_only_a_folder_is_a_folder(storage: Storage, tmp_path: Path) -> None:
    storage.write(str(tmp_path / "a b"), b"x")

    names = (str(tmp_path), f"{tmp_path}/", tmp_path.as_uri(), str(tmp_path / "a b"), (tmp_path / "a b").as_uri())
    assert [storage.is_folder(name) for name in (*names, str(tmp_path / "gone"))] == [True] * 3 + [False] * 3


def test_an_undeletable_file_gives_one_line_and_a_missing_one_none(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()

    for name in ("none", "file/none"):
        storage.delete(str(tmp_path / name))
        storage.delete_tree(str(tmp_path / name))
    with pytest.raises(StorageUnavailable, match="folder can't be deleted: Is a directory"):
        storage.delete(str(tmp_path / "folder"))
    with pytest.raises(StorageUnavailable, match="file can't be deleted: Not a directory"):
        storage.delete_tree(str(tmp_path / "file"))

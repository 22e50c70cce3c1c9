"""The comparison with other pipelines counts lost, doubled and unreported photographs in tables of both layouts."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from facenet_scorer import PHOTOGRAPH
from peers import BROKEN, counts, fill, scored_at

SOUND = {"a.jpg", "b.jpg", "c.jpg"}
BAD = {"1-corrupt-a.jpg", "1-empty-a.jpg", "1-truncated-a.jpg"}


def write_peer(path: Path, *names: str, faces: list[object] | None) -> None:
    """Write a peer's table: `faces` is null for a file that does not decode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"path": f"file:///in/{name}", "faces": faces, "scored_at": 5.0} for name in names]
    pq.write_table(pa.Table.from_pylist(rows, PHOTOGRAPH), path)


def write_ours(path: Path, *names: str, status: str) -> None:
    """Write some columns of our image rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"uri": [f"/in/{name}" for name in names], "status": [status] * len(names)}), path)


def test_a_peer_that_runs_twice_doubles_photographs_and_loses_others(tmp_path: Path) -> None:
    write_peer(tmp_path / "first.parquet", "a.jpg", "b.jpg", faces=[])
    write_peer(tmp_path / "again.parquet", "b.jpg", "b.jpg", "1-truncated-a.jpg", faces=[])
    write_peer(tmp_path / "null.parquet", "1-corrupt-a.jpg", faces=None)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "first.parquet").read_bytes()[:-9])

    found = counts(tmp_path, SOUND, BAD)

    assert (found.num_rows, found.lost, found.doubled, found.unreadable) == (6, 1, 1, 1)
    assert (found.unreported, found.unreported_kinds) == (2, ["empty", "truncated"])
    assert scored_at(tmp_path) == [5.0] * 6


def test_a_sound_photograph_without_faces_is_scored_and_one_called_broken_is_lost(tmp_path: Path) -> None:
    write_peer(tmp_path / "table.parquet", "a.jpg", "b.jpg", faces=[])
    write_peer(tmp_path / "null.parquet", "c.jpg", faces=None)

    assert counts(tmp_path, SOUND, ()).lost == 1


def test_our_rows_say_what_became_of_each_file(tmp_path: Path) -> None:
    write_ours(tmp_path / "images" / "run=1" / "0.parquet", "a.jpg", status="ok")
    write_ours(tmp_path / "images" / "run=1" / "1.parquet", "b.jpg", "c.jpg", status="no_face")
    write_ours(tmp_path / "images" / "run=1" / "2.parquet", *BAD, status="unreadable")
    write_ours(tmp_path / "faces" / "run=1" / "0.parquet", "a.jpg", "a.jpg", status="ok")

    found = counts(tmp_path, SOUND, BAD)

    assert (found.num_rows, found.lost, found.doubled, found.unreported, found.unreadable) == (6, 0, 0, 0, 0)


def test_an_output_that_was_never_written_loses_everything(tmp_path: Path) -> None:
    found = counts(tmp_path / "none", SOUND, BAD)

    assert (found.num_rows, found.lost, found.unreported) == (0, 3, 3)


@pytest.mark.parametrize("folder", ["sound", "all"])
def test_the_folder_has_every_copy_and_every_kind_of_broken_file(tmp_path: Path, folder: str) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(4):
        (photographs / f"{number}.jpg").write_bytes(bytes(range(100)))
    (photographs / "notes.txt").write_text("left out")

    sound, broken = fill(photographs, num_copies=2, broken_share=0.5, work=tmp_path)

    expected = sound | broken if folder == "all" else sound
    assert sorted(path.name for path in (tmp_path / folder).iterdir()) == sorted(expected)
    assert len(sound) == 8
    assert sorted(kind for kind in BROKEN for name in broken if f"-{kind}-" in name) == sorted(BROKEN)
    assert all((tmp_path / "all" / name).read_bytes() == bytes(range(100)) for name in sound)

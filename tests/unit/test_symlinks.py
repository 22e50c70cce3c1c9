"""A link that someone planted, at an output's place or at a temporary name, is replaced or refused, never followed."""

from __future__ import annotations

import ast
import io
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from sets import checkpoint
from this_process import ThisProcess

from agr_ray.config import ScoreConfig, ScoreJob, VisionConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_console
from agr_ray.data.rendered import render_chip
from agr_ray.scoring.driver import score_input
from agr_ray.storage import Storage, StorageUnavailable
from agr_ray.vision.decode import encode_jpeg

ROOT = Path(__file__).parents[2]
PRECIOUS = b"years of work"
Write = Callable[[Storage, str], object]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Return a folder, with a file in it, that nothing may change."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis").write_bytes(PRECIOUS)
    return victim


def is_whole(victim: Path) -> bool:
    return [path.name for path in victim.iterdir()] == ["thesis"] and (victim / "thesis").read_bytes() == PRECIOUS


def moved(storage: Storage, uri: str) -> None:
    storage.write(f"{uri}.new", b"new")
    storage.move(f"{uri}.new", uri)


WRITES: dict[str, Write] = {
    "bytes": lambda storage, uri: storage.write(uri, b"new"),
    "stream": lambda storage, uri: storage.write(uri, io.BytesIO(b"new")),
    "if unchanged": lambda storage, uri: storage.write(uri, b"new", if_match=storage.read_with_etag(uri)[1]),
    "table": lambda storage, uri: storage.write_table(pa.table({"a": [1]}), uri),
    "move": moved,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_link_in_place_of_an_output_is_replaced(name: str, tmp_path: Path, victim: Path) -> None:
    out = tmp_path / "out"
    out.symlink_to(victim / "thesis")

    WRITES[name](Storage(), str(out))

    assert is_whole(victim)
    assert not out.is_symlink()
    assert out.read_bytes() != PRECIOUS


@pytest.mark.parametrize("target", ["thesis", "nothing"])
def test_a_link_counts_as_an_existing_file(target: str, tmp_path: Path, victim: Path) -> None:
    (tmp_path / "out").symlink_to(victim / target)

    with pytest.raises(FileExistsError):
        Storage().write(str(tmp_path / "out"), b"new", if_absent=True)

    assert is_whole(victim)


def test_deleting_deletes_the_link_and_not_its_target(tmp_path: Path, victim: Path) -> None:
    storage = Storage()
    for name, target in (("file", victim / "thesis"), ("folder", victim)):
        (tmp_path / name).symlink_to(target)

    storage.delete(str(tmp_path / "file"))
    with pytest.raises(StorageUnavailable, match="can't be deleted"):
        storage.delete_tree(str(tmp_path / "folder"))

    assert is_whole(victim)


def test_a_tree_replaces_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "meta.json").write_text("{}")
    (tmp_path / "tree").symlink_to(victim)

    Storage().upload_tree(str(tmp_path / "fresh"), str(tmp_path / "tree"), overwrite=True)

    assert is_whole(victim)
    assert not (tmp_path / "tree").is_symlink()


def test_a_link_at_a_temporary_name_is_refused(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guessed = uuid.uuid4()
    monkeypatch.setattr(uuid, "uuid4", lambda: guessed)  # nobody can guess it, but if
    Storage().write(str(tmp_path / "out" / "file"), b"old")  # deletes leftovers, once
    (tmp_path / "out" / f".tmp-{guessed.hex}").symlink_to(victim / "thesis")

    with pytest.raises(StorageUnavailable, match="can't be written: File exists"):
        Storage().write(str(tmp_path / "out" / "file"), b"new")

    assert is_whole(victim)


def test_no_temporary_name_can_be_guessed() -> None:
    calls = [
        f"{path.relative_to(ROOT)}: {ast.unparse(node)}"
        for folder in ("agr_ray", "cluster")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("mktemp", "tmpnam"))
    ]

    assert calls == []


def test_what_a_link_in_a_stale_temporary_folder_points_to_stays_there(tmp_path: Path, victim: Path) -> None:
    stale = tmp_path / "out" / f".tmp-{uuid.uuid4().hex}"
    stale.mkdir(parents=True)
    (stale / "live").touch()
    (stale / "old").symlink_to(victim)

    Storage().write(str(tmp_path / "out" / "file"), b"new")  # deletes what killed writers have left

    assert is_whole(victim)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_a_scoring_run_follows_no_planted_link(tmp_path: Path, victim: Path) -> None:
    stored = Pipeline(vision=VisionConfig(detector="haar"))
    model = checkpoint(tmp_path / "model", pipeline=stored)
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(encode_jpeg(render_chip(0, 16).image_rgb))
    (tmp_path / "out" / "views.sql").symlink_to(victim / "thesis")
    score = ScoreConfig(checkpoint=str(model), input=str(tmp_path / "in"), out=str(tmp_path / "out"), outage_s=0.0)

    score_input(ScoreJob(vision=VisionConfig(detector="haar"), score=score), ThisProcess.of(model), make_console())

    assert is_whole(victim)
    assert "CREATE OR REPLACE VIEW" in (tmp_path / "out" / "views.sql").read_text()

"""views.sql reads the published runs of its own folder, whatever the names of that folder and its parents."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import agr_ray
from agr_ray.errors import ConfigError
from agr_ray.schema import DEMOGRAPHICS, FACES, IMAGES, RUN_ID
from agr_ray.scoring.publish import views_sql
from agr_ray.storage import Storage

RUNS = ("20260101T000000.000Z-00000000", "20260102T000000.000Z-00000000")


def published(out: Path, run_id: str, *, finished: bool) -> None:
    """Write a run of one image with one face."""
    image = {
        "image_id": run_id,
        "uri": f"s3://bucket/{run_id}",
        "status": "ok",
        "faces": [{"gender": "male", "flags": [], "abstain": []}],
        "run_id": run_id,
        "model_digest": "model",
        "config_digest": "config",
        "calibrated": False,
        "detector": "mtcnn",
        "scored_at": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "schema_version": 1,
    }
    face = {name: value for name, value in image.items() if name in FACES.names} | {"face_index": 0}
    cell = {"is_total": True, "breakdown": "gender", "gender": "male", "n": 1, "suppressed": False, "run_id": run_id}
    cells = pa.schema([*DEMOGRAPHICS, RUN_ID])
    for name, row, schema in (("images", image, IMAGES), ("faces", face, FACES), ("demographics", cell, cells)):
        folder = out / name / f"run={run_id}"
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([row], schema=schema), folder / f"{name}-00000.parquet")
    if finished:
        (out / "_SUCCESS").mkdir(exist_ok=True)
        (out / "_SUCCESS" / f"run={run_id}.json").write_text(json.dumps({"run_id": run_id}))


@pytest.mark.parametrize(
    "name",
    ["out", "[1]", "a[bold]b[/nope]", "50%", "what?", "2*2", "it's", "run=7/out", "status=prod/gender=x/out", "{a,b}"],
)
def test_views_read_the_runs_of_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    published(out, RUNS[0], finished=True)
    published(out, RUNS[1], finished=False)
    with duckdb.connect() as database:
        database.execute(views_sql(Storage(), str(out), has_images=True))

        runs = database.sql("SELECT run_id FROM runs").fetchall()
        cells = database.sql("SELECT run_id, gender, n FROM demographics").fetchall()
        images = database.sql("SELECT run_id, status FROM images").fetchall()
        faces = database.sql("SELECT run_id, gender FROM faces").fetchall()
        columns = [row[0] for row in database.sql("DESCRIBE images").fetchall()]

    assert runs == [(RUNS[0],)]
    assert cells == [(RUNS[0], "male", 1)]
    assert images == [(RUNS[0], "ok")]
    assert faces == [(RUNS[0], None)]
    assert columns == IMAGES.names


def test_published_scores_are_opened_as_relations_also_from_a_copy(tmp_path: Path) -> None:
    published(tmp_path / "out", RUNS[0], finished=True)
    published(tmp_path / "out", RUNS[1], finished=False)
    (tmp_path / "out").rename(tmp_path / "copy")

    scores = agr_ray.open_scores(f"{tmp_path / 'copy'}/")

    assert repr(scores) == (
        f"<Scores {tmp_path / 'copy'}, runs: 1, relations: runs, demographics, images, faces, rejects>"
    )
    assert scores.runs.fetchall() == [(RUNS[0],)]
    assert scores.images.select("uri").fetchall() == [(f"s3://bucket/{RUNS[0]}",)]
    assert scores.faces.select("run_id, face_index").fetchall() == [(RUNS[0], 0)]
    assert scores.rejects.fetchall() == []
    assert scores.demographics.select("run_id, n").fetchall() == [(RUNS[0], 1)]
    assert scores.query("SELECT count(*) FROM images JOIN faces USING (image_id)").fetchall() == [(1,)]


def test_scores_without_rows_or_runs_say_so(tmp_path: Path) -> None:
    published(tmp_path, RUNS[0], finished=True)
    for name in ("images", "faces"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(ConfigError, match=r"there are no faces: every run was scored with score\.aggregate_only"):
        agr_ray.open_scores(str(tmp_path)).faces  # noqa: B018
    with pytest.raises(ConfigError, match=r"elsewhere: there is no such folder$"):
        agr_ray.open_scores(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ConfigError, match="there is no published scoring run"):
        agr_ray.open_scores(tmp_path / "elsewhere")

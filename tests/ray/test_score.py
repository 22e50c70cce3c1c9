"""Scoring: one row for every file, every face in its place, and nothing scored twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import bad_images
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from node_metrics import value, wait_for
from PIL import Image
from ray.data import ActorPoolStrategy
from sets import checkpoint, iou
from this_process import scoring_of

from agr_ray.config import GatesConfig, ScoreConfig, ScoreJob, VisionConfig
from agr_ray.data.rendered import RenderedPhotograph, render_photograph
from agr_ray.errors import ConfigError
from agr_ray.labels import GENDERS, UTKFACE
from agr_ray.runtime.part_runner import run_parts
from agr_ray.runtime.score import score
from agr_ray.runtime.score_on_ray import RemotelyPredicted, remote_predictors
from agr_ray.schema import IMAGES, SCHEMA_VERSION
from agr_ray.scoring.planning import plan
from agr_ray.storage import Storage
from agr_ray.storage.parts import Parts
from agr_ray.vision.decode import encode_jpeg

pytestmark = pytest.mark.usefixtures("ray_cluster")

MAX_SIDE_PX = 900
GATE_PX = 150
PHOTOGRAPHS = {
    "one.jpg": (0, 640, 480, 1),
    "three.jpg": (1, 880, 660, 3),
    "sub/larger than looked at.JPEG": (2, 2000, 1500, 2),
}
FILES = {
    "nobody.jpg": (lambda: bad_images.jpeg(400, 300), "no_face"),
    "animated.gif": (bad_images.animated_gif, "no_face"),
    "cmyk.jpg": (bad_images.cmyk_jpeg, "no_face"),
    **bad_images.REJECTED,
}


def score_job(model: Path, photographs: Path, out: Path, **changes: Any) -> ScoreJob:
    settings = {
        "checkpoint": str(model),
        "input": str(photographs),
        "out": str(out),
        "num_workers": 2,
        "batch_size": 3,
        "rows_per_file": 4,
        "key_pattern": r"(?P<kind>\w+)$",
        "group_by": ("kind",),
    }
    return ScoreJob(
        vision=VisionConfig(max_side_px=MAX_SIDE_PX),
        gates=GatesConfig(min_side_px=GATE_PX),
        score=ScoreConfig(**settings | changes),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("score")


@pytest.fixture(scope="module")
def drawn(folder: Path) -> dict[str, RenderedPhotograph]:
    """Write the photographs and every bad file; return what was drawn, by key."""
    (folder / "photographs" / "sub").mkdir(parents=True)
    drawn = {key: render_photograph(3, *what) for key, what in PHOTOGRAPHS.items()}
    for key, photograph in drawn.items():
        (folder / "photographs" / key).write_bytes(encode_jpeg(photograph.image_rgb))
    for key, (make, _) in FILES.items():
        (folder / "photographs" / key).write_bytes(make())
    (folder / "photographs" / "notes.txt").write_text("no photograph")
    return drawn


@pytest.fixture(scope="module")
def job(folder: Path, drawn: dict[str, RenderedPhotograph]) -> ScoreJob:
    assert drawn
    return score_job(checkpoint(folder / "model"), folder / "photographs", folder / "out")


@pytest.fixture(scope="module")
def record(job: ScoreJob) -> dict[str, Any]:
    return score(job)


@pytest.fixture(scope="module")
def published(record: dict[str, Any], folder: Path) -> Path:
    return folder / "out" / "images" / f"run={record['run_id']}"


def images(published: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the image rows by key."""
    rows = pq.read_table(published).to_pylist()
    root = str(folder / "photographs") + "/"
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["uri"].removeprefix(root): row for row in rows}


def test_a_nodes_metrics_have_exactly_the_counts_of_the_run(job: ScoreJob, record: dict[str, Any]) -> None:
    # First, because a node drops gauges 20 s after the run.
    found = wait_for(job.score.out, lambda each: bool(value(each, "last_published_timestamp_seconds")))

    assert {labels["command"] for _, labels, _ in found} == {"score"}
    counted = {labels["status"]: number for name, labels, number in found if name == "images_total"}
    assert counted == record["counts"]
    assert value(found, "faces_total") == [record["num_faces"]] == [6]
    assert value(found, "image_stage_seconds_count", stage="decode") == [3]  # parts
    for stage in ("align", "predict"):
        assert value(found, "image_stage_seconds_count", stage=stage) == [2]  # parts with faces
    assert value(found, "parts", state="waiting") == value(found, "parts", state="in_flight") == [0]
    (published_s,) = value(found, "last_published_timestamp_seconds")
    (finished_s,) = value(found, "last_finished_timestamp_seconds")
    assert published_s == datetime.fromisoformat(record["published_at"]).timestamp()
    assert published_s < finished_s < time.time()

    assert score(job) == record  # nothing is new
    found = wait_for(
        job.score.out, lambda each: value(each, "last_finished_timestamp_seconds") not in ([], [finished_s])
    )

    assert value(found, "last_published_timestamp_seconds") == [published_s]
    assert finished_s < value(found, "last_finished_timestamp_seconds")[0] < time.time()


def test_every_file_is_one_row_with_the_right_status(published: Path, folder: Path) -> None:
    rows = images(published, folder)

    expected = {key: status for key, (_, status) in FILES.items()} | dict.fromkeys(PHOTOGRAPHS, "ok")
    assert {key: row["status"] for key, row in rows.items()} == expected
    for row in rows.values():
        assert bool(row["error"]) == (row["status"] not in ("ok", "no_face"))
        assert bool(row["faces"]) == (row["status"] == "ok")


@pytest.mark.parametrize("key", PHOTOGRAPHS)
def test_every_face_is_found_where_it_was_drawn(
    published: Path, folder: Path, drawn: dict[str, RenderedPhotograph], key: str
) -> None:
    row = images(published, folder)[key]

    height, width = drawn[key].image_rgb.shape[:2]
    assert (row["width_px"], row["height_px"]) == (width, height)
    assert len(row["faces"]) == len(drawn[key].faces)
    for face, true in zip(row["faces"], drawn[key].faces, strict=True):  # both from left to right
        assert iou(face["box"], true.box_xyxy) >= 0.5
    assert [face["box"][0] for face in row["faces"]] == sorted(face["box"][0] for face in row["faces"])


def test_every_face_has_every_attribute(published: Path, folder: Path) -> None:
    for row in images(published, folder).values():
        for face in row["faces"]:
            assert 0 <= face["age"] <= 116
            assert face["gender"] == GENDERS[int(face["p_male"] > 0.5)]
            assert face["race"] == max(face["race_probs"], key=lambda pair: pair[1])[0]
            assert [race for race, _ in face["race_probs"]] == list(UTKFACE.races)
            assert sum(p for _, p in face["race_probs"]) == pytest.approx(1.0, abs=1e-5)
            assert face["detector_score"] >= 0.9
            assert face["sharpness"] > 0
            assert None not in (face["yaw"], face["pitch"], face["roll"])


def test_the_files_have_the_schema_and_say_where_they_come_from(published: Path, folder: Path) -> None:
    for file in published.glob("*.parquet"):
        assert pq.read_schema(file).equals(IMAGES)
    rows = images(published, folder).values()
    assert {row["run_id"] for row in rows} == {published.name.removeprefix("run=")}
    assert {(row["detector"], row["schema_version"]) for row in rows} == {("mtcnn", SCHEMA_VERSION)}
    record = json.loads((folder / "out" / "_SUCCESS" / f"{published.name}.json").read_text())
    assert record["num_images"] == sum(record["counts"].values()) == len(rows)
    assert not any(path.is_file() for path in (folder / "out-work").rglob("*"))


def test_duckdb_reads_the_faces_as_they_are(published: Path) -> None:
    found = duckdb.sql(
        f"""
        SELECT status, count(*) AS num_images, sum(len(faces)) AS num_faces
        FROM read_parquet('{published}/*.parquet') GROUP BY status
        """
    ).fetchall()
    faces = duckdb.sql(
        f"""
        SELECT f.box[3] - f.box[1] AS width_px, f.age, f.race_probs['white'] AS p_white
        FROM (SELECT unnest(faces) AS f FROM read_parquet('{published.parent}/run=*/*.parquet'))
        """
    ).fetchall()

    by_status = {status: (num_images, num_faces) for status, num_images, num_faces in found}
    assert by_status["ok"] == (3, 6)
    assert by_status["no_face"] == (3, 0)
    assert len(faces) == 6
    assert all(width_px > 0 and 0 <= age <= 116 and 0 <= p_white <= 1 for width_px, age, p_white in faces)


def table(out: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of all published runs of a table, read with no help."""
    return pq.read_table(out / name).to_pylist()


def test_faces_and_rejects_are_tables_of_their_own(published: Path, folder: Path) -> None:
    rows = images(published, folder)
    faces, rejects = table(folder / "out", "faces"), table(folder / "out", "rejects")

    expected = [(row["uri"], face["box"]) for row in rows.values() for face in row["faces"]]
    assert sorted((face["uri"], face["box"]) for face in faces) == sorted(expected)
    assert {row["status"] for row in rejects} == {"not_an_image", "unreadable", "too_large"}
    assert len(rejects) == 5


def test_a_face_beyond_the_gates_is_flagged_and_kept(published: Path, folder: Path) -> None:
    sides_px = [
        (face["flags"], min(face["box"][2] - face["box"][0], face["box"][3] - face["box"][1]))
        for row in images(published, folder).values()
        for face in row["faces"]
    ]

    assert {bool(flags) for flags, _ in sides_px} == {True, False}
    assert all(flags == (["small"] if side_px < GATE_PX else []) for flags, side_px in sides_px)


def test_demographics_count_the_faces_of_every_group(published: Path, folder: Path) -> None:
    rows = [row for row in table(folder / "out", "demographics") if row["breakdown"] == "gender"]
    accepted = sum(not face["flags"] for row in images(published, folder).values() for face in row["faces"])

    total = [row["n"] for row in rows if row["is_total"]]
    assert sum(total) == sum(row["n"] for row in rows if not row["is_total"]) == accepted
    assert {row["kind"] for row in rows if row["is_total"]} == {None}
    assert {row["num_images"] for row in rows if row["kind"] == "gif"} == {1}
    assert {row["correction"] for row in rows} == {"no calibration"}


def test_the_next_runs_score_only_what_is_new_or_changed(job: ScoreJob, published: Path, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.parquet")}

    runs = sorted((folder / "out" / "_SUCCESS").iterdir())
    score(job)
    assert sorted((folder / "out" / "_SUCCESS").iterdir()) == runs

    added, changed = folder / "photographs" / "added.jpg", folder / "photographs" / "nobody.jpg"
    body = changed.read_bytes()
    few = job.model_copy(update={"score": job.score.model_copy(update={"num_workers": 1})})
    Image.new("RGB", (200, 200), "teal").save(added)
    Image.new("RGB", (220, 220), "teal").save(changed)
    try:
        record = score(few)
    finally:
        added.unlink()
        changed.write_bytes(body)
    assert record["counts"] == {"no_face": 2}
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.parquet")}.items()
    with duckdb.connect() as database:
        database.execute((folder / "out" / "views.sql").read_text())
        counted = database.sql("SELECT count(*), count(DISTINCT uri) FROM images").fetchall()
        width_px = database.sql("SELECT width_px FROM images WHERE uri LIKE '%nobody.jpg'").fetchall()
        others = database.sql("SELECT (SELECT count(*) FROM faces), (SELECT count(*) FROM rejects)").fetchall()
    assert counted == [(12, 12)]
    assert width_px == [(220,)]
    assert others == [(6, 5)]


@pytest.fixture(scope="module")
def aggregate_job(job: ScoreJob, folder: Path) -> ScoreJob:
    key = folder / "key"
    key.write_bytes(bytes(range(32)))
    private = {"aggregate_only": True, "pseudonymise": str(key), "ledger": str(folder / "ledger"), "group_by": ()}
    return score_job(
        Path(job.score.checkpoint), folder / "photographs", folder / "aggregates", num_workers=1, **private
    )


@pytest.fixture(scope="module")
def printed(aggregate_job: ScoreJob, folder: Path) -> list[str]:
    """Run that job as a command of its own, and return what it and a last line about torch print."""
    recipe, lines = folder / "aggregates.toml", []
    for section in ("vision", "gates", "score"):
        settings = getattr(aggregate_job, section).model_dump(mode="json", exclude_defaults=True)
        lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in settings.items())]
    recipe.write_text("\n".join(lines))
    code = "import sys; from agr_ray.cli import main; main(sys.argv[1:]); print('loaded:', 'torch' in sys.modules)"
    argv = ["score", "--config", str(recipe), "--cluster.address", ray.get_runtime_context().gcs_address]
    return subprocess.check_output([sys.executable, "-c", code, *argv], text=True).splitlines()


def test_the_driver_does_not_load_torch(printed: list[str]) -> None:
    assert printed[-1] == "loaded: False"


@pytest.mark.usefixtures("printed")
def test_a_lost_ledger_is_detected(aggregate_job: ScoreJob, folder: Path) -> None:
    lost = aggregate_job.score.model_copy(update={"ledger": str(folder / "ledger-2")})
    with pytest.raises(ConfigError, match=r"^score\.ledger .*ledger-2: has no run="):
        score(aggregate_job.model_copy(update={"score": lost}))


@pytest.mark.usefixtures("printed")
def test_aggregate_only_names_no_photograph_and_counts_each_once(aggregate_job: ScoreJob, folder: Path) -> None:
    (file,) = (folder / "aggregates" / "_SUCCESS").iterdir()
    first = json.loads(file.read_text())

    assert score(aggregate_job) == first

    assert first["num_images"] == 11
    assert {path.name for path in (folder / "aggregates").iterdir()} == {"_SUCCESS", "demographics", "views.sql"}
    ledger = pq.read_table(folder / "ledger")
    assert ledger.column_names == ["image_id", "status", "storage_class", "run"]
    assert len(ledger) == 11


def test_predictors_in_other_processes_give_the_same_rows(
    job: ScoreJob, published: Path, folder: Path, drawn: Any, tmp_path: Path
) -> None:
    storage = Storage()
    scoring = scoring_of(folder / "model", tmp_path, vision=job.vision, gates=job.gates, batch_size=2)
    made = plan(storage, job.score, Parts(storage, str(tmp_path)).manifest)
    parts = range(made.num_parts)

    with remote_predictors(scoring, 2, gpus_each=0.0) as predictors:
        tables = run_parts(RemotelyPredicted, (scoring, predictors), parts, ActorPoolStrategy(size=1))
        summaries = pa.concat_tables(tables).to_pylist(maps_as_pydicts="strict")

    assert sorted(each["part"] for each in summaries) == list(parts)
    assert sum(each["num_faces"] for each in summaries) == sum(len(each.faces) for each in drawn.values())
    statuses = sum((Counter(each["statuses"]) for each in summaries), Counter())
    rows = [row for part in parts for row in storage.read_table(scoring.parts.uri(part)).to_pylist()]
    others = images(published, folder)
    assert len(rows) == len(others) == len(drawn) + len(FILES)
    assert statuses == Counter(row["status"] for row in rows)
    for row in rows:
        other = others[row["uri"].removeprefix(f"{folder / 'photographs'}/")]
        assert [face["age"] for face in row["faces"]] == pytest.approx([face["age"] for face in other["faces"]])
        assert [face["box"] for face in row["faces"]] == [face["box"] for face in other["faces"]]

"""Scoring: one row for every file, every face in its place, and nothing scored twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bad_images
import duckdb
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sets import checkpoint, iou

from agr_ray.config import ScoreConfig, ScoreJob, VisionConfig
from agr_ray.data.rendered import RenderedPhotograph, render_photograph
from agr_ray.runtime.score import score
from agr_ray.schema import GENDERS, IMAGES, RACES
from agr_ray.vision.decode import encode_jpeg

pytestmark = pytest.mark.usefixtures("ray_cluster")

MAX_SIDE_PX = 900
PHOTOGRAPHS = {
    "one.jpg": (0, 640, 480, 1),
    "three.jpg": (1, 880, 660, 3),
    "sub/larger than looked at.JPEG": (2, 2000, 1500, 2),
}
FILES = {
    "nobody.jpg": (lambda: bad_images.jpeg(400, 300), "no_face"),
    "animated.gif": (bad_images.animated_gif, "no_face"),
    "cmyk.jpg": (bad_images.cmyk_jpeg, "no_face"),
    "empty.jpg": (bad_images.empty, "not_an_image"),
    "text.jpg": (bad_images.text, "not_an_image"),
    "corrupt.jpg": (bad_images.corrupt_jpeg, "unreadable"),
    "truncated.jpg": (bad_images.truncated_jpeg, "unreadable"),
    "bomb.png": (bad_images.png_bomb, "too_large"),
}


def score_job(model: Path, photographs: Path, out: Path) -> ScoreJob:
    return ScoreJob(
        vision=VisionConfig(max_side_px=MAX_SIDE_PX),
        score=ScoreConfig(checkpoint=str(model), input=str(photographs), out=str(out), num_workers=2, batch_size=3),
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
def published(job: ScoreJob) -> Path:
    return Path(score(job))


def images(published: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the image rows by key."""
    rows = pq.read_table(published).to_pylist()
    root = str(folder / "photographs") + "/"
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["uri"].removeprefix(root): row for row in rows}


def test_every_file_is_one_row_with_the_status_that_is_right(published: Path, folder: Path) -> None:
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
            assert face["race"] == RACES[face["race_probs"].index(max(face["race_probs"]))]
            assert sum(face["race_probs"]) == pytest.approx(1.0, abs=1e-5)
            assert face["detector_score"] >= 0.9
            assert face["sharpness"] > 0
            assert None not in (face["yaw"], face["pitch"], face["roll"])


def test_the_parts_have_the_schema_and_say_where_they_come_from(published: Path, folder: Path) -> None:
    for part in published.glob("*.parquet"):
        assert pq.read_schema(part).equals(IMAGES)
    rows = images(published, folder).values()
    assert {row["run_id"] for row in rows} == {published.name.removeprefix("run=")}
    assert {(row["detector"], row["schema_version"]) for row in rows} == {("mtcnn", 1)}
    record = json.loads((published / "_SUCCESS.json").read_text())
    assert record["rows"] == sum(record["counts"].values()) == len(rows)
    assert not any((folder / "out-work").rglob("*.parquet"))


def test_duckdb_reads_the_faces_as_they_are(published: Path) -> None:
    found = duckdb.sql(
        f"""
        SELECT status, count(*) AS num_images, sum(len(faces)) AS num_faces
        FROM read_parquet('{published}/*.parquet') GROUP BY status
        """
    ).fetchall()
    faces = duckdb.sql(
        f"""
        SELECT f.box[3] - f.box[1] AS width_px, f.age, f.race_probs[1] AS p_white
        FROM (SELECT unnest(faces) AS f FROM read_parquet('{published.parent}/run=*/*.parquet'))
        """
    ).fetchall()

    by_status = {status: (num_images, num_faces) for status, num_images, num_faces in found}
    assert by_status["ok"] == (3, 6)
    assert by_status["no_face"] == (3, 0)
    assert len(faces) == 6
    assert all(width_px > 0 and 0 <= age <= 116 and 0 <= p_white <= 1 for width_px, age, p_white in faces)


def test_a_second_run_scores_only_what_is_new(
    published: Path, job: ScoreJob, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    job = score_job(folder / "model", folder / "photographs", out)
    copy = out / "images" / published.name
    before = {path.name: path.stat().st_mtime_ns for path in copy.glob("*.parquet")}

    assert Path(score(job)) == copy
    assert "11 photographs, 0 to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in copy.glob("*.parquet")} == before

    added = folder / "photographs" / "added.jpg"
    Image.new("RGB", (200, 200), "teal").save(added)
    try:
        score(job)
        assert "12 photographs, 1 to do" in capsys.readouterr().out
        rows = images(copy, folder)
    finally:
        added.unlink()
    assert len(rows) == 12
    assert rows["added.jpg"]["status"] == "no_face"
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in copy.glob("*.parquet")}.items()

"""Scoring with a checkpoint and no recipe, and with settings that differ from the checkpoint's."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from sets import checkpoint, chip_jpeg
from test_resolve import calibrate
from this_process import ThisProcess

from agr_ray.config import PredictConfig, ScoreJob, VisionConfig, parse
from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_console
from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint import META, WEIGHTS
from agr_ray.scoring.driver import score_input

STORED = Pipeline(vision=VisionConfig(detector="haar", min_face_px=60), predict=PredictConfig(flip_average=True))
RECIPE = b"[vision]\ndetector = 'haar'\nmin_face_px = 60\n[predict]\nflip_average = true\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a checkpoint that stores `STORED`."""
    folder = checkpoint(tmp_path / "model")
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(meta | STORED.to_json()))
    return folder


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Return a folder of eight rendered chips."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(chip_jpeg(number))
    return folder


def scored(job: ScoreJob) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Return the run's record, its rows without time and run id, and the output."""
    log = io.StringIO()
    record = score_input(job, ThisProcess(), make_console(log))
    table = pq.read_table(Path(job.score.out) / "images" / f"run={record['run_id']}", partitioning=None)
    return record, table.drop(["scored_at", "run_id"]).to_pylist(), log.getvalue()


def job(model: Path, photographs: Path, out: str, *argv: str, recipe: bytes = b"") -> ScoreJob:
    needed = ["--score.checkpoint", str(model), "--score.input", str(photographs)]
    needed += ["--score.out", str(photographs.parent / out)]
    return parse(ScoreJob, [*needed, "--config", "x.toml", *argv], {}, lambda *_: recipe)


def test_a_checkpoint_alone_gives_the_same_rows_as_with_its_recipe(model: Path, photographs: Path) -> None:
    alone, rows, printed = scored(ScoreJob(score=job(model, photographs, "alone").score))
    again, same_rows, _ = scored(job(model, photographs, "recipe", recipe=RECIPE))
    _, default_rows, _ = scored(job(model, photographs, "default", "--predict.flip_average", "false", recipe=RECIPE))

    assert sum(len(row["faces"]) for row in rows) >= 4
    assert rows == same_rows
    assert {row["detector"] for row in rows} == {"haar"}
    assert [face["p_male"] for row in rows for face in row["faces"]] != [
        face["p_male"] for row in default_rows for face in row["faces"]
    ]
    assert alone["config_digest"] == again["config_digest"]
    assert {"vision": alone["vision"], "predict": alone["predict"]} == STORED.to_json()
    assert "trained on crops" not in printed


def test_a_run_with_the_recipe_skips_what_a_run_without_it_has_scored(model: Path, photographs: Path) -> None:
    first = scored(job(model, photographs, "out"))[0]
    assert first["num_images"] == 8
    assert scored(job(model, photographs, "out", recipe=RECIPE))[0] == first


def test_rows_say_whether_they_are_calibrated(model: Path, photographs: Path) -> None:
    calibrate(model, STORED)
    argv = ("--vision.min_face_px", "30")

    calibrated, rows, _ = scored(job(model, photographs, "calibrated"))
    with pytest.raises(ConfigError, match=r"^score\.checkpoint: vision\.min_face_px = 30, but .* calibrated with 60"):
        scored(job(model, photographs, "uncalibrated", *argv))
    record, other_rows, printed = scored(job(model, photographs, "uncalibrated", *argv, "--allow-uncalibrated"))

    faces, others = ([face for row in each for face in row["faces"]] for each in (rows, other_rows))
    assert all(face["age_low"] < face["age"] < face["age_high"] for face in faces)
    assert {face["age_low"] for face in others} == {face["age_high"] for face in others} == {None}
    assert [row["calibrated"] for row in rows] == [True] * 8
    assert [row["calibrated"] for row in other_rows] == [False] * 8
    reason = "vision.min_face_px = 30, but the checkpoint was calibrated with 60"
    assert (calibrated["calibrated"], calibrated["uncalibrated_because"]) == (True, "")
    assert (record["calibrated"], record["uncalibrated_because"]) == (False, reason)
    assert f"no corrected shares: {reason}" in " ".join(printed.split())
    assert {row["calibrated"] for row in pq.read_table(photographs.parent / "uncalibrated" / "faces").to_pylist()} == {
        False
    }


def test_scoring_without_a_detector_is_rejected_wherever_it_is_set(model: Path, photographs: Path) -> None:
    meta = json.loads((model / META).read_text())
    (model / META).write_text(json.dumps(meta | Pipeline(vision=VisionConfig(detector="none")).to_json()))

    remedy = r"give --vision\.detector mtcnn \(or haar\)$"
    with pytest.raises(ConfigError, match=rf"^score\.checkpoint .*model: vision\.detector is none, .*; {remedy}"):
        scored(job(model, photographs, "out"))
    calibrate(model, Pipeline(vision=VisionConfig(detector="none")))
    with pytest.raises(ConfigError, match=r"; calibrate it again .* or give --vision.detector mtcnn --allow-uncal"):
        scored(job(model, photographs, "out"))
    record, _, _ = scored(job(model, photographs, "out", "--vision.detector", "haar", "--allow-uncalibrated"))
    assert (record["num_images"], record["calibrated"]) == (8, False)


def test_the_precision_is_recorded_and_differing_from_the_calibrations_triggers_a_warning(
    model: Path, photographs: Path
) -> None:
    warning = "warning: predicted in float32, but calibrated on predictions in bfloat16"
    calibrate(model, STORED)
    record, rows, printed = scored(job(model, photographs, "same"))
    assert record["precisions"] == ["float32"]
    assert [row["precision"] for row in rows] == ["float32" if row["faces"] else None for row in rows]
    assert "predicted in" not in printed

    calibrate(model, STORED, precisions=("bfloat16",))
    assert warning in " ".join(scored(job(model, photographs, "other"))[2].split())


def test_attributes_are_written_in_any_order_and_rejected_if_the_checkpoint_lacks_them(
    model: Path, photographs: Path
) -> None:
    first, _, _ = scored(job(model, photographs, "out", "--score.attributes", '["age", "gender"]'))
    again, _, _ = scored(job(model, photographs, "out", "--score.attributes", '["gender", "age", "age"]'))
    assert first["num_images"] == 8
    assert again == first

    meta = json.loads((model / META).read_text())
    (model / META).write_text(json.dumps(meta | {"model": meta["model"] | {"tasks": ["age", "gender"]}}))
    weights = load_file(model / WEIGHTS)
    save_file({name: each for name, each in weights.items() if not name.startswith("heads.race.")}, model / WEIGHTS)
    with pytest.raises(
        ConfigError, match=r"^score\.attributes race: .*model does not predict it; allowed: age, gender$"
    ):
        scored(job(model, photographs, "other", "--score.attributes", '["age", "race"]'))
    _, rows, _ = scored(job(model, photographs, "other"))
    assert {(face["race"], face["gender"] is None) for row in rows for face in row["faces"]} == {(None, False)}


def test_a_detector_without_its_package_is_rejected_before_anything_is_planned(
    model: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"^vision\.detector mtcnn_int8: needs openvino, not installed on"):
        scored(job(model, photographs, "missing", "--vision.detector", "mtcnn_int8"))

    assert not (photographs.parent / "missing-work").exists()


def test_the_other_cascade_triggers_no_warning(model: Path, photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "mtcnn")
    meta = json.loads((tmp_path / "mtcnn" / META).read_text())
    meta["vision"]["detector"] = "mtcnn"
    (tmp_path / "mtcnn" / META).write_text(json.dumps(meta))

    _, rows, printed = scored(job(tmp_path / "mtcnn", photographs, "int8", "--vision.detector", "mtcnn_int8"))

    assert {row["detector"] for row in rows} == {"mtcnn_int8"}
    assert "trained on crops" not in printed

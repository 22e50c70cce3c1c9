"""The settings and the calibration with which a checkpoint is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_jobs_errors import saved_checkpoint

from agr_ray.config import EvaluateJob, PredictConfig, ScoreJob, VisionConfig, parse
from agr_ray.config.pipeline import DECISIVE, Pipeline
from agr_ray.errors import ConfigError
from agr_ray.evaluation.calibration import Calibration
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.checkpoint import CALIBRATION, META, model_digest, read_checkpoint
from agr_ray.predict.resolve import resolve

STORED = Pipeline(vision=VisionConfig(detector="haar", max_side_px=900), predict=PredictConfig(flip_average=True))
NOTHING = Pipeline()
NEEDED = {ScoreJob: ["checkpoint", "input", "out"], EvaluateJob: ["checkpoint", "data"]}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Return an uncalibrated checkpoint that stores `STORED`."""
    folder = saved_checkpoint(tmp_path / "checkpoint")
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(meta | STORED.to_json()))
    return folder


def calibrate(folder: Path, pipeline: Pipeline, digest: str = "", precisions: tuple[str, ...] = ("float32",)) -> None:
    """Write a calibration that was fitted under these settings."""
    age = np.random.default_rng(0).uniform(1, 90, 60).astype(np.float32)
    fitted = Calibration.fit(
        Labels(UTKFACE, age, np.full(60, -1), np.full(60, -1)),
        {"age": age + 1},
        coverage=0.9,
        risk=0.05,
        model_digest=digest or model_digest(folder),
        pipeline=pipeline,
        precisions=precisions,
    )
    (folder / CALIBRATION).write_text(json.dumps(fitted.to_json()))


def with_vision(**values: Any) -> Pipeline:
    return Pipeline(vision=VisionConfig(**values))


def test_settings_that_are_not_given_come_from_the_checkpoint(trained: Path) -> None:
    resolved = resolve(read_checkpoint(trained), NOTHING, key="score.checkpoint")

    assert resolved.pipeline == STORED
    assert (resolved.calibration, resolved.reason.partition(";")[0]) == (None, "the checkpoint has no calibration.json")


def test_an_explicit_setting_wins_even_if_it_equals_the_default(trained: Path) -> None:
    resolved = resolve(read_checkpoint(trained), with_vision(detector="mtcnn"), key="score.checkpoint")

    assert resolved.pipeline == STORED.model_copy(update={"vision": VisionConfig(detector="mtcnn", max_side_px=900)})


def test_conflicting_settings_are_rejected_with_their_origins(trained: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(read_checkpoint(trained), with_vision(small_faces=True), key="score.checkpoint")

    assert str(refused.value) == (
        "score.checkpoint: vision.small_faces = True can't be combined with the checkpoint's other vision settings: "
        "max_side_px = 900 has no effect with small_faces; give only one of them. Override the checkpoint's "
        "setting, too"
    )
    given = with_vision(small_faces=True, max_side_px=1280)
    resolved = resolve(read_checkpoint(trained), given, key="score.checkpoint")
    assert resolved.pipeline.vision == VisionConfig(detector="haar", small_faces=True)


def test_a_calibrated_checkpoint_has_the_settings_of_its_calibration(trained: Path) -> None:
    calibrate(trained, with_vision(detector="haar", min_face_px=60))

    resolved = resolve(read_checkpoint(trained), NOTHING, key="score.checkpoint")

    assert resolved.pipeline == with_vision(detector="haar", min_face_px=60)
    assert resolved.calibration is not None
    assert resolved.reason == ""


def test_settings_that_the_calibration_depends_on_cannot_be_overridden(trained: Path) -> None:
    calibrate(trained, STORED)

    with pytest.raises(ConfigError) as refused:
        resolve(read_checkpoint(trained), with_vision(detector="mtcnn"), key="score.checkpoint")

    assert str(refused.value) == (
        "score.checkpoint: vision.detector = mtcnn, but the checkpoint was calibrated with haar, and it decides which "
        "faces are found and how they are aligned; leave it out, calibrate again with agr-ray evaluate --calibrate, or "
        "give --allow-uncalibrated to do without intervals and abstention"
    )
    with pytest.raises(ConfigError, match=r"predict\.flip_average = False, but .* was calibrated with True"):
        resolve(read_checkpoint(trained), Pipeline(predict=PredictConfig(flip_average=False)), key="score.checkpoint")


def test_an_allowed_override_discards_the_calibration(trained: Path) -> None:
    calibrate(trained, STORED)

    given = with_vision(detector="mtcnn")
    resolved = resolve(read_checkpoint(trained), given, key="score.checkpoint", allow_uncalibrated=True)

    assert resolved.pipeline.vision == VisionConfig(detector="mtcnn", max_side_px=900)
    assert resolved.calibration is None
    assert resolved.reason == "vision.detector = mtcnn, but the checkpoint was calibrated with haar"


@pytest.mark.parametrize("given", [{"detector": "haar", "max_side_px": 900}, {"max_mib": 1}, {"max_pixels": 1000}])
def test_equal_values_and_limits_of_files_keep_the_calibration(trained: Path, given: dict[str, Any]) -> None:
    calibrate(trained, STORED)

    resolved = resolve(read_checkpoint(trained), with_vision(**given), key="score.checkpoint")

    assert resolved.calibration is not None
    assert resolved.pipeline.vision == STORED.vision.model_copy(update=given)


def test_calibrating_again_starts_from_the_settings_of_training(trained: Path) -> None:
    calibrate(trained, NOTHING)

    resolved = resolve(read_checkpoint(trained), NOTHING, key="evaluate.checkpoint", recalibrate=True)

    assert (resolved.pipeline, resolved.calibration) == (STORED, None)


def test_the_calibration_of_another_model_is_not_used(trained: Path) -> None:
    calibrate(trained, NOTHING, digest="another")

    resolved = resolve(read_checkpoint(trained), NOTHING, key="score.checkpoint")

    assert (resolved.pipeline, resolved.calibration) == (STORED, None)
    assert "belongs to another model" in resolved.reason


def test_every_setting_is_classified_as_decisive_or_not() -> None:
    fields = {f"vision.{name}" for name in VisionConfig.model_fields}
    fields |= {f"predict.{name}" for name in PredictConfig.model_fields}

    assert fields - set(DECISIVE) == {"vision.max_pixels", "vision.max_mib"}
    assert set(DECISIVE) <= fields


@pytest.mark.parametrize("job", [ScoreJob, EvaluateJob])
@pytest.mark.parametrize(("argv", "expected"), [((), False), (("--allow-uncalibrated",), True)])
def test_the_allow_uncalibrated_flag(job: Any, argv: tuple[str, ...], expected: bool) -> None:
    section = "score" if job is ScoreJob else "evaluate"
    needed = [word for name in NEEDED[job] for word in (f"--{section}.{name}", "x")]
    assert getattr(parse(job, (*needed, *argv), {}), section).allow_uncalibrated is expected


def test_only_given_settings_are_explicit() -> None:
    needed = [word for name in NEEDED[ScoreJob] for word in (f"--score.{name}", "x")]
    recipe = b"[vision]\nmin_face_px = 40\n"
    argv = [*needed, "--config", "x.toml", "--vision.detector", "mtcnn"]
    job = parse(ScoreJob, argv, {"AGR_RAY_VISION__MIN_SCORE": "0.95"}, lambda *_: recipe)

    assert job.vision == VisionConfig()
    assert job.vision.model_fields_set == {"min_face_px", "detector", "min_score"}
    assert job.predict.model_fields_set == set()

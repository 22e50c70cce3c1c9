"""Scoring warns if the calibration was fitted on training images."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from test_jobs_errors import saved_checkpoint

from agr_ray.config import ScoreJob
from agr_ray.console import make_console
from agr_ray.evaluation.calibration import Calibration
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.checkpoint import model_digest, read_checkpoint
from agr_ray.scoring.loaded_model import read_model


def calibration(folder: Path, num_seen: int | None) -> Calibration:
    rng = np.random.default_rng(0)
    age = rng.uniform(1, 90, 60).astype(np.float32)
    return Calibration.fit(
        Labels(UTKFACE, age, np.full(60, -1), np.full(60, -1)),
        {"age": age + rng.normal(0, 5, 60).astype(np.float32)},
        coverage=0.9,
        risk=0.05,
        model_digest=model_digest(folder),
        num_seen_in_training=num_seen,
    )


@pytest.mark.parametrize(
    ("num_seen", "said"),
    [
        (0, ""),
        (1, "warning: the model was trained on 1 of the 60 images that its calibration was fitted on"),
        (60, "warning: the model was trained on 60 of the 60 images that its calibration was fitted on"),
        (None, "warning: unknown whether training saw the 60 images that the calibration was fitted on"),
    ],
)
def test_scoring_warns_about_a_calibration_on_training_images(tmp_path: Path, num_seen: int | None, said: str) -> None:
    folder = saved_checkpoint(tmp_path / "checkpoint")
    fitted = calibration(folder, num_seen)
    (folder / "calibration.json").write_text(json.dumps(fitted.to_json()))
    printed = StringIO()

    model = read_model(read_checkpoint(folder), ScoreJob(), make_console(printed))

    assert model.calibration is not None
    assert model.calibration.num_seen_in_training == num_seen
    warnings = [line for line in printed.getvalue().splitlines() if "calibration" in line]
    assert len(warnings) == bool(said)
    assert all(line.startswith(said) for line in warnings)

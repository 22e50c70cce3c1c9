"""The model of a scoring run, with its settings and calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from agr_ray.config import ScoreJob
from agr_ray.config.pipeline import Pipeline
from agr_ray.errors import ConfigError
from agr_ray.evaluation.calibration import Calibration
from agr_ray.labels import LabelSpace
from agr_ray.models.checkpoint import model_digest, read_meta
from agr_ray.models.checkpoint_files import portable_checkpoint
from agr_ray.models.transform import Transform
from agr_ray.predict.resolve import resolve


@dataclass(frozen=True)
class Model:
    """A checkpoint with its effective settings and calibration."""

    checkpoint: Mapping[str, bytes]
    digest: str
    tasks: tuple[str, ...]
    space: LabelSpace
    transform: Transform
    pipeline: Pipeline
    """The effective settings."""
    calibration: Calibration | None
    uncalibrated_because: str
    calibration_digest: str


def load_model(directory: Path, job: ScoreJob, console: Console) -> Model:
    """Load the model, and warn if it does not fit the job well."""
    meta = read_meta(directory)
    pipeline, calibration, reason = resolve(
        directory,
        Pipeline(vision=job.vision, predict=job.predict),
        key="score.checkpoint",
        allow_uncalibrated=job.score.allow_uncalibrated,
    )
    if pipeline.vision.detector == "none":
        raise ConfigError("vision.detector 'none' detects no faces; scoring allows: mtcnn, haar")
    if meta["vision"]["detector"] != pipeline.vision.detector:
        trained, chosen = meta["vision"]["detector"], pipeline.vision.detector
        console.print(f"warning: the model was trained on crops found by {trained}, but scoring uses {chosen}")
    if calibration is None:
        console.print(f"warning: uncalibrated: no age_low and age_high, no abstention, no corrected shares: {reason}")
    elif calibration.overlap_warning:
        console.print(f"warning: {calibration.overlap_warning}")
    return Model(
        checkpoint=portable_checkpoint(directory),
        digest=model_digest(directory),
        tasks=tuple(meta["model"]["tasks"]),
        space=LabelSpace.from_json(meta["label_space"]),
        transform=Transform.from_json(meta["transform"]),
        pipeline=pipeline,
        calibration=calibration,
        uncalibrated_because=reason,
        calibration_digest="" if calibration is None else short_digest(calibration.to_json()),
    )


def short_digest(value: Any) -> str:
    """Return the first hex digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]

"""The model of a scoring run: the files of a checkpoint, and its effective settings and calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from agr_ray.config import ScoreConfig, ScoreJob
from agr_ray.config.pipeline import Pipeline
from agr_ray.errors import ConfigError
from agr_ray.evaluation.calibration import Calibration
from agr_ray.labels import LabelSpace
from agr_ray.models.checkpoint import CARD, Checkpoint
from agr_ray.models.checkpoint_files import portable_checkpoint
from agr_ray.models.transform import Transform
from agr_ray.predict.resolve import resolve
from agr_ray.schema import ATTRIBUTES
from agr_ray.vision.detect import CASCADES, check_detector


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint's files, from which each worker builds the network, with its effective settings and calibration."""

    checkpoint: Mapping[str, bytes]
    digest: str
    meta: Mapping[str, Any]
    """Contents of meta.json."""
    card: str
    """The model card; empty: the checkpoint has none."""
    tasks: tuple[str, ...]
    space: LabelSpace
    transform: Transform
    pipeline: Pipeline
    """The effective settings."""
    calibration: Calibration | None
    uncalibrated_because: str
    calibration_digest: str


def read_model(checkpoint: Checkpoint, job: ScoreJob, console: Console) -> ModelFiles:
    """Return the model of a run, and print warnings if its settings or its calibration are doubtful.

    Raises:
        ConfigError: a setting is refused, as by `resolve`, or no faces would be detected.
    """
    pipeline, calibration, reason = resolve(
        checkpoint,
        Pipeline(vision=job.vision, predict=job.predict),
        key="score.checkpoint",
        on_gpu=job.score.use_gpu,
        allow_uncalibrated=job.score.allow_uncalibrated,
    )
    for warning in filter(None, (checkpoint.untrained, checkpoint.rendered)):
        console.print(f"warning: score.checkpoint {job.score.checkpoint}: {warning}")
    trained, chosen = checkpoint.pipeline.vision.detector, pipeline.vision.detector
    check_detector(chosen)
    if chosen == "none":
        if calibration is None:
            remedy = "give --vision.detector mtcnn (or haar)"
        else:
            remedy = (
                "calibrate it again with agr-ray evaluate --calibrate on a set prepared with mtcnn or haar, or give "
                "--vision.detector mtcnn --allow-uncalibrated to do without intervals and abstention"
            )
        raise ConfigError(
            f"score.checkpoint {job.score.checkpoint}: vision.detector is none, for whole chips, and finds no faces "
            f"in photographs; {remedy}"
        )
    if trained != chosen and not {trained, chosen} <= {*CASCADES}:
        console.print(f"warning: the model was trained on crops found by {trained}, but scoring uses {chosen}")
    if calibration is None:
        console.print(f"warning: no age intervals, no abstention, no corrected shares: {reason}")
    elif calibration.overlap_warning:
        console.print(f"warning: {calibration.overlap_warning}")
    card = checkpoint.directory / CARD
    return ModelFiles(
        checkpoint=portable_checkpoint(checkpoint.directory, is_int8=pipeline.predict.precision == "int8"),
        digest=checkpoint.digest,
        meta=checkpoint.meta,
        card=card.read_text(encoding="utf-8") if card.exists() else "",
        tasks=checkpoint.tasks,
        space=checkpoint.space,
        transform=checkpoint.transform,
        pipeline=pipeline,
        calibration=calibration,
        uncalibrated_because=reason,
        calibration_digest="" if calibration is None else short_digest(calibration.to_json()),
    )


def written_attributes(config: ScoreConfig, tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the attributes to write, in the schema's order: the configured ones that the checkpoint predicts.

    Raises:
        ConfigError: the checkpoint does not predict one that is explicitly configured.
    """
    missing = [name for name in config.attributes if name not in tasks]
    if missing and "attributes" in config.model_fields_set:
        raise ConfigError(
            f"score.attributes {', '.join(missing)}: the checkpoint {config.checkpoint} does not predict it; allowed: "
            f"{', '.join(tasks)}"
        )
    return tuple(name for name in ATTRIBUTES if name in config.attributes and name in tasks)


def short_digest(value: Any) -> str:
    """Return the first 12 hex digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]

"""Determine the settings and calibration to use a checkpoint with, given a user's explicit settings."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from agr_ray.config import Section
from agr_ray.config.pipeline import DECISIVE, Pipeline
from agr_ray.errors import ConfigError
from agr_ray.evaluation.calibration import Calibration
from agr_ray.models.checkpoint import (
    CALIBRATION,
    CheckpointError,
    model_digest,
    read_calibration_json,
    read_meta,
    stored_pipeline,
)


class Resolved(NamedTuple):
    """The effective settings, and the calibration that is valid under them."""

    pipeline: Pipeline
    calibration: Calibration | None
    reason: str
    """Why there is no calibration; empty if there is one."""


def resolve(
    directory: Path, given: Pipeline, *, key: str, allow_uncalibrated: bool = False, recalibrate: bool = False
) -> Resolved:
    """Return a checkpoint's settings (those of its calibration, else of its training), overridden by the explicit ones.

    Args:
        directory: a local checkpoint.
        given: the user's settings. Only the fields in each section's `model_fields_set` count.
        key: configuration key that names the checkpoint; errors begin with it.
        allow_uncalibrated: whether settings that the calibration depends on may be overridden, which discards it.
        recalibrate: ignore the calibration that the checkpoint has, because another will take its place.

    Raises:
        ConfigError: calibration.json is damaged, an explicit setting can't be combined with a stored one, or one that
            the calibration depends on is overridden and `allow_uncalibrated` is False.
    """
    try:
        stored = stored_pipeline(directory, read_meta(directory))
        calibration, reason = (None, "") if recalibrate else _read_calibration(directory)
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from None
    if calibration is None:
        return Resolved(overridden(stored, given, key), None, reason)
    pipeline = overridden(calibration.pipeline, given, key)
    before, after = calibration.pipeline.decisive(), pipeline.decisive()
    changed = next((name for name in DECISIVE if before[name] != after[name]), None)
    if changed is None:
        return Resolved(pipeline, calibration, "")
    reason = f"{changed} = {after[changed]}, but the checkpoint was calibrated with {before[changed]}"
    if not allow_uncalibrated:
        raise ConfigError(
            f"{key}: {reason}, and {DECISIVE[changed]}; leave it out, calibrate again with "
            "jobs/evaluate.py --calibrate, or give --allow-uncalibrated to do without intervals and abstention"
        )
    return Resolved(pipeline, None, reason)


def overridden(stored: Pipeline, given: Pipeline, key: str) -> Pipeline:
    """Return the stored settings with the explicit fields of `given` in their place.

    Raises:
        ConfigError: the two can't be combined.
    """
    sections: dict[str, Section] = {}
    for name in Pipeline.model_fields:
        section: Section = getattr(given, name)
        values = getattr(stored, name).model_dump() | {
            field: getattr(section, field) for field in section.model_fields_set
        }
        try:
            sections[name] = type(section)(**values)
        except ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{key}: its {name} settings, with explicit ones applied: {said}") from None
    return Pipeline(**sections)


def _read_calibration(directory: Path) -> tuple[Calibration | None, str]:
    """Return the checkpoint's calibration, or None and why there is none that can be used.

    Raises:
        CheckpointError: calibration.json is damaged or has another format.
    """
    values = read_calibration_json(directory)
    if values is None:
        how = "jobs/evaluate.py --evaluate.split val --calibrate writes it"
        return None, f"the checkpoint has no {CALIBRATION}; {how}"
    try:
        calibration = Calibration.from_json(values)
    except ValueError as error:
        raise CheckpointError(f"{CALIBRATION}: {error}") from None
    if calibration.model_digest != model_digest(directory):
        return None, f"the checkpoint's {CALIBRATION} belongs to another model; calibrate again"
    return calibration, ""

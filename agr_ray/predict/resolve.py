"""Determine the settings and the calibration with which to use a checkpoint, given the user's explicit settings."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError

from agr_ray.config import Section
from agr_ray.config.pipeline import DECISIVE, Pipeline
from agr_ray.config.section import first_message
from agr_ray.errors import ConfigError
from agr_ray.evaluation.calibration import Calibration
from agr_ray.models.checkpoint import CALIBRATION, Checkpoint, CheckpointError, read_calibration_json
from agr_ray.models.int8 import check_int8


class Resolved(NamedTuple):
    """The effective settings, and the calibration that is valid under them."""

    pipeline: Pipeline
    calibration: Calibration | None
    reason: str
    """Why there is no calibration; empty if there is one."""


def resolve(
    checkpoint: Checkpoint,
    given: Pipeline,
    *,
    key: str,
    on_gpu: bool = False,
    allow_uncalibrated: bool = False,
    recalibrate: bool = False,
) -> Resolved:
    """Return a checkpoint's settings (those of its calibration, else of its training), overridden by the explicit ones.

    Args:
        checkpoint: gives the settings and calibration.json.
        given: the user's settings. Only the fields in each section's `model_fields_set` count.
        key: configuration key that names the checkpoint; errors begin with it.
        on_gpu: whether the network will run on a GPU.
        allow_uncalibrated: whether settings that the calibration depends on may be overridden, which discards it.
        recalibrate: ignore the checkpoint's calibration, because it will be replaced.

    Raises:
        ConfigError: calibration.json is damaged, an explicit setting can't be combined with a stored one, or one that
            the calibration depends on is overridden and `allow_uncalibrated` is False; or int8 is not possible.
    """
    resolved = _resolve(checkpoint, given, key, allow_uncalibrated, recalibrate)
    if resolved.pipeline.predict.precision == "int8":
        if on_gpu:
            raise ConfigError(
                f"{key}: predict.precision int8 is for CPUs; leave out use_gpu, or the checkpoint of before quantize"
            )
        check_int8(checkpoint.int8, key)
    return resolved


def _resolve(
    checkpoint: Checkpoint, given: Pipeline, key: str, allow_uncalibrated: bool, recalibrate: bool
) -> Resolved:
    """Return the settings and the calibration, without a check of whether they are possible here."""
    try:
        calibration, reason = (None, "") if recalibrate else _read_calibration(checkpoint)
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from None
    if calibration is None:
        return Resolved(overridden(checkpoint.pipeline, given, key), None, reason)
    pipeline = overridden(calibration.pipeline, given, key)
    before, after = calibration.pipeline.decisive(), pipeline.decisive()
    changed = next((name for name in DECISIVE if before[name] != after[name]), None)
    if changed is None:
        return Resolved(pipeline, calibration, "")
    reason = f"{changed} = {after[changed]}, but the checkpoint was calibrated with {before[changed]}"
    if not allow_uncalibrated:
        raise ConfigError(
            f"{key}: {reason}, and {DECISIVE[changed]}; leave it out, calibrate again with "
            "agr-ray evaluate --calibrate, or give --allow-uncalibrated to do without intervals and abstention"
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
        explicit = {field: getattr(section, field) for field in sorted(section.model_fields_set)}
        try:
            sections[name] = type(section)(**getattr(stored, name).model_dump() | explicit)
        except ValidationError as error:
            conflict = first_message(error)
            settings = ", ".join(f"{name}.{field} = {value}" for field, value in explicit.items())
            raise ConfigError(
                f"{key}: {settings} can't be combined with the checkpoint's other {name} settings: {conflict}. "
                "Override the checkpoint's setting, too"
            ) from None
    return Pipeline(**sections)


def _read_calibration(checkpoint: Checkpoint) -> tuple[Calibration | None, str]:
    """Return the checkpoint's calibration, or None and the reason why it has none that can be used.

    Raises:
        CheckpointError: calibration.json is damaged or has another format.
    """
    values = read_calibration_json(checkpoint.directory)
    if values is None:
        how = "agr-ray evaluate --split val --calibrate writes it"
        return None, f"the checkpoint has no {CALIBRATION}; {how}"
    try:
        calibration = Calibration.from_json(values)
    except ValueError as error:
        raise CheckpointError(f"{CALIBRATION}: {error}") from None
    if calibration.model_digest != checkpoint.digest:
        return None, f"the checkpoint's {CALIBRATION} belongs to another model; calibrate again"
    return calibration, ""

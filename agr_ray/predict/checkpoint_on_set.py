"""Whether and how a checkpoint can be measured on a prepared set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agr_ray.config import EvaluateConfig
from agr_ray.data.prepared import PreparedSet
from agr_ray.errors import ConfigError
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import LabelSpace, race_mapping
from agr_ray.models.checkpoint import Checkpoint
from agr_ray.models.transform import Transform


def check_compatible(transform: Transform, prepared: PreparedSet, checkpoint: str, name: str) -> None:
    """Check that the crops of a set fit a checkpoint's transform.

    Args:
        transform: of the checkpoint.
        prepared: the set.
        checkpoint: its path or URI, for the message.
        name: of the setting that names the set.

    Raises:
        ConfigError: their side or their alignment template differs.
    """
    for key, needed, found in (
        ("crop_side_px", transform.crop_side_px, prepared.crop_side_px),
        ("template", transform.template, prepared.settings["template"]),
    ):
        if needed != found:
            raise ConfigError(
                f"{name} {prepared.uri}: its crops have {key} {found}; the checkpoint {checkpoint} "
                f"needs {needed}: prepare the source again with that"
            )


def mapped_labels(checkpoint: Checkpoint, prepared: PreparedSet) -> tuple[LabelSpace, dict[str, str]]:
    """Return the label space to measure in, and the race in it for each race of the data.

    Races are the checkpoint's, or the data's if it has no race head; age groups are the data's, because an age in years
    has a group in any space, and an age range lies in a group of its own space.

    Raises:
        ConfigError: the data's races do not map onto the checkpoint's.
    """
    space, data = checkpoint.space, prepared.label_space
    if space == data:
        return space, race_mapping(data, space)
    measured_in = replace(space, age_groups=data.age_groups)
    if "race" not in checkpoint.tasks:
        measured_in = replace(measured_in, races=data.races)
    try:
        return measured_in, race_mapping(data, measured_in)
    except ValueError as error:
        raise ConfigError(f"evaluate.data {prepared.uri}: {error}") from None


def overlap_message(
    num_seen: int | None, num_rows: int, checkpoint: str, prepared: PreparedSet, config: EvaluateConfig
) -> str:
    """Return why the evaluation is rejected: training saw, or may have seen, some of its images."""
    problem = (
        f"evaluate.checkpoint {checkpoint}: does not say on which images it was trained"
        if num_seen is None
        else f"evaluate.split {config.split} of {prepared.uri}: the checkpoint was trained on {num_seen:,} of its "
        f"{num_rows:,} images"
    )
    return f"{problem}; --evaluate.allow_overlap true measures them anyway"


def training_baseline(meta: Mapping[str, Any], space: LabelSpace) -> Baseline | None:
    """Return the constant baseline fitted on the training labels; None if the checkpoint does not hold it."""
    values = meta["data"].get("baseline")
    return None if values is None else Baseline.from_json(values, space)

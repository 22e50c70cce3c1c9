"""Count evaluation images that the checkpoint was trained or calibrated on, by their content."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import pyarrow as pa

from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint import (
    TRAIN_STATE,
    CheckpointError,
    content_codes,
    load_train_state,
)


def num_seen_in_training(directory: Path, chosen: pa.Table) -> int | None:
    """Count the images whose content the checkpoint was trained on; None if that is unknown."""
    if not (directory / TRAIN_STATE).exists():
        return None
    try:
        state = load_train_state(directory)
    except CheckpointError as error:
        raise ConfigError(f"evaluate.checkpoint: {error}") from None
    if "train_images" not in state:
        return None
    return num_among(chosen, set(state["train_images"].tolist()))


def num_among(chosen: pa.Table, codes: Set[int]) -> int:
    """Count the images whose content has one of the `content_codes`."""
    return sum(int(content_codes([content])[0]) in codes for content in chosen["content_hash"].to_pylist())

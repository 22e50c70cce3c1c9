"""Count evaluation images that the checkpoint was trained or calibrated on, by their content."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import pyarrow as pa

from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint import TRAIN_STATE, CheckpointError, content_code
from agr_ray.models.checkpoint_network import load_train_state


def num_seen_in_training(directory: Path, chosen: pa.Table) -> int | None:
    """Count the images whose content the checkpoint was trained on; None if that is unknown."""
    codes = trained_codes(directory)
    return None if codes is None else num_among(chosen, codes)


def trained_codes(directory: Path) -> set[int] | None:
    """Return the `content_codes` of the images that a local checkpoint was trained on; None if they are unknown.

    Raises:
        ConfigError: the record of its training is damaged.
    """
    if not (directory / TRAIN_STATE).exists():
        return None
    try:
        state = load_train_state(directory)
    except CheckpointError as error:
        raise ConfigError(f"evaluate.checkpoint: {error}") from None
    return set(state["train_images"].tolist()) if "train_images" in state else None


def num_among(chosen: pa.Table, codes: Set[int]) -> int:
    """Count the images whose content has one of the `content_codes`."""
    return sum(content_code(content) in codes for content in chosen["content_hash"].to_pylist())

"""Resources that training needs: memory for crops, and logical CPUs for reading."""

from __future__ import annotations

from typing import Final

from agr_ray.config import TrainConfig
from agr_ray.models.transform import Transform
from agr_ray.vision.align import stored_side_px

MIN_VAL_BATCH: Final = 64
"""Smallest batch size of validation."""


def crop_bytes(transform: Transform) -> int:
    """Return the size of a decoded crop, bytes."""
    return 3 * stored_side_px(transform.crop_side_px, transform.margin) ** 2


def max_kept_rows(config: TrainConfig, transform: Transform) -> int:
    """Return the number of decoded crops that fit `train.cache_mib`, for training and again for validation."""
    return config.cache_mib * 2**20 // (2 * crop_bytes(transform))  # joining the batches needs their memory twice


def spare_cpus(config: TrainConfig) -> float:
    """Return the logical CPUs that Ray reserves for the tasks that read training and validation data, one each.

    0 for an elastic run: its workers may take all logical CPUs of the cluster.
    """
    return 2.0 if config.min_workers == config.max_workers else 0.0

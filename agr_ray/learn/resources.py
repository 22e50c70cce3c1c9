"""What training asks of the machines that it runs on: memory for crops, logical CPUs to read with."""

from __future__ import annotations

from typing import Final

from agr_ray.config import TrainConfig
from agr_ray.models.transform import Transform
from agr_ray.vision.align import stored_side_px

MIN_VAL_BATCH: Final = 64
"""Smallest batch of validation."""


def crop_bytes(transform: Transform) -> int:
    """Return the size of a decoded crop."""
    return 3 * stored_side_px(transform.crop_side_px, transform.margin) ** 2


def max_kept_rows(config: TrainConfig, transform: Transform) -> int:
    """Return how many decoded crops fit `train.cache_mib`: of training, and as many again of validation."""
    return config.cache_mib * 2**20 // (2 * crop_bytes(transform))  # joining the batches takes their memory twice


def spare_cpus(config: TrainConfig) -> float:
    """Return the logical CPUs that the tasks which read training and validation ask for, one each.

    The workers of an elastic run take all logical CPUs of the cluster, so reading must not ask for any.
    """
    return 2.0 if config.min_workers == config.max_workers else 0.0

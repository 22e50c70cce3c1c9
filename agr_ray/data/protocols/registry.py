"""The protocols by name."""

from __future__ import annotations

import pyarrow as pa

from agr_ray.config import CrossValidateConfig
from agr_ray.data.protocols.balanced_halves import balanced_halves
from agr_ray.data.protocols.fold import Partition
from agr_ray.data.protocols.leave_one_person_out import leave_one_person_out
from agr_ray.data.protocols.published_folds import published_folds
from agr_ray.data.protocols.random_folds import random_folds


def partitions(images: pa.Table, config: CrossValidateConfig) -> list[Partition]:
    """Divide images by the configured protocol.

    Args:
        images: rows of schema.MANIFEST with a group, in the order of their ids.
        config: protocol, number of folds and seed.

    Raises:
        ProtocolError: they can't be divided.
    """
    if config.protocol == "published_folds":
        return published_folds(images)
    if config.protocol == "leave_one_person_out":
        return leave_one_person_out(images)
    if config.protocol == "balanced_halves":
        return balanced_halves(images, config.seed)
    return random_folds(images, config.folds, config.seed)

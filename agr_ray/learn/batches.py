"""Batches of training and validation: rows as arrays, and their labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from agr_ray.learn.losses import Heads
from agr_ray.models.heads.base import Targets

Batch: TypeAlias = Mapping[str, Any]
"""crop (n, stored, stored, 3) uint8, and label arrays, (n,) each: age, age_low and age_high float32, gender and race
int64; NumPy arrays or CPU tensors. If a label array is absent, no row has that label.

Optional: pose, (n, 3) float32, yaw, pitch and roll, degrees, NaN if unknown; image_id, (n,) strings, which the error
about a non-finite loss names; set_index, (n,) int64, the prepared set of each row, by which a sampler may draw."""


def num_rows(batch: Batch | None) -> int:
    """Return the number of rows; 0 for None."""
    return 0 if batch is None else len(batch["crop"])


def batches_of(arrays: Batch, order: NDArray[np.int64], sizes: Iterator[int]) -> Iterator[Batch]:
    """Yield batches of the rows with the indices `order`, of the given sizes; the last batch may be smaller."""
    while len(order):
        size = next(sizes)
        chosen, order = order[:size], order[size:]
        yield {name: values[chosen] for name, values in arrays.items()}


def next_batch(batches: Iterator[Batch]) -> Batch | None:
    """Return the next batch that has rows; None: there is none left."""
    return next((batch for batch in batches if num_rows(batch)), None)


def image_ids(batch: Batch | None) -> list[str]:
    """Return the image ids of a batch's rows; empty if the batch has no such column."""
    return [] if batch is None else [str(each) for each in batch.get("image_id", ())]


def targets_of(heads: Heads, batch: Batch | None) -> Targets:
    """Return copies of the label arrays that the heads learn from, on the CPU; for None, arrays without rows."""
    labels: Batch = {} if batch is None else batch
    return {k: v for head in heads.values() for k, v in head.targets(labels, num_rows(batch)).items()}


def missing_targets(heads: Heads) -> Targets:
    """Return the targets of one row without any label, on the CPU."""
    return {k: v for head in heads.values() for k, v in head.missing_targets(1).items()}


def to_device(targets: Targets, device: torch.device) -> Targets:
    """Return the targets on a device."""
    return {name: values.to(device, non_blocking=True) for name, values in targets.items()}

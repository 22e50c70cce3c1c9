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
int64; arrays or CPU tensors. A label array that is not there has no label.

Where there is an image_id, (n,) words, an error names the rows of a non-finite loss. Where there is a set_index, (n,)
int64, a sampler may draw by it: the prepared set that a row is from."""


def num_rows(batch: Batch | None) -> int:
    """Return the number of rows; 0 without a batch."""
    return 0 if batch is None else len(batch["crop"])


def batches_of(arrays: Batch, order: NDArray[np.int64], sizes: Iterator[int]) -> Iterator[Batch]:
    """Iterate over rows in the order of these indices, so many at a time; the last batch may have fewer."""
    while len(order):
        size = next(sizes)
        chosen, order = order[:size], order[size:]
        yield {name: values[chosen] for name, values in arrays.items()}


def next_batch(batches: Iterator[Batch]) -> Batch | None:
    """Return the next batch that has rows; none: there is none left."""
    return next((batch for batch in batches if num_rows(batch)), None)


def image_ids(batch: Batch | None) -> list[str]:
    """Return the ids of a batch's rows; none where it has no such column."""
    return [] if batch is None else [str(each) for each in batch.get("image_id", ())]


def targets_of(heads: Heads, batch: Batch | None) -> Targets:
    """Return copies of the label arrays that the heads learn from, on the CPU; of no batch, of no rows."""
    labels: Batch = {} if batch is None else batch
    return {k: v for head in heads.values() for k, v in head.targets(labels, num_rows(batch)).items()}


def missing_targets(heads: Heads) -> Targets:
    """Return the targets of one row without any label, on the CPU."""
    return {k: v for head in heads.values() for k, v in head.missing_targets(1).items()}


def to_device(targets: Targets, device: torch.device) -> Targets:
    """Return the targets on a device."""
    return {name: values.to(device, non_blocking=True) for name, values in targets.items()}

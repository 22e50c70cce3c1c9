"""A training worker's batches: its share of the crops, streamed once and then kept in memory where it fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from ray.data import DataIterator

from agr_ray.config import TrainConfig
from agr_ray.learn.loop import Batch, batches_of, labels_of
from agr_ray.learn.sampling import Sampler
from agr_ray.models.network import Transform
from agr_ray.runtime.prefetch import prefetch
from agr_ray.vision.align import crop_side_px

NUM_AHEAD: Final = 2
"""Batches that wait for the device."""


def crop_bytes(transform: Transform) -> int:
    """Return the size of a decoded crop."""
    return 3 * crop_side_px(transform.crop_side_px, transform.margin) ** 2


def max_kept_rows(config: TrainConfig, transform: Transform) -> int:
    """Return how many decoded crops fit `train.cache_mib`: of training, and as many again of validation."""
    return config.cache_mib * 2**20 // (2 * crop_bytes(transform))  # joining the batches takes their memory twice


class ShardBatches:
    """The batches of one worker's share: streamed once, then from memory where that is allowed.

    The next ones are made while the device computes. For a GPU, crops lie in pinned memory, as tensors.

    Args:
        shard: yields the rows of `crops.training_dataset`.
        batch_size: rows in a batch; the last one of an epoch may have fewer.
        keep: whether the share is kept, decoded; the same in all workers.
        shuffle_rows: rows in the shuffle buffer while streaming; 0: rows come in their order, always.
        seed: of the shuffling, together with the epoch.
        sampler: draws the rows of an epoch from memory; none: each comes once.
        device: where batches will go.
    """

    def __init__(
        self,
        shard: DataIterator,
        batch_size: int,
        *,
        keep: bool,
        shuffle_rows: int = 0,
        seed: tuple[int, ...] = (),
        sampler: Sampler | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._shard = shard
        self._batch_size = batch_size
        self._keep = keep
        self._shuffle_rows = shuffle_rows
        self._seed = seed
        self._sampler = sampler
        self._device = device
        self._rows: dict[str, NDArray[Any]] | None = None

    def epoch(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        """Iterate over the share once, in an order of its own where some steps of the epoch are done."""
        rng = np.random.default_rng([*self._seed, epoch, steps_done])
        batches = self._stream(rng) if self._rows is None else self._from_memory(self._rows, rng)
        if self._device is not None and self._device.type == "cuda":
            batches = _pinned(batches, self._device)
        return prefetch(batches, NUM_AHEAD)

    def _from_memory(self, rows: dict[str, NDArray[Any]], rng: np.random.Generator) -> Iterator[Batch]:
        num_rows = len(rows["age"]) if rows else 0
        if num_rows and self._sampler is not None:
            order = self._sampler.draw(labels_of(rows), rng, rows.get("set_index"))
        else:
            order = rng.permutation(num_rows) if self._shuffle_rows else np.arange(num_rows)
        return batches_of(rows, order, self._batch_size)

    def _stream(self, rng: np.random.Generator) -> Iterator[Batch]:
        kept: list[dict[str, NDArray[Any]]] = []
        for batch in self._shard.iter_batches(
            batch_size=self._batch_size,
            local_shuffle_buffer_size=self._shuffle_rows or None,
            local_shuffle_seed=int(rng.integers(2**31)) if self._shuffle_rows else None,
        ):
            # A copy: what comes from the object store can't be written to, and kept it would hold its blocks there.
            copied = {name: np.array(values) for name, values in batch.items()}
            if self._keep:
                kept.append(copied)
            yield copied
        if self._keep:
            names = kept[0] if kept else {}  # a share may be empty
            self._rows = {name: np.concatenate([batch[name] for batch in kept]) for name in names}


def _pinned(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Put crops where the device can fetch them from while it computes."""
    for batch in batches:
        with torch.cuda.device(device):  # in a thread, which would else take up with the first GPU
            crops = torch.from_numpy(batch["crop"]).pin_memory()
        yield {**batch, "crop": crops}

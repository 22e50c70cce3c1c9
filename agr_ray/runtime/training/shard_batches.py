"""A training worker's batches: its share of the crops, streamed once and then kept in memory if it fits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from ray.data import DataIterator

from agr_ray.labels import Labels
from agr_ray.learn.batches import Batch, batches_of
from agr_ray.learn.prefetch import prefetch
from agr_ray.learn.sampling import Sampler

NUM_AHEAD: Final = 2
"""Number of batches prepared ahead of the device."""


def share_sizes(batch_size: int, rank: int, world_size: int) -> Iterator[int]:
    """Yield one worker's number of images for each step of an epoch.

    In every step, the numbers of all workers add up to `batch_size`. Over `world_size` steps, all workers take the same
    number, so that workers with equal shares run out of images together.
    """
    whole, over = divmod(batch_size, world_size)
    for step in count():
        yield whole + ((rank - step * over) % world_size < over)


class ShardBatches:
    """The batches of one worker's share: streamed once, then from memory if that is allowed.

    The next batches are made while the device computes. For a GPU, crops are tensors in pinned memory.

    Args:
        shard: yields the rows of `crop_stream.training_dataset`.
        batch_size: rows in a batch of all workers; the last one of an epoch may have fewer.
        keep: whether the share is kept, decoded; the same in all workers.
        shuffle_rows: rows in the shuffle buffer while streaming; 0: rows always come in their order.
        seed: seed of the shuffling, combined with the epoch.
        sampler: draws the rows of an epoch from memory; None: each row comes once.
        device: device that the batches are for.
        rank: rank of this worker among `world_size`.
        world_size: workers that share a batch.
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
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._shard = shard
        self._share = (batch_size, rank, world_size)
        self._keep = keep
        self._shuffle_rows = shuffle_rows
        self._seed = seed
        self._sampler = sampler
        self._device = device
        self._rows: dict[str, NDArray[Any]] | None = None

    def epoch(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        """Iterate over the share once; after a resume within the epoch, in another order."""
        rng = np.random.default_rng([*self._seed, epoch, steps_done])
        sizes = share_sizes(*self._share)
        batches = self._stream(rng, sizes) if self._rows is None else self._from_memory(self._rows, rng, sizes)
        if self._device is not None and self._device.type == "cuda":
            batches = _pinned(batches, self._device)
        return prefetch(batches, NUM_AHEAD)

    def _from_memory(
        self, rows: dict[str, NDArray[Any]], rng: np.random.Generator, sizes: Iterator[int]
    ) -> Iterator[Batch]:
        num_rows = len(rows["age"]) if rows else 0
        if num_rows and self._sampler is not None:
            order = self._sampler.draw(Labels.from_arrays(self._sampler.space, rows), rng, rows.get("set_index"))
        else:
            order = rng.permutation(num_rows) if self._shuffle_rows else np.arange(num_rows)
        return batches_of(rows, order, sizes)

    def _stream(self, rng: np.random.Generator, sizes: Iterator[int]) -> Iterator[Batch]:
        kept: list[dict[str, NDArray[Any]]] = []
        batch_size, _, world_size = self._share
        batches = self._shard.iter_batches(
            batch_size=-(-batch_size // world_size),
            local_shuffle_buffer_size=self._shuffle_rows or None,
            local_shuffle_seed=int(rng.integers(2**31)) if self._shuffle_rows else None,
        )

        def copies() -> Iterator[dict[str, NDArray[Any]]]:
            for batch in batches:
                # Arrays from the object store are read-only, and would keep its blocks there.
                copied = {name: np.array(values) for name, values in batch.items()}
                if self._keep:
                    kept.append(copied)
                yield copied

        yield from _recut(copies(), sizes)
        if self._keep:
            self._rows = _joined(kept)


def _recut(batches: Iterator[dict[str, NDArray[Any]]], sizes: Iterator[int]) -> Iterator[Batch]:
    """Cut batches of any size into batches of the given sizes; the last one may be smaller."""
    held: list[dict[str, NDArray[Any]]] = []
    size = next(sizes)
    for batch in batches:
        held.append(batch)
        while sum(len(each["age"]) for each in held) >= size:
            rows = _joined(held)
            yield {name: values[:size] for name, values in rows.items()}
            held = [{name: values[size:] for name, values in rows.items()}]
            size = next(sizes)
    rows = _joined(held)
    if rows and len(rows["age"]):
        yield rows


def _joined(batches: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Return the rows of all batches; no columns if there are no batches."""
    if len(batches) == 1:
        return batches[0]
    return {name: np.concatenate([each[name] for each in batches]) for name in (batches[0] if batches else {})}


def _pinned(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Pin crops in memory, so that the device can copy them while it computes."""
    for batch in batches:
        with torch.cuda.device(device):  # in a thread, which would otherwise use the first GPU
            crops = torch.from_numpy(batch["crop"]).pin_memory()
        yield {**batch, "crop": crops}

"""A training worker's batches: streamed first, then drawn from memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from agr_ray.learn.metrics import Labels
from agr_ray.learn.sampling import Sampler
from agr_ray.runtime.train import ShardBatches

NUM = 600


class Shard:
    """What `ShardBatches` needs of a Ray Data iterator."""

    def iter_batches(self, batch_size: int, **_: Any) -> Iterator[dict[str, Any]]:
        rows = rows_of(NUM)
        for first in range(0, NUM, batch_size):
            yield {name: values[first : first + batch_size] for name, values in rows.items()}


def rows_of(num: int) -> dict[str, Any]:
    gender = np.arange(num) % 10 // 9  # one in ten is a man
    return {"age": np.arange(num, dtype=np.float32) % 100, "gender": gender, "race": np.zeros(num, np.int64)}


def men(batches: ShardBatches, epoch: int) -> tuple[int, float]:
    genders = np.concatenate([batch["gender"] for batch in batches.epoch(epoch)])
    return len(genders), float(genders.mean())


def shard_batches(sampler: Sampler | None, *, keep: bool = True) -> ShardBatches:
    return ShardBatches(Shard(), 64, keep=keep, shuffle_rows=8, seed=(0, 0), sampler=sampler)  # type: ignore[arg-type]  # all that it uses


def test_rows_are_evened_out_once_they_are_in_memory() -> None:
    sampler = Sampler.fit(Labels(**rows_of(NUM)), "gender", 1.0)
    batches = shard_batches(sampler)
    assert men(batches, 1) == (NUM, pytest.approx(0.1))
    assert men(batches, 2) == (NUM, pytest.approx(0.5, abs=0.07))
    first, again = ([batch["age"].tolist() for batch in batches.epoch(epoch)] for epoch in (3, 3))
    assert first == again != [batch["age"].tolist() for batch in batches.epoch(4)]


def test_an_epoch_gone_on_with_comes_in_another_order() -> None:
    batches = shard_batches(None)
    list(batches.epoch(1))
    first, rest = (np.concatenate([b["age"] for b in batches.epoch(2, steps_done)]) for steps_done in (0, 3))
    assert not np.array_equal(first, rest)
    assert np.array_equal(np.sort(first), np.sort(rest))


def test_without_a_sampler_each_row_comes_once() -> None:
    batches = shard_batches(None)
    for epoch in (1, 2):
        ages = np.concatenate([batch["age"] for batch in batches.epoch(epoch)])
        assert np.array_equal(np.sort(ages), np.sort(rows_of(NUM)["age"]))

"""A training worker's batches: streamed first, then drawn from memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from agr_ray.learn.loop import labels_of
from agr_ray.learn.sampling import Sampler
from agr_ray.runtime.train import ShardBatches

NUM = 600
SETS = np.arange(NUM) % 5 // 4  # one in five is of the second set


class Shard:
    """What `ShardBatches` needs of a Ray Data iterator."""

    def iter_batches(self, batch_size: int, **_: Any) -> Iterator[dict[str, Any]]:
        rows = rows_of(NUM)
        for first in range(0, NUM, batch_size):
            yield {name: values[first : first + batch_size] for name, values in rows.items()}


def rows_of(num: int) -> dict[str, Any]:
    gender = np.arange(num) % 10 // 9  # one in ten is a man
    ages, race = np.arange(num, dtype=np.float32) % 100, np.zeros(num, np.int64)
    return {"age": ages, "gender": gender, "race": race, "set_index": SETS[:num]}


def men(batches: ShardBatches, epoch: int) -> tuple[int, float]:
    genders = np.concatenate([batch["gender"] for batch in batches.epoch(epoch)])
    return len(genders), float(genders.mean())


def shard_batches(sampler: Sampler | None, *, keep: bool = True) -> ShardBatches:
    return ShardBatches(Shard(), 64, keep=keep, shuffle_rows=8, seed=(0, 0), sampler=sampler)  # type: ignore[arg-type]  # all that it uses


def test_rows_are_evened_out_once_they_are_in_memory() -> None:
    sampler = Sampler.fit(labels_of(rows_of(NUM)), "gender", 1.0)
    batches = shard_batches(sampler)
    assert men(batches, 1) == (NUM, pytest.approx(0.1))
    assert men(batches, 2) == (NUM, pytest.approx(0.5, abs=0.07))
    first, again = ([batch["age"].tolist() for batch in batches.epoch(epoch)] for epoch in (3, 3))
    assert first == again != [batch["age"].tolist() for batch in batches.epoch(4)]


def test_sets_come_at_their_shares_once_they_are_in_memory() -> None:
    batches = shard_batches(Sampler.fit(labels_of(rows_of(NUM)), "none", 1.0, SETS, [1, 1]))
    for epoch, share in ((1, 0.2), (2, 0.5), (3, 0.5)):
        drawn = np.concatenate([batch["set_index"] for batch in batches.epoch(epoch)])
        assert (len(drawn), drawn.mean()) == (NUM, pytest.approx(share, abs=0.08))


def test_without_a_sampler_each_row_comes_once() -> None:
    batches = shard_batches(None)
    for epoch in (1, 2):
        ages = np.concatenate([batch["age"] for batch in batches.epoch(epoch)])
        assert np.array_equal(np.sort(ages), np.sort(rows_of(NUM)["age"]))

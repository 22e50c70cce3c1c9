"""A training worker's batches: first streamed, then drawn from memory, prefetched in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from agr_ray.labels import UTKFACE, Labels
from agr_ray.learn.prefetch import prefetch
from agr_ray.learn.sampling import Sampler
from agr_ray.runtime.training.shard_batches import ShardBatches, share_sizes

NUM = 600
SETS = np.arange(NUM) % 5 // 4  # one in five is of the second set


class Shard:
    """The part of a Ray Data iterator that `ShardBatches` needs."""

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


def test_rows_are_balanced_once_they_are_in_memory() -> None:
    sampler = Sampler.fit(Labels.from_arrays(UTKFACE, rows_of(NUM)), "gender", 1.0)
    batches = shard_batches(sampler)
    assert men(batches, 1) == (NUM, pytest.approx(0.1))
    assert men(batches, 2) == (NUM, pytest.approx(0.5, abs=0.07))
    first, again = ([batch["age"].tolist() for batch in batches.epoch(epoch)] for epoch in (3, 3))
    assert first == again != [batch["age"].tolist() for batch in batches.epoch(4)]


def test_a_resumed_epoch_has_another_order() -> None:
    batches = shard_batches(None)
    list(batches.epoch(1))
    first, rest = (np.concatenate([b["age"] for b in batches.epoch(2, steps_done)]) for steps_done in (0, 3))
    assert not np.array_equal(first, rest)
    assert np.array_equal(np.sort(first), np.sort(rest))


def test_sets_are_drawn_by_their_shares_once_they_are_in_memory() -> None:
    batches = shard_batches(Sampler.fit(Labels.from_arrays(UTKFACE, rows_of(NUM)), "none", 1.0, SETS, [1, 1]))
    for epoch, share in ((1, 0.2), (2, 0.5), (3, 0.5)):
        drawn = np.concatenate([batch["set_index"] for batch in batches.epoch(epoch)])
        assert (len(drawn), drawn.mean()) == (NUM, pytest.approx(share, abs=0.08))


def test_without_a_sampler_each_row_is_drawn_once() -> None:
    batches = shard_batches(None)
    for epoch in (1, 2):
        ages = np.concatenate([batch["age"] for batch in batches.epoch(epoch)])
        assert np.array_equal(np.sort(ages), np.sort(rows_of(NUM)["age"]))


def test_prefetched_batches_equal_batches_made_on_demand() -> None:
    batches = shard_batches(None)
    list(batches.epoch(1))
    order = np.random.default_rng([0, 0, 2]).permutation(NUM)

    ages = [batch["age"] for batch in batches.epoch(2)]

    assert [len(each) for each in ages] == [64] * (NUM // 64) + [NUM % 64]
    assert np.array_equal(np.concatenate(ages), rows_of(NUM)["age"][order])


def test_only_the_configured_number_of_batches_is_prefetched() -> None:
    made: list[int] = []

    def counted() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    ahead = prefetch(counted(), 2)
    assert made == []
    assert next(ahead) == 0
    wait_until(lambda: len(made) == 4)  # one taken, two waiting, one in the thread's hand
    time.sleep(0.05)
    assert len(made) == 4
    assert list(ahead) == list(range(1, 10))
    assert list(ahead) == []


def test_an_error_is_raised_after_the_batches_before_it() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise ZeroDivisionError("of the source")

    ahead = prefetch(broken(), 2)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ZeroDivisionError, match="of the source"):
        next(ahead)
    wait_until(lambda: not prefetching())


def test_leaving_an_epoch_ends_its_thread() -> None:
    batches = shard_batches(None)
    list(batches.epoch(1))
    left = batches.epoch(2)
    next(left)
    assert prefetching()

    left.close()  # type: ignore[attr-defined]  # a generator

    wait_until(lambda: not prefetching())


def test_leaving_early_does_not_wait_for_a_blocked_batch() -> None:
    comes = threading.Event()

    def stalled() -> Iterator[int]:
        yield 1
        comes.wait(20)
        yield 2

    ahead = prefetch(stalled(), 2)
    assert next(ahead) == 1
    started = time.monotonic()
    ahead.close()  # type: ignore[attr-defined]  # a generator
    assert time.monotonic() - started < 5
    comes.set()
    wait_until(lambda: not prefetching())


def test_an_error_while_streaming_reaches_the_loop() -> None:
    class Broken(Shard):
        def iter_batches(self, batch_size: int, **_: Any) -> Iterator[dict[str, Any]]:
            yield next(super().iter_batches(batch_size))
            raise OSError("storage is unavailable")

    epoch = ShardBatches(Broken(), 64, keep=True).epoch(1)  # type: ignore[arg-type]  # all that it uses
    assert len(next(epoch)["age"]) == 64
    with pytest.raises(OSError, match="storage is unavailable"):
        next(epoch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_for_a_gpu_crops_are_pinned_and_the_same() -> None:
    class Crops(Shard):
        def iter_batches(self, batch_size: int, **_: Any) -> Iterator[dict[str, Any]]:
            for batch in super().iter_batches(batch_size):
                crop = np.repeat(batch["age"].astype(np.uint8), 12).reshape(-1, 2, 2, 3)
                yield {**batch, "crop": crop}

    batches = ShardBatches(Crops(), 64, keep=True, device=torch.device("cuda"))  # type: ignore[arg-type]  # all it uses
    for epoch in (1, 2):
        for batch in batches.epoch(epoch):
            assert batch["crop"].is_pinned()
            assert batch["crop"][:, 0, 0, 0].tolist() == batch["age"].tolist()


def prefetching() -> bool:
    return any(thread.name == "prefetch" for thread in threading.enumerate())


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("batch_size", "world_size"), [(32, 1), (32, 2), (32, 3), (64, 5), (10, 4)])
def test_shares_of_a_step_add_up_and_all_end_together(batch_size: int, world_size: int) -> None:
    shares = [list(islice(share_sizes(batch_size, rank, world_size), 50)) for rank in range(world_size)]

    assert {sum(step) for step in zip(*shares, strict=True)} == {batch_size}
    done = np.cumsum(shares, axis=1)
    assert np.ptp(done, axis=0).max() <= 1


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_streamed_and_cached_batches_have_the_same_sizes(rank: int) -> None:
    batches = ShardBatches(Shard(), 64, keep=True, rank=rank, world_size=3)  # type: ignore[arg-type]  # all it uses
    epochs = [[batch["age"] for batch in batches.epoch(epoch)] for epoch in (1, 2)]

    sizes = list(islice(share_sizes(64, rank, 3), len(epochs[0])))
    for epoch in epochs:
        assert [len(ages) for ages in epoch[:-1]] == sizes[:-1]
        assert 0 < len(epoch[-1]) <= sizes[-1]
    np.testing.assert_array_equal(*(np.sort(np.concatenate(epoch)) for epoch in epochs))

"""Numbered parts of work (`storage.parts`) on Ray's workers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset

from agr_ray.predict.downloads import use_one_cpu
from agr_ray.runtime.cluster import configure_ray_data

MAX_BLOCKS: Final = 4096
"""Parts that Ray Data gets at a time, one per block, so that a kill loses only one."""


class _Stored:
    """A worker with a CPU of its own, whose arguments are in the object store.

    Ray Data would copy them, networks too, several times.
    """

    def __init__(self, worker: Callable[..., Any], stored: Sequence[ray.ObjectRef[tuple[Any, ...]]]) -> None:
        use_one_cpu()
        self._worker = worker(*ray.get(stored[0]))
        gc.freeze()  # else Python traverses all that is loaded when the process ends: decision 52

    def __call__(self, batch: Any) -> Any:
        """Return what the worker makes of a batch."""
        return self._worker(batch)


def map_on_workers(
    dataset: Dataset,
    worker: Callable[..., Any],
    stored: ray.ObjectRef[tuple[Any, ...]],
    pool: ActorPoolStrategy,
    gpus_each: float,
    batch_format: str = "default",
) -> Iterator[pa.Table]:
    """Yield what actors on the connected cluster return for the rows of a dataset.

    Args:
        dataset: its rows go to the actors one at a time.
        worker: class of the actors. Each has one logical CPU.
        stored: arguments of its constructor.
        pool: of the actors.
        gpus_each: GPUs of each actor.
        batch_format: of what the actors are called with.
    """
    results = dataset.map_batches(
        _Stored,
        fn_constructor_args=(worker, [stored]),
        batch_format=batch_format,
        batch_size=1,
        num_cpus=1,
        num_gpus=gpus_each or None,
        compute=pool,
    )
    for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(table, pa.Table)
        yield table


def run_parts(
    worker: Callable[..., Any],
    arguments: Sequence[Any],
    numbers: Sequence[int],
    pool: ActorPoolStrategy,
    gpus_each: float = 0.0,
) -> Iterator[pa.Table]:
    """Have actors on the connected cluster make parts; yield the tables that they return.

    Args:
        worker: class of the actors. Each has one logical CPU, and gets one number at a time, in the column `part`.
        arguments: of its constructor.
        numbers: of the parts.
        pool: of the actors.
        gpus_each: GPUs of each actor.
    """
    configure_ray_data()
    stored = ray.put(tuple(arguments))
    for first in range(0, len(numbers), MAX_BLOCKS):
        wave = numbers[first : first + MAX_BLOCKS]
        dataset = ray.data.from_items([{"part": number} for number in wave], override_num_blocks=len(wave))
        yield from map_on_workers(dataset, worker, stored, pool, gpus_each)

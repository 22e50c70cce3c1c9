"""Numbered parts of work (`storage.parts`) on Ray's workers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from agr_ray.runtime.cluster import configure_ray_data

MAX_BLOCKS: Final = 4096
"""Parts that Ray Data gets at a time, one per block, so that a kill loses only one."""


class _Stored:
    """A worker whose arguments are in the object store. Ray Data would copy them, networks too, several times."""

    def __init__(self, worker: Callable[..., Any], stored: Sequence[ray.ObjectRef[tuple[Any, ...]]]) -> None:
        self._worker = worker(*ray.get(stored[0]))
        gc.freeze()  # else Python traverses all that is loaded when the process ends: decision 52

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Any:
        """Make the parts of a batch."""
        return self._worker(batch)


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
        results = ray.data.from_items([{"part": number} for number in wave], override_num_blocks=len(wave)).map_batches(
            _Stored,
            fn_constructor_args=(worker, [stored]),
            batch_size=1,
            num_cpus=1,
            num_gpus=gpus_each or None,
            compute=pool,
        )
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(batch, pa.Table)
            yield batch

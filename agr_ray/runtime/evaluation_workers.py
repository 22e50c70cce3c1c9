"""Who predicts in an evaluation: this process if there are few images, else actors on the Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from agr_ray.config import EvaluateConfig
from agr_ray.data.prepared import PreparedSet
from agr_ray.runtime.cluster import check_fits, worker_count
from agr_ray.runtime.crop_stream import part_dataset
from agr_ray.runtime.part_runner import map_on_workers
from agr_ray.storage import Storage

_MOST_ROWS_HERE: Final = 250
"""Most images that this process predicts itself unless `evaluate.num_workers` is set. On one CPU, a ResNet50 at 224 px
takes 20 s for them, about as long as starting Ray and a worker."""


def predicts_here(config: EvaluateConfig, num_rows: int) -> bool:
    """Return whether this process should predict so many images itself."""
    return config.num_workers is None and not config.use_gpu and num_rows <= _MOST_ROWS_HERE


def fitting_workers(config: EvaluateConfig) -> tuple[int, float]:
    """Return the configured number of actors, which have a CPU each, and the number of GPUs of each.

    Raises:
        ConfigError: they do not fit the cluster.
    """
    gpus = 1.0 if config.use_gpu else 0.0
    num_workers = worker_count(config.num_workers, use_gpu=config.use_gpu)
    check_fits("evaluate.num_workers", num_workers, 1.0, gpus)
    return num_workers, gpus


def map_parts(
    worker: Callable[..., Any],
    arguments: Sequence[Any],
    storage: Storage,
    prepared: PreparedSet,
    pool: ActorPoolStrategy,
    gpus_each: float,
) -> Iterator[pa.Table]:
    """Return an iterator over what actors return for the parts of a prepared set, in any order.

    Args:
        worker: class of the actors. Each gets one row of `crop_stream.part_dataset` at a time.
        arguments: of its constructor.
        storage: where the set is.
        prepared: the set.
        pool: of the actors.
        gpus_each: GPUs of each actor.
    """
    stored = ray.put(tuple(arguments))
    return map_on_workers(part_dataset(storage, prepared), worker, stored, pool, gpus_each, "pyarrow")

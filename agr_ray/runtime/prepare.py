"""Labelled photographs -> a prepared set. `data.preparation` defines the steps; Ray's workers carry them out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ray.data import ActorPoolStrategy

from agr_ray.config import PrepareJob
from agr_ray.console import make_console
from agr_ray.data.preparation import prepare_set
from agr_ray.data.prepared import PreparedSet
from agr_ray.predict.crop_maker import CropMaker
from agr_ray.runtime.cluster import check_fits, cluster, worker_count
from agr_ray.runtime.metrics import Metrics
from agr_ray.runtime.part_runner import run_parts
from agr_ray.storage import Storage
from agr_ray.storage.parts import Parts


def prepare(job: PrepareJob) -> PreparedSet:
    """Make or update the prepared set that the job describes, on a Ray cluster, if there is anything to do.

    Raises:
        ConfigError, LockLost, StorageUnavailable: as `prepare_set`.
    """
    return prepare_set(job, RayWorkers(job), make_console())


class RayWorkers:
    """Workers of a Ray cluster: a pool of Ray Data actors."""

    def __init__(self, job: PrepareJob) -> None:
        self._job = job
        self._num_workers = 0
        self._metrics = Metrics("prepare", Storage.absolute(job.prepare.out))

    @contextmanager
    def session(self) -> Iterator[int]:
        """Join or start a cluster until the block ends; yield the number of workers."""
        with cluster(self._job.cluster):
            self._num_workers = worker_count(self._job.prepare.num_workers)
            check_fits("prepare.num_workers", self._num_workers, 1.0)
            with self._metrics.kept():
                yield self._num_workers

    def crop(self, parts: Parts, numbers: Sequence[int]) -> Iterator[list[str]]:
        """Make the crop rows of parts, in any order; yield the statuses of their rows."""
        arguments = (parts, self._job.vision, self._job.prepare)
        self._metrics.parts_left(len(numbers), self._num_workers)
        tables = run_parts(CropMaker, arguments, numbers, ActorPoolStrategy(size=self._num_workers))
        for num_done, table in enumerate(tables, 1):
            statuses = table["status"].to_pylist()
            self._metrics.images(Counter(statuses))
            self._metrics.parts_left(len(numbers) - num_done, self._num_workers)
            yield statuses

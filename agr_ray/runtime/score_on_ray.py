"""Workers of a Ray cluster that score photographs: `scoring.driver` defines the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, Final

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy

from agr_ray.config import ScoreJob
from agr_ray.runtime.cluster import check_fits, cluster, worker_count
from agr_ray.runtime.metrics import Metrics
from agr_ray.runtime.part_runner import run_parts
from agr_ray.scoring.publish import Counts, Publication
from agr_ray.scoring.scorer import Found, PartScorer, RowPredictor, Scoring
from agr_ray.storage import Storage


class RayWorkers:
    """Workers of a Ray cluster: a pool of Ray Data actors detects faces and, without GPUs, also predicts."""

    def __init__(self, job: ScoreJob) -> None:
        self._job = job
        self.num_workers = 0
        self._metrics = Metrics("score", Storage.absolute(job.score.out))

    @contextmanager
    def session(self, num_photographs: int) -> Iterator[None]:  # noqa: ARG002
        """Join or start a cluster for the duration of the block."""
        with cluster(self._job.cluster), self._metrics.kept():
            yield

    def score(self, scoring: Scoring, parts: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """Score the parts in any order; yield the `scorer.SUMMARY` row of each part."""
        num_gpus = worker_count(None, use_gpu=True) if scoring.use_gpu else 0
        self.num_workers = worker_count(self._job.score.num_workers, besides=num_gpus)
        check_fits("score.num_workers", self.num_workers, 1.0, spare_cpus=1.0 + num_gpus)
        check_fits("score.use_gpu", num_gpus, 0.0, 1.0)
        with remote_predictors(scoring, num_gpus, gpus_each=1.0) as predictors:
            worker = RemotelyPredicted if predictors else PartScorer
            arguments = (scoring, *([predictors] if predictors else []))
            num_left = len(parts)
            self._metrics.parts_left(num_left, self.num_workers)
            for table in run_parts(worker, arguments, parts, ActorPoolStrategy(size=self.num_workers)):
                for summary in table.to_pylist(maps_as_pydicts="strict"):
                    num_left -= 1
                    self._metrics.scored(summary, hides_totals=bool(self._job.score.min_cell))
                    self._metrics.parts_left(num_left, self.num_workers)
                    yield summary

    def stage(self, publication: Publication) -> Iterator[Counts]:
        """Write the files of all parts; yield the counts of each."""
        task = ray.remote(num_cpus=1)(Publication.stage_file)
        at_once = worker_count(self._job.score.num_workers)  # each holds one file's rows in memory
        files = iter(range(publication.num_files))
        waiting = [task.remote(publication, file) for file in islice(files, at_once)]
        while waiting:
            ready, waiting = ray.wait(waiting)
            yield from ray.get(ready)
            waiting += [task.remote(publication, file) for file in islice(files, len(ready))]

    def finished(self, record: Mapping[str, Any]) -> None:
        """Show when the last run was published, and that all photographs are scored."""
        self._metrics.finished(record)


_MAX_BATCH_DEATHS: Final = 10
"""Deaths of its predictor after which a batch is retried, such as those of preempted nodes."""


@contextmanager
def remote_predictors(scoring: Scoring, number: int, *, gpus_each: float) -> Iterator[list[ActorHandle[Any]]]:
    """Run this many predictors, each in its own process, until the block ends.

    Ray restarts predictors that die. A batch that kills its predictor every time ends the job.
    """
    actor: Any = ray.remote(num_cpus=1, num_gpus=gpus_each, max_restarts=-1, max_task_retries=_MAX_BATCH_DEATHS)(
        RowPredictor
    )
    actors = [actor.remote(scoring) for _ in range(number)]
    try:
        yield actors
    finally:
        for each in actors:
            ray.kill(each)


class RemotelyPredicted(PartScorer):
    """Detects faces in this process and sends them to other processes for prediction; used with GPUs."""

    def __init__(self, scoring: Scoring, predictors: Sequence[ActorHandle[Any]]) -> None:
        super().__init__(scoring, _Remote(predictors))


class _Remote:
    """Distributes batches of faces over several predictors, round-robin."""

    def __init__(self, predictors: Sequence[ActorHandle[Any]]) -> None:
        self._next = cycle(predictors)

    def submit(self, found: Found) -> Callable[[], pa.Table]:
        """Start predicting; return a function that waits for the image rows."""
        if not len(found.crops):
            return lambda: found.images
        predictor: Any = next(self._next)
        answer = predictor.fill.remote(found)
        return lambda: ray.get(answer)

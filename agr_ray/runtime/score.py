"""Score photographs: a Parquet row for each, with all its faces, and demographic tables. Each is scored only once.

`scoring.driver` defines the steps. Workers carry them out: those of a Ray cluster, or one process if there are few
photographs. Ray, which takes seconds to import, is imported only if it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from agr_ray.config import ScoreJob
from agr_ray.console import make_console
from agr_ray.errors import ConfigError, JobError
from agr_ray.scoring.driver import score_input
from agr_ray.scoring.local_worker import LocalWorker
from agr_ray.scoring.publish import Counts, Publication
from agr_ray.scoring.scorer import Scoring

if TYPE_CHECKING:
    from agr_ray.runtime.score_on_ray import RayWorkers

_MOST_WITHOUT_RAY: Final = 250
"""Most photographs for which no Ray is started. One process takes some 20 s for them, about as long as Ray takes to
start and to end."""


def score(job: ScoreJob) -> dict[str, Any]:
    """Score all new photographs, publish, and return the run's record, `_SUCCESS/run=ID.json`.

    Few photographs are scored in one process without Ray, unless the job names a cluster, workers or GPUs, or this
    process is connected to a cluster.

    If none is new, publish nothing, and return the record of the latest run with the same model and settings.

    Raises:
        ConfigError: the checkpoint or the input does not exist, the input has no photographs, most of them are
            rejected for the same reason, another run is active, or the cluster is too small for the plan.
        LockLost: another job has taken over the output.
        StorageUnavailable: input or output can't be reached.
    """
    with ExitStack() as until_finished:
        console = make_console()
        return score_input(job, _ChosenWorkers(job, until_finished, console), console)


class _ChosenWorkers:
    """The workers that suit the number of photographs.

    Args:
        job: what is scored.
        until_finished: keeps the connection to a cluster, for the metrics of the publication.
        console: for warnings.
    """

    def __init__(self, job: ScoreJob, until_finished: ExitStack, console: Console) -> None:
        self._job = job
        self._until_finished = until_finished
        self._console = console
        self._chosen: LocalWorker | RayWorkers = LocalWorker()

    @contextmanager
    def session(self, num_photographs: int) -> Iterator[None]:
        """Choose the workers, and keep them running until the run is published, or the block fails."""
        if not _needs_no_ray(self._job, num_photographs):
            self._join(num_photographs)
        try:
            yield
        except BaseException:
            self._until_finished.close()  # so that the workers end before the lock is released
            raise

    def _join(self, num_photographs: int) -> None:
        from agr_ray.runtime.score_on_ray import RayWorkers

        workers = RayWorkers(self._job)
        self._until_finished.enter_context(workers.session(num_photographs))
        self._chosen = workers

    def score(self, scoring: Scoring, parts: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """Score the parts in any order; yield the `scorer.SUMMARY` row of each part."""
        return self._chosen.score(scoring, parts)

    def stage(self, publication: Publication) -> Iterator[Counts]:
        """Write the files of all parts; yield the counts of each."""
        return self._chosen.stage(publication)

    @property
    def num_workers(self) -> int:
        """Number of workers that score in parallel."""
        return self._chosen.num_workers

    def finished(self, record: Mapping[str, Any]) -> None:
        """Show on the cluster, if there is one, when the last run was published and that this job is done."""
        if isinstance(self._chosen, LocalWorker) and _has_cluster(self._job):  # nothing was new
            try:
                self._join(0)
            except (ConfigError, JobError) as error:
                self._console.print(f"warning: the cluster's metrics do not show that nothing was new: {error}")
        self._chosen.finished(record)


def _needs_no_ray(job: ScoreJob, num_photographs: int) -> bool:
    """Return whether one process should score so many photographs."""
    names_workers = job.score.num_workers is not None or job.score.use_gpu
    return num_photographs <= _MOST_WITHOUT_RAY and not (names_workers or _has_cluster(job))


def _has_cluster(job: ScoreJob) -> bool:
    """Return whether the job names a cluster, or this process is connected to one."""
    is_connected = False
    if "ray" in sys.modules:
        import ray

        is_connected = ray.is_initialized()
    return bool(job.cluster.address or os.environ.get("RAY_ADDRESS")) or is_connected

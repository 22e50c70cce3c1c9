"""One trial of a sweep: a training run in a process of Ray Tune, which reports each epoch to Tune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from ray import tune as ray_tune
from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

from agr_ray.config import TrainJob
from agr_ray.errors import JobError
from agr_ray.learn.run import FAILURE, is_finished
from agr_ray.runtime.ray_compat import TrainRunContext
from agr_ray.runtime.train import train
from agr_ray.storage import Storage
from agr_ray.tuning.space import with_values
from agr_ray.tuning.sweep import trial_name


class EpochReports(TuneReportCallback):
    """Reports epochs to Tune, but not checkpoints within an epoch."""

    def after_report(
        self, run_context: TrainRunContext, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Pass on the first worker's report."""
        if "epoch" in metrics[0]:
            super().after_report(run_context, metrics, checkpoint)


def trainable(base: TrainJob) -> Callable[[dict[str, Any]], None]:
    """Return the function that Tune runs for each trial.

    The job goes through Ray's object store, because Tune writes the function itself into the sweep's folder, and the
    job may hold passwords.

    Args:
        base: the training job, whose train.out is the folder of trials.
    """

    def run_trial(config: dict[str, Any], base: TrainJob) -> None:
        job = with_values(base, {**config["values"], "train.name": trial_name(config["number"])})
        storage = Storage.from_config(job.storage)
        uri = storage.join(job.train.out, job.train.name)
        if is_finished(storage, uri):
            return  # it finished before its process died
        try:
            reports = EpochReports()  # type: ignore[no-untyped-call]  # Ray does not annotate it
            train(job, callbacks=[reports], quiet=True)
        except JobError:
            # A retry would have the same non-finite loss; the driver reads the file.
            if not storage.exists(storage.join(uri, FAILURE)):
                raise

    return cast(Callable[[dict[str, Any]], None], ray_tune.with_parameters(run_trial, base=base))

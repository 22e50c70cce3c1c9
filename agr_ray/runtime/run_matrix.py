"""Several training runs, each with an evaluation, that resume after any kill: shared by `compare` and `cross_validate`.

    OUT/
      RECORD.json                the settings that all runs share, and the names of the runs
      runs/NAME/                 each run's training (`runtime.train`)
      evaluations/NAME/          its predictions for the measured split; metrics.json is written last

A run whose evaluation is complete is not repeated, and an unfinished one resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import ray
from rich.console import Console

from agr_ray.config import ClusterJob, EvaluateConfig, EvaluateJob, PredictConfig, TrainJob
from agr_ray.config.section import first_difference
from agr_ray.errors import ConfigError
from agr_ray.learn.run import is_finished
from agr_ray.progress_bar import status_line
from agr_ray.runtime.evaluate import evaluate
from agr_ray.runtime.train import train
from agr_ray.storage import MissingObject, Storage, StorageUnavailable
from agr_ray.storage.lock import LockLost, RunLock
from agr_ray.tuning.concurrency import TRIAL_CPUS, Room

TASK: Final[Mapping[str, Any]] = {"num_cpus": TRIAL_CPUS, "max_retries": 3}
"""Ray's options of a run's task: it waits for its workers, and restarts if its process dies."""
_LOOK_EVERY_S: Final = 1.0


def check_record(
    storage: Storage,
    uri: str,
    settings: Mapping[str, Any],
    key: str,
    what: str,
    *,
    runs: Iterable[str] = (),
    grows: str = "",
) -> None:
    """Store the shared settings and the names of the runs; check first that the folder holds the same settings.

    Args:
        storage: of the folder.
        uri: of the record.
        settings: that all runs share and that affect the result, by section.
        key: the setting and value that name the folder, such as `compare.out results`.
        what: the folder's content, such as `a comparison`.
        runs: names of this command's runs, for `status`.
        grows: section whose new keys are added to those of the folder; empty: there is none.

    Raises:
        ConfigError: it holds other ones; the message names a setting.
    """
    ours = json.loads(json.dumps(settings))
    with contextlib.suppress(MissingObject):
        theirs = json.loads(storage.read(uri))
        if grows:  # each side keeps its own values of the keys that both have
            ours[grows] = theirs[grows] | ours[grows]
            theirs[grows] = ours[grows] | theirs[grows]
        for section, values in ours.items():
            difference = first_difference(theirs.get(section), values, section)
            if difference is not None:
                name, old, new = difference
                raise ConfigError(f"{key}: holds {what} with {name} {old}, not {new}; choose another folder")
    storage.write(uri, json.dumps(ours | {"runs": [*runs]}, indent=1).encode())


def is_measured(storage: Storage, out: str, name: str) -> bool:
    """Return whether a run's evaluation is complete."""
    return storage.exists(storage.join(out, "evaluations", name, "metrics.json"))


def evaluation_of(job: ClusterJob, predict: PredictConfig, run: TrainJob, out: str, split: str) -> EvaluateJob:
    """Return the evaluation of a run's best checkpoint on a split of its data, in one process."""
    storage = Storage.from_config(job.storage)
    return EvaluateJob(
        storage=job.storage,
        cluster=job.cluster,
        predict=predict,
        evaluate=EvaluateConfig(
            checkpoint=storage.join(run.train.out, run.train.name, "best"),
            data=str(run.train.data),
            split=split,
            out=storage.join(out, "evaluations", run.train.name),
            use_gpu=run.train.use_gpu,
            num_workers=1,
        ),
    )


def with_threads(run: TrainJob, room: Room) -> TrainJob:
    """Return a run with as many threads for each worker as there is room for beside the other runs."""
    if room.threads_per_worker is None:
        return run
    return run.model_copy(
        update={"train": run.train.model_copy(update={"threads_per_worker": room.threads_per_worker})}
    )


def run_all(
    starts: Mapping[str, Callable[[], ray.ObjectRef[None]]], max_concurrent: int, lock: RunLock, console: Console
) -> Iterator[tuple[str, str]]:
    """Run all tasks, at most `max_concurrent` at a time.

    Args:
        starts: starts each run's task, by name. The task should have the options `TASK`.
        max_concurrent: number of tasks at the same time.
        lock: checked all the time.
        console: gets a line for each run that ends.

    Yields:
        The name of each run that ends, and why it failed; empty if it did not.
    """
    waiting = list(starts)
    running: dict[Any, tuple[str, float]] = {}
    with status_line(console) as show_status:
        while waiting or running:
            while waiting and len(running) < max_concurrent:
                name = waiting.pop(0)
                running[starts[name]()] = name, time.monotonic()
            now = time.monotonic()
            names = ", ".join(f"{name} ({(now - started) / 60:.0f} minutes)" for name, started in running.values())
            num_ended = len(starts) - len(waiting) - len(running)
            show_status(f"{num_ended} of {len(starts)} runs ended; running: {names}")
            ended, _ = ray.wait(list(running), timeout=_LOOK_EVERY_S)
            lock.check()
            for each in ended:
                name, started = running.pop(each)
                problem = _outcome(lambda each=each: ray.get(each))  # type: ignore[misc]
                minutes = (time.monotonic() - started) / 60
                console.print(f"{name}: {problem or 'done'} ({minutes:.1f} minutes)")
                yield name, problem


def _outcome(get: Callable[[], object]) -> str:
    """Return why a run failed; empty: it did not."""
    try:
        get()
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, LockLost | StorageUnavailable):
            raise cause from None
        return (str(cause).splitlines() or [type(cause).__name__])[0]
    except ray.exceptions.RayError as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


def train_and_evaluate(train_job: TrainJob, evaluate_job: EvaluateJob) -> None:
    """Make one run, in a process of its own."""
    storage = Storage.from_config(train_job.storage)
    if not is_finished(storage, storage.join(train_job.train.out, train_job.train.name)):
        train(train_job, quiet=True)
    evaluate(evaluate_job, quiet=True)

"""Start the workers of a training run, and restart them after failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import ray.train
import ray.train.torch
from ray.data import Dataset
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, Result, RunConfig, ScalingConfig, UserCallback
from rich.console import Console

from agr_ray.config import TrainConfig
from agr_ray.data.prepared import PreparedSet
from agr_ray.errors import ConfigError, JobError
from agr_ray.learn.resources import spare_cpus
from agr_ray.learn.run import CHECKPOINTS, OBJECTIVE, Run
from agr_ray.redact import redacted
from agr_ray.runtime.cluster import check_fits, refuse_misfit
from agr_ray.runtime.crop_stream import SplitShares, training_dataset
from agr_ray.runtime.ray_compat import (
    SNAPSHOT,
    could_not_start,
    limit_worker_start,
    named_cluster,
)
from agr_ray.runtime.training.fence import Fence, StopWhenLost
from agr_ray.runtime.training.interruptible import InterruptibleTrainer, StopRequest
from agr_ray.runtime.training.worker import collective_timeout_s, work
from agr_ray.storage.lock import RunLock
from agr_ray.storage.retry import Retry

MIN_START_S: Final = 60.0
WATCH_EVERY_S: Final = 2.0
CONTROLLER_FAILURES: Final = 3
"""Restarts without a finished epoch in between. By default, Ray would wait forever for resources that do not exist."""


def fit(
    run: Run,
    sets: Sequence[PreparedSet],
    lock: RunLock,
    board: Any,
    console: Console,
    callbacks: Sequence[UserCallback] = (),
) -> Result:
    """Run the workers to the end of the run.

    Args:
        run: the run.
        sets: its prepared sets.
        lock: of the run.
        board: handle of the `Board`, or None, as in `RayContext`.
        console: for warnings.
        callbacks: of Ray Train.

    Raises:
        JobError: the workers failed for good.
        LockLost: another driver has the run's lock; the workers have been stopped.
    """
    retry = Retry(run.job.train.outage_s)
    # Time limit of one attempt; Ray makes CONTROLLER_FAILURES more attempts.
    start_s = max(MIN_START_S, run.job.train.outage_s / (CONTROLLER_FAILURES + 1))
    limit_worker_start(start_s)
    fence = Fence.of(lock, run.storage)
    retry.call(lambda: _delete_unknown_checkpoints(run, lock))
    attempts_left, epochs_done = CONTROLLER_FAILURES, retry.call(lambda: _epochs_done(run))
    while True:
        try:
            trainer = _trainer(run, sets, fence, board, callbacks)
            with _enough_workers(run, trainer), named_cluster():
                result = trainer.fit()
            retry.call(lambda: _delete_unknown_checkpoints(run, lock))
            return result
        except ray.train.WorkerGroupError as error:  # more often than train.max_failures
            retry.call(lock.confirm)
            cause = error.worker_failures[min(error.worker_failures)]
            raise _failed(run, f"training failed: {_last_line(cause)}") from error
        except _CONTROLLER_ERRORS as error:
            # Ray Train's controller has its own process: it can be killed, or fail while storage is unavailable.
            retry.call(lock.confirm)
            _check_still_fits(run)
            before, epochs_done = epochs_done, retry.call(lambda: _epochs_done(run))
            attempts_left = CONTROLLER_FAILURES if epochs_done > before else attempts_left - 1
            if attempts_left < 0 or could_not_start(error):
                raise _failed(run, f"training failed: {_last_line(error)}") from error
            console.print(
                f"warning: the Ray Train controller ended ({_last_line(error)}); resuming from the last checkpoint",
            )


_CONTROLLER_ERRORS: Final = (
    ray.train.ControllerError,
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,  # the memory monitor killed it
)


def _epochs_done(run: Run) -> int:
    """Return the number of epochs in the history."""
    uri = run.storage.join(run.uri, "history.parquet")
    return run.storage.read_table(uri, columns=["epoch"]).num_rows if run.storage.exists(uri) else 0


def _delete_unknown_checkpoints(run: Run, lock: RunLock) -> None:
    """Delete checkpoints that Ray Train does not list, because their worker was killed before or during the upload.

    Raises:
        JobError: Ray Train's list of checkpoints, which it writes in place, is incomplete.
        LockLost: another driver has the run's lock.
    """
    folder = run.storage.join(run.uri, CHECKPOINTS)
    snapshot = run.storage.join(folder, SNAPSHOT)
    if not run.storage.exists(snapshot):
        return
    known = run.storage.read(snapshot).decode()
    try:
        json.loads(known)
    except json.JSONDecodeError:
        raise JobError(
            f"{snapshot} is incomplete: the disk was full, or the machine stopped, while it was written; restore it, "
            "or start another run with train.name"
        ) from None
    names = {info.key.partition("/")[0] for info in run.storage.list(folder) if "/" in info.key}
    for name in sorted(names):
        if f'"{name}"' not in known:
            lock.check()
            run.storage.delete_tree(run.storage.join(folder, name))


def _trainer(
    run: Run, sets: Sequence[PreparedSet], fence: Fence, board: Any, callbacks: Sequence[UserCallback]
) -> InterruptibleTrainer:
    """Return the trainer, which resumes where an earlier one ended."""
    storage, config = run.storage, run.job.train

    def dataset(split: str) -> Callable[[], Dataset]:
        return lambda: training_dataset(
            storage,
            sets,
            split,
            run.baseline.space,
            use_fallback=config.use_fallback or split != "train",
            outage_s=config.outage_s,
            cpus_per_task=spare_cpus(config) / 2,
        )

    filesystem, path = storage.arrow_filesystem(run.uri)
    stop_request = StopRequest(fence.token)
    return InterruptibleTrainer(
        work,
        stop_request=stop_request,
        train_loop_config={"run": run, "fence": fence, "board": board, "stop_request": stop_request},
        torch_config=ray.train.torch.TorchConfig(timeout_s=int(collective_timeout_s(config))),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,  # type: ignore[arg-type]  # typed as Train V1's
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker}
            | ({"GPU": config.gpus_per_worker} if config.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.num_to_keep, checkpoint_score_attribute=OBJECTIVE, checkpoint_score_order="min"
            ),
            failure_config=FailureConfig(
                max_failures=config.max_failures,
                controller_failure_limit=CONTROLLER_FAILURES,  # type: ignore[call-arg]  # typed as Train V1's
            ),
            callbacks=[*callbacks, StopWhenLost(fence)],  # type: ignore[list-item]  # typed as Train V1's
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets={"train": dataset("train"), "val": dataset("val")},
        dataset_config=SplitShares(),
    )


def check_workers_fit(config: TrainConfig) -> None:
    """Check that the cluster has the CPUs and GPUs for the workers, or that its autoscaler adds them.

    Raises:
        ConfigError: it has not; the message says what is needed and what exists.
    """
    _check_workers(config, check_fits)


def _check_workers(config: TrainConfig, check: Callable[..., None]) -> None:
    check(
        "train.num_workers",
        config.min_workers,
        config.cpus_per_worker,
        config.gpus_per_worker if config.use_gpu else 0.0,
        spare_cpus=spare_cpus(config),
    )


def _failed(run: Run, why: str) -> JobError:
    return JobError(f"{run.uri}: {why}; the same command resumes it from its last checkpoint")


@contextmanager
def _enough_workers(run: Run, trainer: InterruptibleTrainer) -> Iterator[None]:
    """End the training of the trainer in this block if the cluster stays too small for it.

    A fixed number of workers has a limited time to start; for an elastic number, Ray waits forever.

    Raises:
        JobError: the cluster is too small; the message says what is needed and what exists.
    """
    config = run.job.train
    if config.min_workers == config.max_workers:
        yield
        return
    ended, problem = threading.Event(), ""

    def watch() -> None:
        nonlocal problem
        small_since: float | None = None
        while not ended.wait(WATCH_EVERY_S):
            try:
                _check_workers(config, refuse_misfit)
                small_since = None
            except ConfigError as error:
                now = time.monotonic()
                small_since = now if small_since is None else small_since
                if now - small_since > config.outage_s:
                    problem = str(error)
                    trainer.end()
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except ray.exceptions.RayActorError:
        if not problem:
            raise
        raise _failed(run, problem) from None
    finally:
        ended.set()
        watcher.join()


def _check_still_fits(run: Run) -> None:
    """Check that the workers still fit the cluster.

    Raises:
        JobError: they do not fit; the message says what is needed and what exists.
    """
    try:
        _check_workers(run.job.train, refuse_misfit)
    except ConfigError as error:
        raise _failed(run, str(error)) from None


def _last_line(error: Exception) -> str:
    """Return the last line of an error, whose text may be a traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return redacted(lines[-1].strip()) if lines else type(error).__name__

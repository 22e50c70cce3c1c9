"""A sweep on a cluster: Ray Tune runs the trials, Optuna proposes them, `tuning.sweep.Sweep` records them.

`tuning.sweep` describes the folder's layout, and what a sweep resumes from.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
from ray import tune as ray_tune
from rich.console import Console

from agr_ray.config import PAPER_POINT, TrainConfig, TrainJob, TuneJob
from agr_ray.console import make_console
from agr_ray.data.crops import select_crops, usable_statuses
from agr_ray.data.prepared import PreparedSet
from agr_ray.errors import ConfigError, JobError
from agr_ray.json_log import name_run
from agr_ray.learn.dry_run import dry_run, duration_text
from agr_ray.learn.run import Run
from agr_ray.progress_bar import status_line
from agr_ray.registry import PUBLISHED_WEIGHTS
from agr_ray.report.sweep_results import print_trials, write_results
from agr_ray.runtime.cluster import cluster, nodes, wait_for_nodes
from agr_ray.runtime.ray_compat import graceful_interrupts, machine_cpus
from agr_ray.runtime.train import NOT_IN_DIGEST, open_sets, plan, settings_digest
from agr_ray.runtime.tuning.hooks import Budget, Halving, NextTrials, Watcher
from agr_ray.runtime.tuning.trial import trainable
from agr_ray.storage import Storage
from agr_ray.storage.lock import RunLock, run_lock
from agr_ray.storage.retry import Retry
from agr_ray.tuning.concurrency import TRIAL_CPUS, Room, room_for, trial_bundles
from agr_ray.tuning.plan import Plan, plan_sweep
from agr_ray.tuning.space import base_job, check_space, paper_point, recipes_value, unlike_papers, with_values
from agr_ray.tuning.sweep import Sweep
from agr_ray.tuning.trials import ERROR_TASKS

TUNE_FOLDER: Final = "tune"
"""Folder of Tune's own files, which are never read again."""


def tune(job: TuneJob) -> str:
    """Run a sweep, or resume one, and return the URI of the best trial's checkpoint.

    The checkpoint does not exist if a budget or an interruption ended the sweep before any trial finished, or with
    `job.dry_run`, which only checks everything and prints the plan of the first trial.

    Raises:
        ConfigError: the search space, the data or the plan is invalid, the sweep has finished, or another driver is
            running it.
        JobError: no trial finished, or the first ones failed before their first epoch.
        LockLost: another driver has taken over the sweep.
    """
    console, folder = make_console(), os.getcwd()
    storage = Storage.from_config(job.storage)
    job = with_absolute_paths(job, storage)
    check_space(job)
    if job.train.min_workers != job.train.max_workers:
        asked = [job.train.min_workers, job.train.max_workers]
        raise ConfigError(f"train.num_workers {asked}: a sweep's trials need a fixed number")
    storage.probe(job.tune.out, "tune.out", write=not job.dry_run)
    base = base_job(job).model_copy(update={"new_run": False})
    sets = open_sets(base, storage)
    digest = settings_digest(base, sets)
    planned = plan_sweep(storage, job, digest, NOT_IN_DIGEST)
    run, first = plan(base, storage, sets, storage.join(planned.uri, "trials", "0000"), digest, console)
    if not run.num_val_rows:
        raise ConfigError(
            f"train.data {run.data['uri']}: a sweep needs validation, and there is no crop in its val split"
        )
    _check_labels(job, sets, storage)
    name_run(planned.uri)
    console.print(f"sweep {planned.uri}")
    if unlike_papers(job) and paper_point(job.tune.space):
        keys = ", ".join(f"{key} {recipes_value(job, key):g} (not {PAPER_POINT[key]:g})" for key in unlike_papers(job))
        console.print(f"warning: {keys} is not searched, so no trial has the paper's values")
    if job.dry_run:
        _dry_run(job, planned, run, console)
        if first is not None:
            _print_sweep_time(job, planned, dry_run(run, sets, first, machine_cpus(), console), console)
        return storage.join(planned.uri, "best")
    lock_uri, retry = storage.join(planned.uri, "lock.json"), Retry(job.train.outage_s)
    owner = f"sweep {planned.uri}"
    with run_lock(storage, lock_uri, owner, expiry_s=job.train.lock_expiry_s, console=console) as lock:
        with cluster(job.cluster, trains=True):
            capacity = room(base.train, job.tune.max_concurrent, "tune.max_concurrent")
            sweep = Sweep(storage, _planned_again(planned, storage, job, digest), job, console, lock)
            sweep.begin()
            at_once = min(capacity.num_trials, max(sweep.num_left, 1))
            console.print(f"{at_once} {'trials' if at_once > 1 else 'trial'} at a time; {_budget(job)}")
            is_stopped = False
            if sweep.num_left and not sweep.spent:
                is_stopped = _run_trials(
                    sweep,
                    lock,
                    _trial_job(base, sweep, capacity.threads_per_worker),
                    capacity.num_trials,
                    folder,
                    console,
                )
        retry.call(lock.confirm)
        retry.call(sweep.clean)
        finished = "" if sweep.num_ended < sweep.plan.num_trials else f"{sweep.plan.num_trials} trials"
        write_results(sweep, run, console)
        sweep.write_record(finished)
    print_trials(sweep, console)
    if is_stopped and not finished:
        raise KeyboardInterrupt
    if not finished:
        why = f"{sweep.spent} is spent" if sweep.spent else "it was interrupted"
        console.print(f"the sweep is not finished: {why}; the same command resumes it")
    elif sweep.best is None:
        raise JobError(f"{sweep.plan.uri}: no trial is complete; trials.parquet there gives the reasons")
    return sweep.join("best")


def room(config: TrainConfig, asked: int | None, key: str) -> Room:
    """Return how much of the connected cluster several runs use. An autoscaler may enlarge the cluster for them.

    Args:
        config: of a run.
        asked: number of runs at the same time; None: as many as fit.
        key: the setting that asks for them.

    Raises:
        ConfigError: no trial fits, or fewer than requested, and no autoscaler adds enough nodes.
    """
    bundles = trial_bundles(config) * (asked or 1)
    return wait_for_nodes(lambda: room_for(config, asked, nodes(), machine_cpus(), key), bundles, key)


def _planned_again(planned: Plan, storage: Storage, job: TuneJob, digest: str) -> Plan:
    """Return the plan again, now that no other driver can change it.

    Raises:
        ConfigError: another driver has finished the sweep since.
    """
    again = plan_sweep(storage, job, digest, NOT_IN_DIGEST)
    if again.uri != planned.uri:
        raise ConfigError(f"the sweep {planned.uri} was finished by another driver just now; run the command again")
    return again


def _check_labels(job: TuneJob, sets: Sequence[PreparedSet], storage: Storage) -> None:
    """Check that validation has the labels of every error that trials are judged by.

    Raises:
        ConfigError: labels are missing; the message names the task and the setting that needs it.
    """
    needed = {ERROR_TASKS[name]: f"tune.constraints {name}" for name in job.tune.constraints}
    needed |= dict.fromkeys(job.model.tasks, "tune.mode pareto") if job.tune.mode == "pareto" else {}
    if not needed:
        return
    columns, statuses = ["split", "status", *needed], usable_statuses(use_fallback=True)
    tables = [storage.read_table(prepared.crops(storage), columns=columns) for prepared in sets]
    rows = pa.concat_tables([select_crops(table, "val", statuses) for table in tables])
    for task, what in needed.items():
        if rows[task].null_count == rows.num_rows:
            raise ConfigError(f"{what} needs labels of {task}, and no row of validation in train.data has one")


def with_absolute_paths(job: TuneJob, storage: Storage) -> TuneJob:
    """Return the job with absolute paths, because Tune runs each trial in a folder of its own."""

    def absolute(weights: Any) -> Any:
        return weights if weights in ("none", *PUBLISHED_WEIGHTS) else storage.absolute(weights)

    # The configuration stores one URI as text and several as JSON.
    uris = [storage.absolute(uri) if uri else uri for uri in job.train.data_uris]
    data = uris[0] if len(uris) == 1 else json.dumps(uris)
    space = dict(job.tune.space)
    searched = space.get("model.pretrained")
    if searched is not None and searched.choice is not None:
        choice = tuple(absolute(weights) for weights in searched.choice)
        space["model.pretrained"] = searched.model_copy(update={"choice": choice})
    return job.model_copy(
        update={
            "model": job.model.model_copy(update={"pretrained": absolute(job.model.pretrained)}),
            "train": job.train.model_copy(update={"data": data}),
            "tune": job.tune.model_copy(update={"space": space}),
        }
    )


def _trial_job(base: TrainJob, sweep: Sweep, threads_per_worker: int | None) -> TrainJob:
    """Return the settings that all trials share."""
    train = {"train.out": sweep.join("trials"), "train.max_failures": 0, "train.threads_per_worker": threads_per_worker}
    return with_values(base, train)


def _run_trials(
    sweep: Sweep, lock: RunLock, base: TrainJob, max_concurrent: int, folder: str, console: Console
) -> bool:
    """Run trials until none is left, a budget is spent, or the user interrupts; return whether the user did.

    An error in one of the sweep's callbacks is raised when Tune has ended.
    """
    # The driver prints progress itself, and the records hold what these loggers would write.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it prints nothing
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    # A trial ends without a result if it diverges in its first epoch, or had finished before its process died.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    lock.check()
    sweep.storage.delete_tree(sweep.join(TUNE_FOLDER))
    filesystem, path = sweep.storage.arrow_filesystem(sweep.plan.uri)
    scheduler = Halving(sweep) if sweep.config.asha and sweep.config.mode == "scalar" else None
    with status_line(console) as show_status:
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trainable(base), {"CPU": TRIAL_CPUS}),
            tune_config=ray_tune.TuneConfig(
                search_alg=NextTrials(sweep),
                scheduler=scheduler,
                num_samples=sweep.num_left,
                max_concurrent_trials=max_concurrent,
            ),
            run_config=ray_tune.RunConfig(
                name=TUNE_FOLDER,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=ray_tune.FailureConfig(max_failures=sweep.config.max_failures),
                stop=Budget(sweep, lock),
                callbacks=[Watcher(sweep, scheduler, show_status, folder)],
                verbose=0,
            ),
        )
        with graceful_interrupts() as is_stopped:
            tuner.fit()
    if sweep.problem is not None:
        raise sweep.problem
    lock.check()
    sweep.storage.delete_tree(sweep.join(TUNE_FOLDER))
    return is_stopped()


def _budget(job: TuneJob) -> str:
    config = job.tune
    parts = [f"at most {config.max_epochs} epochs in total"] if config.max_epochs else []
    parts += [f"at most {config.max_hours:g} hours"] if config.max_hours else []
    halving = f"ASHA stops all but 1 in {config.reduction} from epoch {config.grace_epochs}"
    parts.append(halving if config.asha and config.mode == "scalar" else "no trial is stopped early")
    return ", ".join(parts)


def _print_sweep_time(job: TuneJob, planned: Plan, trial_s: float, console: Console) -> None:
    """Print the estimated time of all trials, given that of the first."""
    total_s, at_once = planned.num_trials * trial_s, job.tune.max_concurrent or 1
    text = f"whole sweep: {planned.num_trials} trials x {duration_text(trial_s)} = {duration_text(total_s)}"
    if at_once > 1:
        text += f"; {duration_text(total_s / at_once)} if {at_once} trials at a time are each as fast as one alone"
    console.print(f"{text}; less if trials are stopped early")


def _dry_run(job: TuneJob, planned: Plan, run: Run, console: Console) -> None:
    """Print the search space."""
    console.print(f"{planned.num_trials} trials of {run.job.train.epochs} epochs; {_budget(job)}")
    for key, parameter in job.tune.space.items():
        settings = parameter.model_dump(exclude_defaults=True)
        console.print(f"  {key}: {', '.join(f'{name} {value}' for name, value in settings.items())}")

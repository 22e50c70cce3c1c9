"""Tune: a sweep on a cluster. Ray Tune runs its trials, Optuna proposes them, `sweep.Sweep` remembers them.

The folder's layout, and what a sweep resumes from, are in `runtime.sweep`.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any, Final

from ray import tune as ray_tune
from rich.console import Console

from agr_ray.config import ConfigError, TrainJob, TuneJob
from agr_ray.learn.space import base_job, check_space, with_values
from agr_ray.runtime.cluster import cluster
from agr_ray.runtime.command import JobError
from agr_ray.runtime.dry_run import dry_run
from agr_ray.runtime.placement import room
from agr_ray.runtime.sweep import Plan, Sweep, plan_sweep
from agr_ray.runtime.sweep_results import print_trials, write_results
from agr_ray.runtime.train import open_sets, plan, settings_digest
from agr_ray.runtime.training_run import Run
from agr_ray.runtime.trial import trainable
from agr_ray.runtime.tune_hooks import Budget, Halving, NextTrials, Watcher
from agr_ray.storage import Storage

TRIAL_CPUS: Final = 0.001
"""Of the process that waits for a trial's workers."""
TUNE_FOLDER: Final = "tune"
"""Of Tune's own files, which nothing is read from again."""


def tune(job: TuneJob) -> str:
    """Make a sweep, or go on with one, and return the URI of the best trial's checkpoint.

    With `job.dry_run`, only check everything and print the plan of the first trial.

    Raises:
        ConfigError: the search space, the data or the plan can't be meant, or the sweep has finished already.
        JobError: no trial came to its end.
    """
    console = Console()
    storage = Storage.from_config(job.storage)
    job = with_absolute_paths(job, storage)
    check_space(job)
    if job.train.min_workers != job.train.max_workers:
        asked = [job.train.min_workers, job.train.max_workers]
        raise ConfigError(f"train.num_workers {asked}: a sweep's trials need a fixed number")
    base = base_job(job).model_copy(update={"new_run": False})
    sets = open_sets(base, storage)
    digest = settings_digest(base, sets)
    planned = plan_sweep(storage, job, digest)
    run, first = plan(base, storage, sets, storage.join(planned.uri, "trials", "0000"), digest, console)
    if not run.num_val_rows:
        raise ConfigError(
            f"train.data {run.data['uri']}: a sweep needs validation, and there is no crop in its val split"
        )
    _say(console, f"sweep {planned.uri}")
    if job.dry_run:
        _dry_run(job, planned, run, console)
        if first is not None:
            dry_run(run, sets, first, console)
        return storage.join(planned.uri, "best")
    with cluster(job.cluster):
        has = room(base.train, job.tune.max_concurrent)
        sweep = Sweep(storage, planned, job, console)
        sweep.begin()
        at_once = min(has.num_trials, max(sweep.num_left, 1))
        _say(console, f"{at_once} {'trials' if at_once > 1 else 'trial'} at a time; {_budget(job)}")
        if sweep.num_left and not sweep.spent:
            _run_trials(sweep, _trial_job(base, sweep, has.threads_per_worker), has.num_trials, console)
    sweep.clean()
    finished = "" if sweep.num_ended < planned.num_trials else f"{planned.num_trials} trials"
    write_results(sweep, run, console)
    sweep.write_record(finished)
    print_trials(sweep, console)
    if not finished:
        why = f"{sweep.spent} is spent" if sweep.spent else "it was interrupted"
        _say(console, f"the sweep is not finished: {why}; the same command goes on")
    if sweep.best is None:
        raise JobError(f"{planned.uri}: no trial came to its end; trials.parquet there says why")
    return storage.join(planned.uri, "best")


def with_absolute_paths(job: TuneJob, storage: Storage) -> TuneJob:
    """Return the job with the paths that trials read from as they are here: Tune runs each in a folder of its own."""

    def absolute(weights: Any) -> Any:
        return weights if weights in ("none", "imagenet") else storage.absolute(weights)

    # As the configuration keeps it: one as its word, several as JSON.
    uris = [storage.absolute(uri) if uri else uri for uri in job.train.data_uris]
    data = uris[0] if len(uris) == 1 else json.dumps(uris)
    space = dict(job.tune.space)
    searched = space.get("model.weights")
    if searched is not None and searched.choice is not None:
        choice = tuple(absolute(weights) for weights in searched.choice)
        space["model.weights"] = searched.model_copy(update={"choice": choice})
    return job.model_copy(
        update={
            "model": job.model.model_copy(update={"weights": absolute(job.model.weights)}),
            "train": job.train.model_copy(update={"data": data}),
            "tune": job.tune.model_copy(update={"space": space}),
        }
    )


def _trial_job(base: TrainJob, sweep: Sweep, threads_per_worker: int | None) -> TrainJob:
    """Return what trials have in common."""
    train = {"train.out": sweep.join("trials"), "train.max_failures": 0, "train.threads_per_worker": threads_per_worker}
    return with_values(base, train)


def _run_trials(sweep: Sweep, base: TrainJob, max_concurrent: int, console: Console) -> None:
    """Run trials until there is none left, a budget is spent, or somebody interrupts."""
    # The driver says what there is to say, and the records hold what these loggers would write.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sweep.storage.delete_tree(sweep.join(TUNE_FOLDER))
    filesystem, path = sweep.storage.arrow_filesystem(sweep.plan.uri)
    scheduler = Halving(sweep) if sweep.config.asha and sweep.config.mode == "scalar" else None
    with console.status("") as status:
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
                stop=Budget(sweep),
                callbacks=[Watcher(sweep, scheduler, status)],
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except ray_tune.TuneError:
            if sweep.problem is None:
                raise
            raise sweep.problem from None
    sweep.storage.delete_tree(sweep.join(TUNE_FOLDER))


def _budget(job: TuneJob) -> str:
    config = job.tune
    parts = [f"{config.max_epochs} epochs in all at most"] if config.max_epochs else []
    parts += [f"{config.max_hours:g} hours at most"] if config.max_hours else []
    halving = f"ASHA stops all but 1 in {config.reduction} from epoch {config.grace_epochs}"
    parts.append(halving if config.asha and config.mode == "scalar" else "no trial is stopped early")
    return ", ".join(parts)


def _dry_run(job: TuneJob, planned: Plan, run: Run, console: Console) -> None:
    """Say what would be searched."""
    _say(console, f"{planned.num_trials} trials of {run.job.train.epochs} epochs; {_budget(job)}")
    for key, parameter in job.tune.space.items():
        said = parameter.model_dump(exclude_defaults=True)
        _say(console, f"  {key}: {', '.join(f'{name} {value}' for name, value in said.items())}")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)

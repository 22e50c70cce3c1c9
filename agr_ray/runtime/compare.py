"""Train presets on the same data with the same settings, and compare them: `agr-ray compare`.

    OUT/
      comparison.html, comparison.parquet    the result (`report.comparison`)
      comparison.json                        the settings that all runs share, and those of each preset
      runs/PRESET-SEED/                      each run's training (`runtime.train`)
      evaluations/PRESET-SEED/               its predictions for the compared split; metrics.json is written last

A run whose evaluation is complete is not repeated, and an unfinished one resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import ray
from pydantic import ValidationError
from rich.console import Console

from agr_ray.config import CompareJob, EvaluateConfig, EvaluateJob, ModelConfig, TrainConfig, TrainJob
from agr_ray.config.presets import with_preset
from agr_ray.config.section import first_message
from agr_ray.console import make_console
from agr_ray.data.crops import select_crops, usable_statuses
from agr_ray.data.guards import training_space
from agr_ray.data.prepared import PreparedSet, open_prepared
from agr_ray.errors import ConfigError, JobError
from agr_ray.learn.run import is_finished
from agr_ray.models.network import preset_config
from agr_ray.report.comparison import write_comparison
from agr_ray.runtime.cluster import cluster
from agr_ray.runtime.evaluate import evaluate
from agr_ray.runtime.train import WITHOUT_EFFECT, check_network, train
from agr_ray.runtime.tune import room
from agr_ray.schema import LABEL_COLUMNS
from agr_ray.storage import MissingObject, Storage, StorageUnavailable
from agr_ray.storage.lock import LockLost, RunLock, run_lock
from agr_ray.tuning.concurrency import TRIAL_CPUS

RECORD: Final = "comparison.json"
_MAX_DEATHS: Final = 3
"""Number of restarts of a run whose process died."""
_LOOK_EVERY_S: Final = 1.0


def compare(job: CompareJob) -> str:
    """Train and evaluate all runs that are not complete, write the result, and return the URI of comparison.html.

    A run that fails, for example because its loss is not finite, is named in the result, and the others continue.

    Raises:
        ConfigError: the data has no such split, another comparison is in the folder, or the cluster is too small.
        JobError: a run failed.
        LockLost: another driver has taken over the comparison.
    """
    console = make_console()
    storage = Storage.from_config(job.storage)
    out = storage.absolute(job.compare.out).rstrip("/")
    if len(job.train.data_uris) != 1:
        raise ConfigError(f"train.data {list(job.train.data_uris)}: a comparison needs one prepared set")
    storage.probe(job.train.data_uris[0], "train.data")
    storage.probe(out, "compare.out", write=True)
    prepared = open_prepared(storage, job.train.data_uris[0], "train.data")
    _check_split(prepared, job)
    runs, skipped = plan_runs(job, storage, out, prepared)
    for preset, problem in skipped.items():
        console.print(f"without {preset}: {problem}")
    expiry_s = job.train.lock_expiry_s
    lock_uri = storage.join(out, "lock.json")
    with run_lock(storage, lock_uri, f"comparison {out}", expiry_s=expiry_s, console=console) as lock:
        store_settings(job, storage, out, prepared, runs)
        failures: dict[str, str] = {}
        todo = {name: run for name, run in runs.items() if not _is_measured(storage, out, name)}
        console.print(f"comparison {out}: {len(runs)} runs, {len(runs) - len(todo)} already complete")
        if todo:
            with cluster(job.cluster):
                at_once = room(job.train, job.compare.max_concurrent, "compare.max_concurrent")
                threads = at_once.threads_per_worker
                for name, problem in _run_all(job, todo, out, at_once.num_trials, threads, lock, console):
                    if problem:
                        failures[name] = problem
        lock.check()
        page = write_comparison(storage, out, prepared, job.compare.split, failures, _settings(job), console)
    if failures:
        reasons = "; ".join(f"{name}: {problem}" for name, problem in failures.items())
        raise JobError(f"{len(failures)} of {len(runs)} runs failed: {reasons}")
    return page


def _labelled_tasks(prepared: PreparedSet, storage: Storage, job: CompareJob) -> list[str]:
    """Return the tasks of which training has a label."""
    columns = ["split", "status", *LABEL_COLUMNS]
    table = storage.read_table(prepared.crops(storage), columns=columns)
    rows = select_crops(table, "train", usable_statuses(use_fallback=job.train.use_fallback))
    labels = {"age": ("age", "age_low"), "gender": ("gender",), "race": ("race",)}
    return [task for task, names in labels.items() if any(rows[name].null_count < rows.num_rows for name in names)]


def plan_runs(
    job: CompareJob, storage: Storage, out: str, prepared: PreparedSet
) -> tuple[dict[str, TrainJob], dict[str, str]]:
    """Return the training runs by name, first all presets with the first seed; and why presets are left out, by name.

    Tasks without a label in training are left out. If `compare.presets` is the default, so are presets that can't be
    trained.

    Raises:
        ConfigError: a preset that the user chose can't be trained, or none can.
    """
    space = training_space([prepared], job.labels)
    labelled = _labelled_tasks(prepared, storage, job)
    is_chosen = "presets" in job.compare.model_fields_set
    runs: dict[str, TrainJob] = {}
    skipped: dict[str, str] = {}
    for number in range(job.compare.seeds):
        for preset in job.compare.presets:
            if preset in skipped:
                continue
            try:
                run = _run(job, storage, out, preset, job.train.seed + number, labelled)
                check_network(run, [prepared], space)
            except ConfigError as error:
                if is_chosen:
                    raise ConfigError(f"compare.presets {preset}: {error}") from None
                skipped[preset] = str(error)
            else:
                runs[run.train.name] = run
    if not runs:
        raise ConfigError(f"compare.presets: none can be trained; {next(iter(skipped.values()))}")
    return runs, skipped


def _run(job: CompareJob, storage: Storage, out: str, preset: str, seed: int, labelled: Sequence[str]) -> TrainJob:
    """Return the training run of a preset with a seed.

    Raises:
        ConfigError: training has no label of a task that it needs, or the settings do not fit it.
    """
    model = preset_config(preset, job.compare.image_size)
    tasks = tuple(task for task in model.tasks if task in labelled)
    needs = {"age", "gender"} if model.age_routing != "none" else set()
    if not tasks or not needs <= set(tasks):
        raise ConfigError(
            f"it predicts {', '.join(model.tasks)}, and the training images are labelled with "
            f"{', '.join(labelled) or 'nothing'}"
        )
    shared = job.train.model_dump(exclude_unset=True) | {"data": storage.absolute(job.train.data_uris[0])}
    own = with_preset({"model": {"preset": preset}})["train"]
    own |= {"out": storage.join(out, "runs"), "name": f"{preset}-{seed}", "seed": seed}
    try:
        return TrainJob(
            storage=job.storage,
            cluster=job.cluster,
            labels=job.labels,
            model=ModelConfig(preset=preset, image_size=model.image_size, tasks=tasks),
            loss=job.loss,
            augment=job.augment,
            train=TrainConfig(**(shared | own)),
            predict=job.predict,
        )
    except ValidationError as error:  # settings that do not fit this preset
        raise ConfigError(first_message(error)) from None


def _settings(job: CompareJob) -> dict[str, Any]:
    """Return the settings that all runs share and that affect the result."""
    ignored = {*WITHOUT_EFFECT, "data", "seed"} - {"tf32", "compile"}  # these two change the measured speed
    return {
        "labels": job.labels.model_dump(mode="json"),
        "loss": job.loss.model_dump(mode="json"),
        "augment": job.augment.model_dump(mode="json"),
        "train": job.train.model_dump(mode="json", exclude=ignored),
        "predict": job.predict.model_dump(mode="json"),
        "image_size": job.compare.image_size,
        "split": job.compare.split,
    }


def store_settings(
    job: CompareJob, storage: Storage, out: str, prepared: PreparedSet, runs: Mapping[str, TrainJob]
) -> None:
    """Store the settings, or check that the folder holds a comparison with the same ones, and add those of new presets.

    Raises:
        ConfigError: it holds another comparison, or a preset was defined otherwise; the message names a setting.
    """
    presets = {run.model.preset: _preset_settings(run) for run in runs.values()}
    settings = json.loads(json.dumps(_settings(job) | {"data": prepared.digest, "presets": presets}))
    uri = storage.join(out, RECORD)
    with contextlib.suppress(MissingObject):
        before = json.loads(storage.read(uri))
        settings["presets"] = before["presets"] | settings["presets"]
        for section, values in settings.items():
            theirs = before.get(section)
            if section == "presets":
                values = {name: each for name, each in values.items() if name in theirs}
            if theirs != values:
                raise ConfigError(
                    f"compare.out {out}: holds a comparison with {_difference(section, theirs, values)}; choose "
                    "another folder"
                )
    storage.write(uri, json.dumps(settings, indent=1).encode())


def _preset_settings(run: TrainJob) -> dict[str, Any]:
    """Return what a preset stands for: its network, and the training settings that it changes."""
    own = with_preset({"model": {"preset": run.model.preset}})["train"]
    return {"model": run.model.model_dump(mode="json"), "train": own}


def _difference(key: str, theirs: object, ours: object) -> str:
    """Return the first setting that differs and both values: `train.lr 0.001, not 0.01`."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        name = next(name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name))
        return _difference(f"{key}.{name}", theirs.get(name), ours.get(name))
    return f"{key} {theirs}, not {ours}"


def _check_split(prepared: PreparedSet, job: CompareJob) -> None:
    if not prepared.splits.get(job.compare.split):
        raise ConfigError(
            f"compare.split {job.compare.split}: {prepared.uri} has no images in it; its splits are {prepared.splits}"
        )


def _is_measured(storage: Storage, out: str, name: str) -> bool:
    return storage.exists(storage.join(out, "evaluations", name, "metrics.json"))


def _run_all(
    job: CompareJob,
    runs: dict[str, TrainJob],
    out: str,
    max_concurrent: int,
    threads: int | None,
    lock: RunLock,
    console: Console,
) -> Iterator[tuple[str, str]]:
    """Run all, at most `max_concurrent` at a time; yield the name of each that ends, and why it failed if it did."""
    waiting = list(runs)
    running: dict[Any, tuple[str, float]] = {}
    start = ray.remote(num_cpus=TRIAL_CPUS, max_retries=_MAX_DEATHS)(_train_and_evaluate)
    with console.status("") as status:
        while waiting or running:
            while waiting and len(running) < max_concurrent:
                name = waiting.pop(0)
                train_job = runs[name]
                if threads is not None:
                    train = train_job.train.model_copy(update={"threads_per_worker": threads})
                    train_job = train_job.model_copy(update={"train": train})
                running[start.remote(train_job, _evaluation(job, train_job, out))] = name, time.monotonic()
            names = ", ".join(name for name, _ in running.values())
            status.update(f"{len(runs) - len(waiting) - len(running)} of {len(runs)} runs ended; running: {names}")
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


def _evaluation(job: CompareJob, run: TrainJob, out: str) -> EvaluateJob:
    storage = Storage.from_config(job.storage)
    return EvaluateJob(
        storage=job.storage,
        cluster=job.cluster,
        predict=job.predict,
        evaluate=EvaluateConfig(
            checkpoint=storage.join(run.train.out, run.train.name, "best"),
            data=str(run.train.data),
            split=job.compare.split,
            out=storage.join(out, "evaluations", run.train.name),
            use_gpu=run.train.use_gpu,
            num_workers=1,
        ),
    )


def _train_and_evaluate(train_job: TrainJob, evaluate_job: EvaluateJob) -> None:
    """One run, in a process of its own."""
    storage = Storage.from_config(train_job.storage)
    if not is_finished(storage, storage.join(train_job.train.out, train_job.train.name)):
        train(train_job, quiet=True)
    evaluate(evaluate_job, quiet=True)

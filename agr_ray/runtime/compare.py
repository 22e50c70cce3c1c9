"""Train presets on the same data with the same settings, and compare them: `agr-ray compare`.

    OUT/
      report.html, report.md, report-figures/               the page (`report.comparison_page`)
      comparison.parquet, measured.json                     the result (`report.comparison`)
      comparison.json                                       the settings that all runs share, those of each preset, and
                                                            the names of the runs
      failures.json                                         why runs failed, by name; some may be complete since
      runs/PRESET-SEED/, evaluations/PRESET-SEED/           each run

`runtime.run_matrix` makes and resumes the runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import ray
from pydantic import ValidationError

from agr_ray.config import CompareJob, EvaluateJob, ModelConfig, TrainConfig, TrainJob
from agr_ray.config.presets import with_preset
from agr_ray.config.section import first_message
from agr_ray.console import make_console
from agr_ray.data.crops import map_races, select_crops, usable_statuses
from agr_ray.data.guards import training_space
from agr_ray.data.prepared import PreparedSet, open_prepared
from agr_ray.errors import ConfigError, JobError
from agr_ray.labels import LabelSpace, race_mapping
from agr_ray.models.network import preset_config
from agr_ray.report.comparison import write_comparison
from agr_ray.report.comparison_page import RECORD
from agr_ray.runtime.cluster import cluster
from agr_ray.runtime.run_matrix import (
    TASK,
    check_record,
    evaluation_of,
    is_measured,
    run_all,
    train_and_evaluate,
    with_threads,
)
from agr_ray.runtime.train import WITHOUT_EFFECT, check_network
from agr_ray.runtime.tune import room
from agr_ray.schema import LABEL_COLUMNS
from agr_ray.storage import MissingObject, Storage
from agr_ray.storage.lock import run_lock

FAILURES: Final = "failures.json"


def compare(job: CompareJob) -> str:
    """Train and evaluate all runs that are not complete, write the result, and return the URI of report.html.

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
        failures = read_failures(storage, out)
        todo = {name: run for name, run in runs.items() if not is_measured(storage, out, name)}
        console.print(f"comparison {out}: {len(runs)} runs, {len(runs) - len(todo)} already complete")
        if todo:
            with cluster(job.cluster, trains=True):
                at_once = room(job.train, job.compare.max_concurrent, "compare.max_concurrent")
                task = ray.remote(**TASK)(train_and_evaluate)
                starts = {
                    name: partial(task.remote, with_threads(run, at_once), _evaluation(job, run, out))
                    for name, run in todo.items()
                }
                for name, problem in run_all(starts, at_once.num_trials, lock, console):
                    if problem:
                        failures[name] = problem
                        storage.write(storage.join(out, FAILURES), json.dumps(failures, indent=1).encode())
        lock.check()
        failures = read_failures(storage, out)
        page = write_comparison(storage, out, prepared, failures, job.compare.image_size, console)
    failed = [f"{name}: {failures[name]}" for name in runs if name in failures]
    if failed:
        raise JobError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")
    return page


def read_failures(storage: Storage, out: str) -> dict[str, str]:
    """Return why runs failed that are not complete, by name: those of earlier commands, too."""
    try:
        stored = json.loads(storage.read(storage.join(out, FAILURES)))
    except MissingObject:
        return {}
    return {name: problem for name, problem in stored.items() if not is_measured(storage, out, name)}


def _evaluation(job: CompareJob, run: TrainJob, out: str) -> EvaluateJob:
    return evaluation_of(job, job.predict, run, out, job.compare.split)


def _labelled_tasks(prepared: PreparedSet, storage: Storage, job: CompareJob, space: LabelSpace) -> list[str]:
    """Return the tasks of which training has a label in a label space."""
    columns = ["split", "status", *LABEL_COLUMNS]
    table = storage.read_table(prepared.crops(storage), columns=columns)
    table = map_races(table, race_mapping(prepared.label_space, space))
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
    labelled = _labelled_tasks(prepared, storage, job, space)
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
            f"it predicts {', '.join(model.tasks)}, and training has labels of {' and '.join(labelled) or 'nothing'}"
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
    ignored = {*WITHOUT_EFFECT, "data", "seed"}
    if not job.train.sync_batch_norm:  # then a batch norm sees batch_size / num_workers images
        ignored -= {"num_workers"}
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
    settings = _settings(job) | {"data": prepared.digest, "presets": presets}
    uri, key = storage.join(out, RECORD), f"compare.out {out}"
    check_record(storage, uri, settings, key, "a comparison", runs=runs, grows="presets")


def _preset_settings(run: TrainJob) -> dict[str, Any]:
    """Return what a preset stands for: its network, and the training settings that it changes."""
    own = with_preset({"model": {"preset": run.model.preset}})["train"]
    return {"model": run.model.model_dump(mode="json"), "train": own}


def _check_split(prepared: PreparedSet, job: CompareJob) -> None:
    if not prepared.splits.get(job.compare.split):
        raise ConfigError(
            f"compare.split {job.compare.split}: {prepared.uri} has no images in it; its splits are {prepared.splits}"
        )

"""Train and test a network for each fold of a prepared set: `agr-ray cross-validate`.

    OUT/
      predictions.parquet               schema.PREDICTIONS and `fold`: each image by the network that did not see it
      folds.parquet, summary.parquet    schema.FOLDS and schema.FOLD_SUMMARY
      cross-validation.json             the settings that all folds share, and the folds' names
      data/FOLD/                        the fold's prepared set (`data.fold_sets`), deleted once it is measured
      runs/FOLD/, evaluations/FOLD/     each fold's run

`runtime.run_matrix` makes and resumes the runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import ray
from rich.console import Console

from agr_ray.config import CrossValidateJob, EvaluateJob, TrainJob
from agr_ray.console import make_console, make_table
from agr_ray.data.crops import read_labels
from agr_ray.data.fold_sets import read_images, write_fold_set
from agr_ray.data.guards import training_space
from agr_ray.data.prepared import PreparedSet, open_prepared
from agr_ray.data.protocols.fold import ProtocolError, fold_splits
from agr_ray.data.protocols.registry import partitions
from agr_ray.data.splits import SplitLeakError
from agr_ray.errors import ConfigError, JobError
from agr_ray.evaluation.folds import Sums, fold_sums, fold_values, summarise
from agr_ray.labels import LabelSpace
from agr_ray.models.checkpoint import META
from agr_ray.predict.prediction_rows import read_predictions
from agr_ray.report.cross_validation_page import FOLDS_FILE, PREDICTIONS_FILE, RECORD, SUMMARY_FILE
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
from agr_ray.schema import FOLD_METRICS, FOLD_SUMMARY, FOLDS, PREDICTIONS, SPLITS
from agr_ray.storage import Storage
from agr_ray.storage.lock import run_lock

FOLD_FIELD: Final = pa.field("fold", pa.string(), nullable=False)


@dataclass(frozen=True)
class _Fold:
    splits: pa.Array
    """Of the images; null: in none."""
    num_left_out: int

    def num(self, split: str) -> int:
        """Return the number of images of a split."""
        return int(pc.sum(pc.equal(self.splits, split)).as_py() or 0)


def cross_validate(job: CrossValidateJob) -> str:
    """Train and test all folds that are not complete, write the result, and return the URI of predictions.parquet.

    Raises:
        ConfigError: the set can't be divided by the protocol, a person or an image is in two folds, another
            cross-validation is in the folder, or the cluster is too small.
        JobError: a fold failed; the others are complete, and the same command tries it again.
        LockLost: another driver has taken over the cross-validation.
    """
    console = make_console()
    storage = Storage.from_config(job.storage)
    config = job.cross_validate
    out = storage.absolute(config.out).rstrip("/")
    if len(job.train.data_uris) != 1:
        raise ConfigError(f"train.data {list(job.train.data_uris)}: a cross-validation needs one prepared set")
    storage.probe(job.train.data_uris[0], "train.data")
    storage.probe(out, "cross_validate.out", write=True)
    prepared = open_prepared(storage, job.train.data_uris[0], "train.data")
    images = read_images(storage, prepared)
    folds = divide(job, prepared, images)
    check_network(_run(job, storage, out, next(iter(folds))), [prepared], training_space([prepared], job.labels))
    lock_uri, owner = storage.join(out, "lock.json"), f"cross-validation {out}"
    with run_lock(storage, lock_uri, owner, expiry_s=job.train.lock_expiry_s, console=console) as lock:
        record = _settings(job) | {"data": prepared.digest}
        key, what = f"cross_validate.out {out}", "a cross-validation"
        check_record(storage, storage.join(out, RECORD), record, key, what, runs=folds)
        failures: dict[str, str] = {}
        todo = [name for name in folds if not is_measured(storage, out, name)]
        console.print(f"{owner}: {len(folds)} folds of {images.num_rows:,} images, {len(folds) - len(todo)} complete")
        if todo:
            with cluster(job.cluster, trains=True):
                at_once = room(job.train, config.max_concurrent, "cross_validate.max_concurrent")
                task = ray.remote(**TASK)(_train_fold)
                starts = {}
                for name in todo:
                    run = with_threads(_run(job, storage, out, name), at_once)
                    evaluation = evaluation_of(job, job.predict, run, out, "test")
                    split_of = images.select(["image_id"]).append_column("split", folds[name].splits)
                    starts[name] = partial(task.remote, prepared, split_of, run, evaluation)
                for name, problem in run_all(starts, at_once.num_trials, lock, console):
                    if problem:
                        failures[name] = problem
                    else:
                        storage.delete_tree(storage.join(out, "data", name))
        if failures:
            reasons = "; ".join(f"{name}: {problem}" for name, problem in failures.items())
            raise JobError(f"{len(failures)} of {len(folds)} folds failed: {reasons}")
        lock.check()
        uri = _write(storage, out, prepared, images, folds, console)
        storage.delete_tree(storage.join(out, "data"))
    return uri


def divide(job: CrossValidateJob, prepared: PreparedSet, images: pa.Table) -> dict[str, _Fold]:
    """Return the folds by name.

    Raises:
        ConfigError: the set can't be divided, or a person or an image would be on both sides of a fold.
    """
    config = job.cross_validate
    where = f"cross_validate.protocol {config.protocol}: {prepared.uri}"
    if not images.num_rows:
        raise ConfigError(f"{where}: no image has a crop and a split")
    try:
        parts = partitions(images, config)
        exclude = config.near_duplicates == "exclude"
        folds = {
            part.name: _Fold(*fold_splits(images, part, config.val, config.seed, exclude=exclude)) for part in parts
        }
    except ProtocolError as error:
        raise ConfigError(f"{where}: {error}") from None
    except SplitLeakError as error:
        raise ConfigError(
            f"{where}: {error}; --near_duplicates exclude leaves such images out of the training part of a fold"
        ) from None
    for name, fold in folds.items():
        for split in ("train", "test"):
            if not fold.num(split):
                raise ConfigError(f"{where}: {name} has no {split} image")
    return folds


def _run(job: CrossValidateJob, storage: Storage, out: str, name: str) -> TrainJob:
    """Return the training of a fold."""
    own = {"data": storage.join(out, "data", name), "out": storage.join(out, "runs"), "name": name}
    return job.training.model_copy(update={"train": job.train.model_copy(update=own)})


def _train_fold(prepared: PreparedSet, split_of: pa.Table, run: TrainJob, evaluation: EvaluateJob) -> None:
    """Write the set of a fold, train and evaluate, in a process of its own."""
    write_fold_set(Storage.from_config(run.storage), prepared, split_of, str(run.train.data))
    train_and_evaluate(run, evaluation)


def _settings(job: CrossValidateJob) -> dict[str, Any]:
    """Return the settings that all folds share and that affect the result."""
    return {
        "labels": job.labels.model_dump(mode="json"),
        "model": job.model.model_dump(mode="json"),
        "loss": job.loss.model_dump(mode="json"),
        "augment": job.augment.model_dump(mode="json"),
        "train": job.train.model_dump(mode="json", exclude={*WITHOUT_EFFECT, "data"}),
        "predict": job.predict.model_dump(mode="json"),
        "cross_validate": job.cross_validate.model_dump(mode="json", exclude={"out", "max_concurrent"}),
    }


def _write(
    storage: Storage,
    out: str,
    prepared: PreparedSet,
    images: pa.Table,
    folds: Mapping[str, _Fold],
    console: Console,
) -> str:
    """Write the predictions and the metrics of all folds; return the URI of the predictions.

    Raises:
        JobError: the evaluations do not hold exactly the tested images of each fold.
    """
    tables, sums = [], {}
    for name, fold in folds.items():
        table = storage.read_table(storage.join(out, "evaluations", name, "predictions.parquet"))
        tested = images["image_id"].filter(pc.equal(fold.splits, "test").fill_null(False))
        if sorted(table["image_id"].to_pylist()) != tested.to_pylist():
            raise JobError(f"{out}/evaluations/{name}: its images are not those that the fold tests")
        sums[name] = _sums(storage, out, name, prepared, table)
        tables.append(table.append_column(FOLD_FIELD, pa.array([name] * table.num_rows, pa.string())))
    schema = PREDICTIONS.append(FOLD_FIELD)
    predictions = pa.concat_tables([table.select(schema.names).cast(schema) for table in tables])
    uri = storage.join(out, PREDICTIONS_FILE)
    rows = [
        {"fold": name, "num_left_out": fold.num_left_out}
        | {f"num_{split}": fold.num(split) for split in SPLITS}
        | fold_values(sums[name])
        for name, fold in folds.items()
    ]
    summary = summarise([*sums.values()])
    storage.write_table(pa.Table.from_pylist(rows, FOLDS), storage.join(out, FOLDS_FILE))
    storage.write_table(pa.Table.from_pylist(summary, FOLD_SUMMARY), storage.join(out, SUMMARY_FILE))
    storage.write_table(predictions.sort_by([("key", "ascending"), ("fold", "ascending")]), uri)
    _print(rows, summary, console)
    num_twice = predictions.num_rows - pc.count_distinct(predictions["image_id"]).as_py()
    if num_twice:
        console.print(f"{num_twice:,} images are in neither half and are tested by both networks")
    console.print(uri)
    return uri


def _sums(storage: Storage, out: str, name: str, prepared: PreparedSet, table: pa.Table) -> Sums:
    meta = json.loads(storage.read(storage.join(out, "runs", name, "best", META)))
    space = LabelSpace.from_json(meta["label_space"])
    labels = read_labels(table, replace(space, age_groups=prepared.label_space.age_groups))
    return fold_sums(labels, read_predictions(table, meta["model"]["tasks"], space))


def _print(rows: list[dict[str, Any]], summary: list[dict[str, Any]], console: Console) -> None:
    metrics = [metric for metric in FOLD_METRICS if any(row["metric"] == metric for row in summary)]
    names = [metric.replace("_", " ").replace(" mae years", " MAE, years") for metric in metrics]
    table = make_table("fold", "train", "val", "test", *names)
    for row in rows:
        counts = [f"{row[f'num_{split}']:,}" for split in SPLITS]
        table.add_row(row["fold"], *counts, *(_number(metric, row[metric]) for metric in metrics))
    by_metric = {row["metric"]: row for row in summary}
    for label, column in (("mean", "mean"), ("± std", "std"), ("all images", "pooled")):
        table.add_row(label, "", "", "", *(_number(metric, by_metric[metric][column]) for metric in metrics))
    console.print(table)


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if metric == "age_mae_years" else f"{100 * value:.1f} %"

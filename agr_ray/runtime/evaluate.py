"""Evaluate a checkpoint on a split of any prepared set: predictions.parquet, metrics.json, calibration, model card.

Metrics cover every labelled image, including chips in which no face was found, and use the uncalibrated predictions.
A separate section measures the checkpoint's calibration. The evaluation is rejected if the checkpoint was trained on
any of the images, which are compared by content. With `--stress`, `runtime.stress` also measures corrupted images.
With `--explain`, `runtime.explain` draws sheets of faces.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import ActorPoolStrategy
from rich.console import Console

from agr_ray.config import EvaluateConfig, EvaluateJob
from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_console
from agr_ray.data.crops import read_labels, select_crops, usable_statuses
from agr_ray.data.prepared import PreparedSet, open_prepared
from agr_ray.errors import ConfigError, JobError
from agr_ray.evaluation.audit import metrics_report
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.coverage import coverage_report
from agr_ray.evaluation.metrics import Baseline
from agr_ray.evaluation.overlap import num_among, num_seen_in_training
from agr_ray.evaluation.shift import quality_values
from agr_ray.labels import LabelSpace
from agr_ray.models.checkpoint import CALIBRATION, META, Checkpoint
from agr_ray.models.checkpoint_files import add_to_card, local_checkpoint, portable_checkpoint
from agr_ray.models.checkpoint_network import content_codes, given_network
from agr_ray.models.predictions import Predictions, finite_rows
from agr_ray.predict.checkpoint_on_set import check_compatible, mapped_labels, overlap_message, training_baseline
from agr_ray.predict.crop_predictor import CropPredictor
from agr_ray.predict.downloads import one_cpu
from agr_ray.predict.prediction_rows import PredictionRows, read_rows
from agr_ray.predict.resolve import resolve
from agr_ray.progress_bar import progress
from agr_ray.report.evaluation_folder import (
    FORMAT_VERSION,
    METRICS_FILE,
    PREDICTIONS_FILE,
    is_evaluation,
    out_folder,
)
from agr_ray.report.evaluation_pair import write_pair
from agr_ray.report.evaluation_summary import (
    print_calibration,
    print_fitted,
    print_following,
    print_summary,
    vision_differences,
)
from agr_ray.runtime.cluster import cluster
from agr_ray.runtime.evaluation_workers import fitting_workers, map_parts, predicts_here
from agr_ray.runtime.explain import Explanation, explain
from agr_ray.runtime.stress import StressTest, check_corruptions, stress
from agr_ray.storage import MissingObject, Storage
from agr_ray.storage.lock import RunLock, run_lock

_OF_MODEL: Final = ("model", "transform", "data", "config", "git_commit", "created", "versions")
"""Keys of a checkpoint's meta.json that metrics.json repeats, because the checkpoint may be replaced."""


def evaluate(job: EvaluateJob, *, quiet: bool = False) -> dict[str, Any]:
    """Predict, calibrate if asked to, measure, write the files, print a summary; return the metrics.

    With `evaluate.compare`, compare two models instead, and return the content of paired.json.

    Args:
        job: what to measure.
        quiet: print nothing.

    Raises:
        ConfigError: there is no such checkpoint or set, the split is empty, training saw images of it, or ages of
            groups are to be corrected.
    """
    console = make_console(quiet=quiet)
    storage = Storage.from_config(job.storage)
    check_corruptions(job.evaluate)
    if job.evaluate.compare:
        return _compare(job, storage, console)
    return _evaluate(job, storage, console)[0]


def _compare(job: EvaluateJob, storage: Storage, console: Console) -> dict[str, Any]:
    """Compare the predictions of two models for the same images; evaluate those that are checkpoints first.

    Raises:
        ConfigError: one of them is neither a checkpoint nor an evaluation, or `data` is missing for a checkpoint.
    """
    config, folders = job.evaluate, []
    for name in config.compared:
        storage.probe(name, "evaluate.compare")
        uri = storage.absolute(name).rstrip("/")
        if not is_evaluation(storage, uri):
            if not storage.exists(storage.join(uri, META)):
                raise ConfigError(
                    f"evaluate.compare {uri}: neither a checkpoint, which has {META}, nor an evaluation, which has "
                    f"{METRICS_FILE} and {PREDICTIONS_FILE}"
                )
            if not config.data:
                raise ConfigError(f"evaluate.data is needed, because evaluate.compare {uri} is a checkpoint")
            settings = config.model_copy(update={"checkpoint": uri, "compare": "", "out": ""})
            _, uri = _evaluate(job.model_copy(update={"evaluate": settings}), storage, console)
        folders.append(uri)
    return write_pair(storage, folders[0], folders[1], config.out, console)


def _evaluate(job: EvaluateJob, storage: Storage, console: Console) -> tuple[dict[str, Any], str]:
    """Measure a checkpoint as `evaluate` does; return the metrics and the folder of the results."""
    config = job.evaluate
    for uri, name in ((config.data, "data"), (config.checkpoint, "checkpoint")):
        storage.probe(uri, f"evaluate.{name}")
    if config.out:
        storage.probe(config.out, "evaluate.out", write=True)
    prepared = open_prepared(storage, config.data, "evaluate.data")
    trained_on = prepared
    if config.explain_train_data:
        storage.probe(config.explain_train_data, "evaluate.explain_train_data")
        trained_on = open_prepared(storage, config.explain_train_data, "evaluate.explain_train_data")
    checkpoint = storage.absolute(config.checkpoint).rstrip("/")
    with local_checkpoint(storage, checkpoint, "evaluate.checkpoint") as loaded:
        model = given_network(loaded, checkpoint, "evaluate.checkpoint")
        directory, meta, digest, space = loaded.directory, loaded.meta, loaded.digest, loaded.space
        check_compatible(loaded.transform, prepared, config.checkpoint, "evaluate.data")
        if trained_on is not prepared:
            check_compatible(loaded.transform, trained_on, config.checkpoint, "evaluate.explain_train_data")
        if config.correct_age and loaded.config.age_head == "groups":
            raise ConfigError(
                "evaluate.correct_age: the age head groups predicts an age for each group, which the correction could "
                "move into another group"
            )
        measured_in, mapping = mapped_labels(loaded, prepared)
        pipeline, calibration, reason = resolve(
            loaded,
            Pipeline(predict=job.predict),
            key="evaluate.checkpoint",
            on_gpu=config.use_gpu,
            allow_uncalibrated=config.allow_uncalibrated,
            recalibrate=config.calibrate,
        )
        if (directory / CALIBRATION).exists() and reason:
            console.print(f"warning: {reason}")
        measured = Pipeline(vision=prepared.vision, predict=pipeline.predict)
        for line in vision_differences(measured, pipeline, calibrates=config.calibrate, calibration=calibration):
            console.print(line)
        out = out_folder(storage, config, checkpoint, digest, prepared, measured)
        chosen, statuses = _chosen_rows(storage, prepared, config)
        num_seen = num_seen_in_training(directory, chosen)
        if num_seen != 0 and not config.allow_overlap:
            raise ConfigError(overlap_message(num_seen, chosen.num_rows, checkpoint, prepared, config))
        with ExitStack() as stack:
            # The lock is beside the checkpoint, not inside it, because checkpoints are copied as whole folders.
            written = [checkpoint, out] if config.calibrate else [out]
            owner, expiry_s = f"evaluation {out}", config.lock_expiry_s
            held = (run_lock(storage, f"{uri}.lock", owner, expiry_s=expiry_s, console=console) for uri in written)
            locks = [stack.enter_context(lock) for lock in held]
            packed = portable_checkpoint(directory)
            arguments = (storage, packed, prepared.crop_side_px, config, measured.predict, mapping)
            if predicts_here(config, chosen.num_rows):
                stack.enter_context(one_cpu())
                predicted = _predict_here(storage, prepared, arguments)
            else:
                stack.enter_context(cluster(job.cluster))
                num_workers, gpus = fitting_workers(config)
                pool = ActorPoolStrategy(size=num_workers)
                predicted = map_parts(CropPredictor, arguments, storage, prepared, pool, gpus)
            table, images_per_s = _collect(predicted, chosen.num_rows, locks, console)
            rows = read_rows(table.to_batches(), table.num_rows, loaded.tasks, space, measured_in)
            _check_finite(rows.predictions, checkpoint)
            precisions = tuple(sorted(set(table["precision"].to_pylist())))
            if config.calibrate:
                calibration = Calibration.fit(
                    read_labels(table, space),
                    rows.predictions,
                    coverage=config.coverage,
                    risk=config.abstain_risk,
                    correct_age=config.correct_age,
                    model_digest=digest,
                    pipeline=measured,
                    precisions=precisions,
                    split_manifest_sha256=prepared.split_manifest_sha256,
                    content_codes=tuple(content_codes(chosen["content_hash"].to_pylist()).tolist()),
                    num_seen_in_training=num_seen,
                    quality=quality_values(table),
                )
                _check_unchanged(storage, checkpoint, directory)
                text = json.dumps(calibration.to_json(), allow_nan=False) + "\n"
                _check(locks)
                storage.write(storage.join(checkpoint, CALIBRATION), text.encode())
                (directory / CALIBRATION).write_text(text)
            metrics = _measure(rows, calibration, config, training_baseline(meta, space), console)
            if calibration is not None:
                warning = calibration.precision_warning(precisions)
                if warning:
                    console.print(f"warning: {warning}")
                metrics["calibration"] = coverage_report(rows.labels, rows.predictions, calibration) | {
                    "num_calibrated_on": calibration.n,
                    "num_seen_in_calibration": num_among(chosen, set(calibration.content_codes)),
                    "num_seen_in_training": calibration.num_seen_in_training,
                    "warning": calibration.overlap_warning,
                    "calibrated_on_split_manifest_sha256": calibration.split_manifest_sha256,
                    "notes": list(calibration.notes),
                }
            record = _record(config, checkpoint, digest, meta, prepared, measured, loaded, measured_in, mapping)
            metrics["evaluation"] = record | {
                "precisions": list(precisions),
                "num_seen_in_training": num_seen,
                "statuses": statuses,
                "calibration_sha256": _sha256(directory / CALIBRATION),
            }
            _check(locks)
            storage.write_table(table, storage.join(out, PREDICTIONS_FILE))
            _write_metrics(storage, out, metrics, locks)
            _check(locks)
            add_to_card(storage, checkpoint, metrics, console)
            print_summary(console, metrics, out)
            if config.calibrate and calibration is not None:
                print_fitted(console, calibration, storage.join(checkpoint, CALIBRATION))
            if calibration is not None:
                print_calibration(console, metrics)
            if config.explain:
                explanation = Explanation(
                    storage=storage,
                    config=config,
                    predict=measured.predict,
                    cluster=job.cluster,
                    prepared=prepared,
                    trained_on=trained_on,
                    out=out,
                    loaded=loaded,
                    model=model,
                    checkpoint=packed,
                    measured_in=measured_in,
                    predictions=table,
                )
                metrics["explain"] = explain(explanation, lambda: _check(locks), console)
                _write_metrics(storage, out, metrics, locks)
            if config.stress:
                test = StressTest(
                    storage=storage,
                    config=config,
                    predict=measured.predict,
                    cluster=job.cluster,
                    prepared=prepared,
                    out=out,
                    checkpoint=packed,
                    model_digest=digest,
                    tasks=loaded.tasks,
                    space=space,
                    measured_in=measured_in,
                    predictions=table,
                    metrics=metrics,
                    images_per_s=images_per_s,
                )
                metrics["stress"] = stress(test, lambda: _check(locks), console)
                _write_metrics(storage, out, metrics, locks)
                _check(locks)
                add_to_card(storage, checkpoint, metrics, console)
            print_following(console, config, checkpoint, prepared.uri, out)
    return metrics, out


def _sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file, in hex; None if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _write_metrics(storage: Storage, out: str, metrics: Mapping[str, Any], locks: Sequence[RunLock]) -> None:
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    _check(locks)
    storage.write(storage.join(out, METRICS_FILE), text.encode())


def _record(
    config: EvaluateConfig,
    checkpoint: str,
    digest: str,
    meta: Mapping[str, Any],
    prepared: PreparedSet,
    measured: Pipeline,
    loaded: Checkpoint,
    measured_in: LabelSpace,
    mapping: Mapping[str, str],
) -> dict[str, Any]:
    """Return the section of metrics.json about the evaluation itself: the model, the data and the settings."""
    is_mapped = prepared.label_space != loaded.space
    label_mapping = {
        "from": prepared.label_space.name,
        "races": dict(mapping),
        "age_groups": list(measured_in.age_groups),
    }
    return {
        "format_version": FORMAT_VERSION,
        "checkpoint": checkpoint,
        "model_digest": digest,
        "data": prepared.uri,
        "source": prepared.source,
        "split": config.split,
        "split_manifest_sha256": prepared.split_manifest_sha256,
        "trained_on_split_manifest_sha256": meta["data"].get("split_manifest_sha256"),
        **measured.to_json(),
        "tasks": list(loaded.tasks),
        "label_space": loaded.space.to_json(),
        "model": {key: meta[key] for key in _OF_MODEL},
        "label_mapping": label_mapping if is_mapped else None,
    }


def _check(locks: Sequence[RunLock]) -> None:
    """Check that this process still holds all locks.

    Raises:
        LockLost: at least one lock was lost.
    """
    for lock in locks:
        lock.check()


def _check_finite(predictions: Predictions, checkpoint: str) -> None:
    """Reject non-finite predictions, because metrics would count a NaN as some class.

    Raises:
        JobError: some predictions are not finite.
    """
    bad = ~finite_rows(predictions)
    if bad.any():
        raise JobError(
            f"evaluate.checkpoint {checkpoint}: its predictions for {bad.sum():,} of {len(bad):,} images are not "
            "finite; the model is damaged, or its training diverged"
        )


def _check_unchanged(storage: Storage, checkpoint: str, directory: Path) -> None:
    """Refuse to write into a checkpoint that was replaced since it was read.

    Raises:
        JobError: the checkpoint was replaced.
    """
    with contextlib.suppress(MissingObject):
        if storage.read(storage.join(checkpoint, META)) == (directory / META).read_bytes():
            return
    raise JobError(f"evaluate.checkpoint {checkpoint}: was replaced during the evaluation; evaluate it again")


def _chosen_rows(storage: Storage, prepared: PreparedSet, config: EvaluateConfig) -> tuple[pa.Table, dict[str, int]]:
    """Return the rows to measure, and the number of rows of the split by status: some have no crop."""
    rows = storage.read_table(prepared.crops(storage), columns=["content_hash", "split", "status"])
    in_split = rows if config.split == "all" else rows.filter(pc.equal(rows["split"], config.split))
    statuses = Counter(in_split["status"].to_pylist())
    rows = select_crops(rows, config.split, usable_statuses(use_fallback=True))
    if not rows.num_rows:
        raise ConfigError(f"evaluate.split {config.split}: no crop in it; {prepared.uri} has {prepared.splits}")
    return rows, dict(sorted(statuses.items()))


def _predict_here(storage: Storage, prepared: PreparedSet, arguments: Sequence[Any]) -> Iterator[pa.Table]:
    """Yield predictions that this process makes, on one CPU like a worker, so that they are the same to the last bit.

    `arguments` are those of `CropPredictor`.
    """
    predictor = CropPredictor(*arguments)
    yield from predictor(pa.table({"part": prepared.parts(storage)}))


def _collect(
    predicted: Iterator[pa.Table], num_rows: int, locks: Sequence[RunLock], console: Console
) -> tuple[pa.Table, float]:
    """Return all predictions of the split, sorted by key, and the rate, in images/s, since the first of them."""
    tables = []
    since_s, num_before = time.monotonic(), 0
    with progress(console, "predicting", num_rows) as update:
        for table in predicted:
            _check(locks)
            tables.append(table)
            if len(tables) == 1 and table.num_rows < num_rows:  # starting the workers is over
                since_s, num_before = time.monotonic(), table.num_rows
            update(sum(each.num_rows for each in tables), "")
    result = pa.concat_tables(tables).sort_by("key")
    if result.num_rows != num_rows:
        raise RuntimeError(f"{result.num_rows} predictions for {num_rows} crops")
    return result, (num_rows - num_before) / max(time.monotonic() - since_s, 1e-3)


def _measure(
    rows: PredictionRows,
    calibration: Calibration | None,
    config: EvaluateConfig,
    baseline: Baseline | None,
    console: Console,
) -> dict[str, Any]:
    """Return the metrics. If age is calibrated, the widths of its intervals say how certain each age is."""
    widths = None
    if calibration is not None:
        calibrated = calibration.apply(rows.predictions)
        if calibrated.age_low is not None and calibrated.age_high is not None:
            widths = calibrated.age_high - calibrated.age_low
    with progress(console, "measuring", len(rows.labels)) as update:
        return metrics_report(
            rows.labels,
            rows.predictions,
            rows.fallback,
            baseline,
            rows.persons,
            age_uncertainty=widths,
            age_thresholds=config.age_thresholds,
            age_buffer_years=config.age_buffer_years,
            update=update,
        )

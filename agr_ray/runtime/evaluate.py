"""Evaluate a checkpoint on a split of any prepared set: predictions.parquet, metrics.json, calibration, model card.

Metrics cover every labelled image, including chips in which no face was found, and use the uncalibrated predictions.
A separate section measures the checkpoint's calibration. The evaluation is rejected if the checkpoint was trained on
any of the images, which are compared by content.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import ActorPoolStrategy
from rich.console import Console

from agr_ray.config import EvaluateConfig, EvaluateJob
from agr_ray.config import digest as digest_of
from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_console
from agr_ray.data.crops import read_labels, select_crops, usable_statuses
from agr_ray.data.prepared import PreparedSet, open_prepared
from agr_ray.errors import ConfigError, JobError
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.coverage import coverage_report
from agr_ray.evaluation.metrics import Baseline, metrics_report
from agr_ray.evaluation.overlap import num_among, num_seen_in_training
from agr_ray.labels import Labels, LabelSpace, race_mapping
from agr_ray.models.checkpoint import CALIBRATION, META, content_codes
from agr_ray.models.checkpoint_files import add_to_card, local_checkpoint, portable_checkpoint
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.predictions import Predictions
from agr_ray.models.transform import Transform
from agr_ray.predict.crop_predictor import CropPredictor, read_predictions
from agr_ray.predict.downloads import one_cpu, use_one_cpu
from agr_ray.predict.resolve import resolve
from agr_ray.progress_bar import progress
from agr_ray.report.evaluation_summary import print_calibration, print_fitted, print_summary, vision_differences
from agr_ray.runtime.cluster import check_fits, cluster, worker_count
from agr_ray.runtime.crop_stream import part_dataset
from agr_ray.schema import Status
from agr_ray.storage import MissingObject, Storage
from agr_ray.storage.lock import RunLock, run_lock

FORMAT_VERSION: Final = 1
PREDICTIONS_FILE: Final = "predictions.parquet"
_MOST_ROWS_HERE: Final = 200
"""Most crops that this process predicts itself unless `evaluate.num_workers` is set. On one CPU, a ResNet50 at 224 px
takes 17 s for them, about as long as starting Ray and a worker."""


def evaluate(job: EvaluateJob, *, quiet: bool = False) -> dict[str, Any]:
    """Predict, calibrate if asked to, measure, write the files, print a summary; return the metrics.

    Args:
        job: what to measure.
        quiet: print nothing.

    Raises:
        ConfigError: there is no such checkpoint or set, the split is empty, training saw images of it, or ages of
            groups are to be corrected.
    """
    console = make_console(quiet=quiet)
    config = job.evaluate
    storage = Storage.from_config(job.storage)
    for uri, name in ((config.data, "data"), (config.checkpoint, "checkpoint")):
        storage.probe(uri, f"evaluate.{name}")
    if config.out:
        storage.probe(config.out, "evaluate.out", write=True)
    prepared = open_prepared(storage, config.data, "evaluate.data")
    checkpoint = storage.absolute(config.checkpoint).rstrip("/")
    with local_checkpoint(storage, checkpoint, "evaluate.checkpoint") as loaded:
        directory, meta, digest, space = loaded.directory, loaded.meta, loaded.digest, loaded.model.space
        _check_compatible(loaded.transform, prepared, config)
        if config.correct_age and loaded.model.config.age_head == "groups":
            raise ConfigError(
                "evaluate.correct_age: the age head groups predicts an age for each group, which the correction could "
                "move into another group"
            )
        measured_in, mapping = _mapped(loaded.model, prepared)
        pipeline, calibration, reason = resolve(
            loaded,
            Pipeline(predict=job.predict),
            key="evaluate.checkpoint",
            allow_uncalibrated=config.allow_uncalibrated,
            recalibrate=config.calibrate,
        )
        if (directory / CALIBRATION).exists() and reason:
            console.print(f"warning: {reason}")
        measured = Pipeline(vision=prepared.vision, predict=pipeline.predict)
        for line in vision_differences(measured, pipeline, calibrates=config.calibrate, calibration=calibration):
            console.print(line)
        out = _out(storage, config, checkpoint, digest, prepared, measured)
        chosen, statuses = _chosen_rows(storage, prepared, config)
        num_seen = num_seen_in_training(directory, chosen)
        if num_seen != 0 and not config.allow_overlap:
            raise ConfigError(_overlap(num_seen, chosen.num_rows, checkpoint, prepared, config))
        with ExitStack() as stack:
            # The lock is beside the checkpoint, not inside it, because checkpoints are copied as whole folders.
            written = [checkpoint, out] if config.calibrate else [out]
            owner, expiry_s = f"evaluation {out}", config.lock_expiry_s
            held = (run_lock(storage, f"{uri}.lock", owner, expiry_s=expiry_s, console=console) for uri in written)
            locks = [stack.enter_context(lock) for lock in held]
            packed = portable_checkpoint(directory)
            arguments = (storage, packed, prepared.crop_side_px, config, measured.predict, mapping)
            if config.num_workers is None and not config.use_gpu and chosen.num_rows <= _MOST_ROWS_HERE:
                stack.enter_context(one_cpu())
                predicted = _predict_here(storage, prepared, arguments)
            else:
                stack.enter_context(cluster(job.cluster))
                predicted = _predict_in_workers(config, storage, prepared, arguments)
            table = _collect(predicted, chosen.num_rows, locks, console)
            predictions = read_predictions(table, loaded.model.tasks, space)
            labels = read_labels(table, measured_in)
            _check_finite(predictions, checkpoint)
            precisions = tuple(sorted(set(table["precision"].to_pylist())))
            if config.calibrate:
                calibration = Calibration.fit(
                    read_labels(table, space),
                    predictions,
                    coverage=config.coverage,
                    risk=config.abstain_risk,
                    correct_age=config.correct_age,
                    model_digest=digest,
                    pipeline=measured,
                    precisions=precisions,
                    split_manifest_sha256=prepared.split_manifest_sha256,
                    content_codes=tuple(content_codes(chosen["content_hash"].to_pylist()).tolist()),
                    num_seen_in_training=num_seen,
                )
                _check_unchanged(storage, checkpoint, directory)
                text = json.dumps(calibration.to_json(), allow_nan=False) + "\n"
                _check(locks)
                storage.write(storage.join(checkpoint, CALIBRATION), text.encode())
            metrics = _measure(table, labels, predictions, meta, space)
            if calibration is not None:
                warning = calibration.precision_warning(precisions)
                if warning:
                    console.print(f"warning: {warning}")
                metrics["calibration"] = coverage_report(labels, predictions, calibration) | {
                    "num_calibrated_on": calibration.n,
                    "num_seen_in_calibration": num_among(chosen, set(calibration.content_codes)),
                    "num_seen_in_training": calibration.num_seen_in_training,
                    "warning": calibration.overlap_warning,
                    "calibrated_on_split_manifest_sha256": calibration.split_manifest_sha256,
                    "notes": list(calibration.notes),
                }
            record = _record(config, checkpoint, digest, meta, prepared, measured, space, measured_in, mapping)
            metrics["evaluation"] = record | {
                "precisions": list(precisions),
                "num_seen_in_training": num_seen,
                "statuses": statuses,
            }
            _check(locks)
            storage.write_table(table, storage.join(out, PREDICTIONS_FILE))
            text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
            _check(locks)
            storage.write(storage.join(out, "metrics.json"), text.encode())
            _check(locks)
            add_to_card(storage, checkpoint, metrics, console)
    print_summary(console, metrics, out)
    if config.calibrate and calibration is not None:
        print_fitted(console, calibration, storage.join(checkpoint, CALIBRATION))
    if calibration is not None:
        print_calibration(console, metrics["calibration"])
    return metrics


def _overlap(
    num_seen: int | None, num_rows: int, checkpoint: str, prepared: PreparedSet, config: EvaluateConfig
) -> str:
    """Return why the evaluation is rejected: training saw, or may have seen, some of its images."""
    problem = (
        f"evaluate.checkpoint {checkpoint}: does not say on which images it was trained"
        if num_seen is None
        else f"evaluate.split {config.split} of {prepared.uri}: the checkpoint was trained on {num_seen:,} of its "
        f"{num_rows:,} images"
    )
    return f"{problem}; --evaluate.allow_overlap true measures them anyway"


def _record(
    config: EvaluateConfig,
    checkpoint: str,
    digest: str,
    meta: Mapping[str, Any],
    prepared: PreparedSet,
    measured: Pipeline,
    space: LabelSpace,
    measured_in: LabelSpace,
    mapping: Mapping[str, str],
) -> dict[str, Any]:
    """Return the section of metrics.json about the evaluation itself: the model, the data and the settings."""
    is_mapped = prepared.label_space != space
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
        "label_space": space.name,
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
    bad = np.zeros(1, bool)
    for values in predictions.values():
        bad = bad | ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
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


def _out(
    storage: Storage, config: EvaluateConfig, checkpoint: str, model: str, prepared: PreparedSet, pipeline: Pipeline
) -> str:
    """Return the folder of the results; the same evaluation replaces itself there.

    Raises:
        ConfigError: the configured one holds something else.
    """
    if not config.out:
        return f"{checkpoint}-eval-{config.split}-{prepared.digest[:8]}-{digest_of(pipeline.predict)[:4]}"
    out = storage.absolute(config.out).rstrip("/")
    try:
        existing = json.loads(storage.read(storage.join(out, "metrics.json")))["evaluation"]
        theirs = tuple(existing[name] for name in ("model_digest", "split_manifest_sha256", "split", "predict"))
        title = f"the evaluation of {existing['checkpoint']} on split {existing['split']} of {existing['data']}"
    except MissingObject:
        # A job that was killed while it wrote has left no metrics.json, which is written last.
        if not storage.exists(out) or all(info.key == PREDICTIONS_FILE for info in storage.list(out)):
            return out
        theirs, title = (), "files, but no evaluation"
    except (ValueError, KeyError, TypeError):
        theirs, title = (), "a metrics.json that no evaluation wrote"
    if theirs != (model, prepared.split_manifest_sha256, config.split, pipeline.predict.model_dump(mode="json")):
        raise ConfigError(f"evaluate.out {out}: holds {title}; choose another folder")
    return out


def _check_compatible(transform: Transform, prepared: PreparedSet, config: EvaluateConfig) -> None:
    """Reject crops that the checkpoint's transform does not fit."""
    for key, needed, found in (
        ("crop_side_px", transform.crop_side_px, prepared.crop_side_px),
        ("template", transform.template, prepared.settings["template"]),
    ):
        if needed != found:
            raise ConfigError(
                f"evaluate.data {prepared.uri}: its crops have {key} {found}; the checkpoint {config.checkpoint} "
                f"needs {needed}: prepare the source again with that"
            )


def _mapped(model: MultiTaskNet, prepared: PreparedSet) -> tuple[LabelSpace, dict[str, str]]:
    """Return the label space to measure in, and the race in it for each race of the data.

    Races are the checkpoint's, or the data's if it has no race head; age groups are the data's, because an age in years
    has a group in any space, and an age range lies in a group of its own space.

    Raises:
        ConfigError: the data's races do not map onto the checkpoint's.
    """
    space, data = model.space, prepared.label_space
    if space == data:
        return space, race_mapping(data, space)
    measured_in = replace(space, age_groups=data.age_groups)
    if "race" not in model.tasks:
        measured_in = replace(measured_in, races=data.races)
    try:
        return measured_in, race_mapping(data, measured_in)
    except ValueError as error:
        raise ConfigError(f"evaluate.data {prepared.uri}: {error}") from None


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

    `arguments` are those of `CropPredictor`, as in `_predict_in_workers`.
    """
    predictor = CropPredictor(*arguments)
    yield from predictor(pa.table({"part": prepared.parts(storage)}))


class _Worker(CropPredictor):
    """A predictor with a process and a CPU of its own."""

    def __init__(self, *arguments: Any) -> None:
        use_one_cpu()
        super().__init__(*arguments)


def _predict_in_workers(
    config: EvaluateConfig, storage: Storage, prepared: PreparedSet, arguments: Sequence[Any]
) -> Iterator[pa.Table]:
    """Yield predictions that Ray's workers make."""
    gpus = 1.0 if config.use_gpu else 0.0
    num_workers = worker_count(config.num_workers, use_gpu=config.use_gpu)
    check_fits("evaluate.num_workers", num_workers, 1.0, gpus)
    predictions = part_dataset(storage, prepared).map_batches(
        _Worker,
        fn_constructor_args=tuple(arguments),
        batch_format="pyarrow",
        batch_size=1,
        compute=ActorPoolStrategy(size=num_workers),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    for table in predictions.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(table, pa.Table)
        yield table


def _collect(predicted: Iterator[pa.Table], num_rows: int, locks: Sequence[RunLock], console: Console) -> pa.Table:
    """Return all predictions of the split, sorted by key."""
    tables = []
    with progress(console, "predicting", num_rows) as update:
        for table in predicted:
            _check(locks)
            tables.append(table)
            update(sum(each.num_rows for each in tables), "")
    result = pa.concat_tables(tables).sort_by("key")
    if result.num_rows != num_rows:
        raise RuntimeError(f"{result.num_rows} predictions for {num_rows} crops")
    return result


def _measure(
    table: pa.Table, labels: Labels, predictions: Predictions, meta: Mapping[str, Any], space: LabelSpace
) -> dict[str, Any]:
    subjects = pc.rank(table["group_id"], tiebreaker="dense") if table["group_id"].null_count == 0 else None
    return metrics_report(
        labels,
        predictions,
        fallback=np.asarray(pc.equal(table["status"], str(Status.FALLBACK))),
        baseline=_training_baseline(meta, space),
        clusters=None if subjects is None else np.asarray(subjects).astype(np.int64),
    )


def _training_baseline(meta: Mapping[str, Any], space: LabelSpace) -> Baseline | None:
    """Return the constant baseline fitted on the training labels; None if the checkpoint does not hold it."""
    values = meta["data"].get("baseline")
    return None if values is None else Baseline.from_json(values, space)

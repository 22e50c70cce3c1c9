"""A checkpoint on a split of any prepared set -> predictions.parquet and metrics.json.

Accuracy is over every labelled image, chips in which no face was found included. Images that the checkpoint was
trained on are looked for by content, and refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from ray.data import ActorPoolStrategy
from rich.console import Console
from rich.table import Table

from agr_ray.config import ConfigError, EvaluateConfig, EvaluateJob, PredictConfig
from agr_ray.config import digest as digest_of
from agr_ray.learn.metrics import Baseline, Labels, metrics_report, predicted_gender
from agr_ray.learn.predict import Predictions, predict
from agr_ray.models.checkpoint import (
    TRAIN_STATE,
    CheckpointError,
    content_codes,
    load_checkpoint,
    load_train_state,
    model_digest,
    read_meta,
)
from agr_ray.runtime.checkpoints import local_checkpoint, portable_checkpoint, unpacked_checkpoint
from agr_ray.runtime.cluster import check_fits, cluster, worker_count
from agr_ray.runtime.crops import decoded_crops, label_arrays, part_dataset, select_crops, usable_statuses
from agr_ray.runtime.prepared import PreparedSet, open_prepared
from agr_ray.runtime.progress import progress
from agr_ray.schema import GENDERS, PREDICTION_FIELDS, PREDICTIONS, RACES, Status
from agr_ray.storage import Storage

FORMAT_VERSION: Final = 1
_KEPT_COLUMNS: Final = tuple(field.name for field in PREDICTIONS if field not in PREDICTION_FIELDS)


def evaluate(job: EvaluateJob) -> dict[str, Any]:
    """Predict, measure, write both files, print a summary; return the metrics.

    Raises:
        ConfigError: there is no such checkpoint or set, the split is empty, or training saw images of it.
    """
    console = Console()
    config = job.evaluate
    storage = Storage.from_config(job.storage)
    prepared = open_prepared(storage, config.data, "evaluate.data")
    checkpoint = storage.absolute(config.checkpoint).rstrip("/")
    with local_checkpoint(storage, checkpoint, "evaluate.checkpoint") as directory:
        meta, digest = read_meta(directory), model_digest(directory)
        _check_compatible(meta, prepared, config)
        chosen = _chosen_rows(storage, prepared, config)
        num_seen = _num_seen_in_training(directory, chosen)
        if num_seen != 0 and not config.allow_overlap:
            said = (
                f"evaluate.checkpoint {checkpoint}: does not say on which images it was trained"
                if num_seen is None
                else f"evaluate.split {config.split} of {prepared.uri}: the checkpoint was trained on {num_seen:,} of "
                f"its {chosen.num_rows:,} images"
            )
            raise ConfigError(f"{said}; --evaluate.allow_overlap true measures all the same")
        with cluster(job.cluster):
            table = _predict(job, storage, prepared, chosen.num_rows, portable_checkpoint(directory), console)
    metrics = _measure(table, meta)
    metrics["evaluation"] = {
        "format_version": FORMAT_VERSION,
        "checkpoint": checkpoint,
        "model_digest": digest,
        "data": prepared.uri,
        "source": prepared.source,
        "split": config.split,
        "split_manifest_sha256": prepared.split_manifest_sha256,
        "trained_on_split_manifest_sha256": meta["data"].get("split_manifest_sha256"),
        "num_seen_in_training": num_seen,
        "statuses": prepared.counts,
        "predict": job.predict.model_dump(mode="json"),
    }
    default_out = f"{checkpoint}-eval-{config.split}-{prepared.digest[:8]}-{digest_of(job.predict)[:4]}"
    out = storage.absolute(config.out or default_out).rstrip("/")
    storage.write_table(table, storage.join(out, "predictions.parquet"))
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    storage.write(storage.join(out, "metrics.json"), text.encode())
    _print_summary(console, metrics, out)
    return metrics


class CropPredictor:
    """Parts of crop rows -> rows of schema.PREDICTIONS. One worker's own."""

    def __init__(
        self,
        storage: Storage,
        checkpoint: dict[str, bytes],
        side_px: int,
        config: EvaluateConfig,
        predict_config: PredictConfig,
    ) -> None:
        torch.set_num_threads(1)
        with unpacked_checkpoint(checkpoint) as directory:
            loaded = load_checkpoint(directory, device="cuda" if config.use_gpu else "cpu")
        self._model, self._transform = loaded.model, loaded.transform
        self._storage = storage
        self._side_px = side_px
        self._config = config
        self._predict_config = predict_config

    def __call__(self, parts: pa.Table) -> Iterator[pa.Table]:
        """Yield the predictions of the split's crops in each of the parts."""
        for uri in parts["part"].to_pylist():
            rows = self._storage.read_table(uri, columns=[*_KEPT_COLUMNS, "crop"])
            rows = select_crops(rows, self._config.split, usable_statuses(use_fallback=True))
            for start in range(0, rows.num_rows, self._config.batch_size):
                batch = rows.slice(start, self._config.batch_size)
                made = predict(self._model, decoded_crops(batch, self._side_px), self._transform, self._predict_config)
                columns = {name: batch[name] for name in _KEPT_COLUMNS} | prediction_columns(made, batch.num_rows)
                yield pa.table(columns, schema=PREDICTIONS)


def prediction_columns(made: Predictions, num_rows: int) -> dict[str, pa.Array]:
    """Return the columns of schema.PREDICTION_FIELDS; a task without a head gives nulls."""
    columns = {field.name: pa.nulls(num_rows, field.type) for field in PREDICTION_FIELDS}
    if made.age is not None:
        columns["age_pred"] = pa.array(made.age)
    if made.p_male is not None:
        columns["p_male"] = pa.array(made.p_male)
        columns["gender_pred"] = pa.array(np.asarray(GENDERS)[predicted_gender(made.p_male)])
    if made.race_probs is not None:
        columns["race_pred"] = pa.array(np.asarray(RACES)[made.race_probs.argmax(axis=1)])
        columns["race_probs"] = pa.FixedSizeListArray.from_arrays(made.race_probs.ravel(), len(RACES))
    return columns


def _check_compatible(meta: dict[str, Any], prepared: PreparedSet, config: EvaluateConfig) -> None:
    """Refuse crops that the checkpoint's transform does not fit."""
    transform = meta["transform"]
    for key, needed, found in (
        ("crop_side_px", transform["crop_side_px"], prepared.crop_side_px),
        ("template", transform["template"], prepared.settings["template"]),
    ):
        if needed != found:
            raise ConfigError(
                f"evaluate.data {prepared.uri}: its crops have {key} {found}; the checkpoint {config.checkpoint} "
                f"was trained on {needed}: prepare the source again with that"
            )


def _chosen_rows(storage: Storage, prepared: PreparedSet, config: EvaluateConfig) -> pa.Table:
    rows = storage.read_table(prepared.crops(storage), columns=["content_hash", "split", "status"])
    rows = select_crops(rows, config.split, usable_statuses(use_fallback=True))
    if not rows.num_rows:
        raise ConfigError(f"evaluate.split {config.split}: no crop in it; {prepared.uri} has {prepared.splits}")
    return rows


def _num_seen_in_training(directory: Path, chosen: pa.Table) -> int | None:
    """Count the images whose content the checkpoint was trained on; None if it does not say."""
    if not (directory / TRAIN_STATE).exists():
        return None
    try:
        state = load_train_state(directory)
    except CheckpointError as error:
        raise ConfigError(f"evaluate.checkpoint: {error}") from None
    if "train_images" not in state:
        return None
    seen = set(state["train_images"].tolist())
    return sum(int(content_codes([content])[0]) in seen for content in chosen["content_hash"].to_pylist())


def _predict(
    job: EvaluateJob, storage: Storage, prepared: PreparedSet, num_rows: int, checkpoint: Any, console: Console
) -> pa.Table:
    """Return the predictions of the split, sorted by key."""
    config = job.evaluate
    gpus = 1.0 if config.use_gpu else 0.0
    num_workers = worker_count(config.num_workers, use_gpu=config.use_gpu)
    check_fits("evaluate.num_workers", num_workers, 1.0, gpus)
    predictions = part_dataset(storage, prepared).map_batches(
        CropPredictor,
        fn_constructor_args=(storage, checkpoint, prepared.crop_side_px, config, job.predict),
        batch_format="pyarrow",
        batch_size=1,
        compute=ActorPoolStrategy(size=num_workers),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    tables = []
    with progress(console, "predicting", num_rows) as update:
        for table in predictions.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(table, pa.Table)
            tables.append(table)
            update(sum(each.num_rows for each in tables), "")
    made = pa.concat_tables(tables).sort_by("key")
    if made.num_rows != num_rows:
        raise RuntimeError(f"{made.num_rows} predictions of {num_rows} crops")
    return made


def _measure(table: pa.Table, meta: dict[str, Any]) -> dict[str, Any]:
    def array(name: str) -> Any:
        return None if table[name].null_count == table.num_rows else np.asarray(table[name])

    race_probs = None
    if table["race_probs"].null_count < table.num_rows:
        race_probs = np.asarray(table["race_probs"].combine_chunks().flatten()).reshape(-1, len(RACES))
    subjects = pc.rank(table["group_id"], tiebreaker="dense") if table["group_id"].null_count == 0 else None
    return metrics_report(
        Labels(**label_arrays(table)),
        Predictions(array("age_pred"), array("p_male"), race_probs),
        fallback=np.asarray(pc.equal(table["status"], str(Status.FALLBACK))),
        baseline=_training_baseline(meta),
        clusters=None if subjects is None else np.asarray(subjects).astype(np.int64),
    )


def _training_baseline(meta: dict[str, Any]) -> Baseline | None:
    """Return the guesses fitted on the training labels; None for a checkpoint that does not hold them."""
    said = meta["data"].get("baseline")
    if said is None:
        return None
    gender, race = said["gender"], said["race"]
    return Baseline(
        said["age_years"],
        None if gender is None else GENDERS.index(gender),
        None if race is None else RACES.index(race),
        "train",
    )


def _print_summary(console: Console, metrics: dict[str, Any], out: str) -> None:
    said = metrics["evaluation"]
    table = Table("metric", "model", "95 % interval", "baseline", title=f"{said['source']}, split {said['split']}")
    for task, name, label, scale, unit in (
        ("age", "mae_years", "age MAE", 1.0, " years"),
        ("age", "within_5", "age within 5 years", 100.0, " %"),
        ("age", "one_off", "age group or the next", 100.0, " %"),
        ("age", "bias_years", "age bias", 1.0, " years"),
        ("gender", "accuracy", "gender accuracy", 100.0, " %"),
        ("gender", "balanced_accuracy", "gender balanced accuracy", 100.0, " %"),
        ("race", "accuracy", "race accuracy", 100.0, " %"),
        ("race", "balanced_accuracy", "race balanced accuracy", 100.0, " %"),
    ):
        value, guess = metrics[task][name], metrics["baseline"][task][name]
        between = metrics["intervals"].get(task, {}).get(name)
        if value is not None:
            table.add_row(
                label,
                f"{value * scale:.2f}{unit}",
                "" if between is None else f"{between[0] * scale:.2f} to {between[1] * scale:.2f}",
                "" if guess is None else f"{guess * scale:.2f}{unit}",
            )
    console.print(table)
    seen = said["num_seen_in_training"]
    overlap = "not known" if seen is None else f"{seen:,}"
    console.print(
        f"{metrics['n']:,} labelled images, {metrics['n_fallback']:,} of them without a detected face; "
        f"seen in training: {overlap}",
        highlight=False,
    )
    console.print(f"split manifest SHA-256 {said['split_manifest_sha256']}", highlight=False, soft_wrap=True)
    console.print(f"{out}/metrics.json, {out}/predictions.parquet", highlight=False, soft_wrap=True)

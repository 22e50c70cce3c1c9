"""A checkpoint on a split of any prepared set -> predictions.parquet and metrics.json, its calibration and its card.

Accuracy is over every labelled image, chips in which no face was found included. Images that the checkpoint was
trained on are looked for by content, and refused. Metrics are those of the uncalibrated predictions; what the
checkpoint's calibration makes of them is a section of its own.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import ActorPoolStrategy
from rich.console import Console

from agr_ray.config import EvaluateConfig, EvaluateJob, PredictConfig
from agr_ray.config import digest as digest_of
from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_console, make_table
from agr_ray.data.crops import decoded_crops, map_races, read_labels, select_crops, usable_statuses
from agr_ray.data.prepared import PreparedSet, open_prepared
from agr_ray.errors import ConfigError, JobError
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.coverage import coverage_report
from agr_ray.evaluation.metrics import Baseline, metrics_report
from agr_ray.evaluation.selection import NEVER_SURE
from agr_ray.labels import Labels, LabelSpace, race_mapping
from agr_ray.models.card import HEADLINES, model_card, with_measured
from agr_ray.models.checkpoint import (
    CALIBRATION,
    CARD,
    META,
    TRAIN_STATE,
    CheckpointError,
    content_codes,
    load_train_state,
    model_digest,
    read_meta,
)
from agr_ray.models.checkpoint_files import local_checkpoint, portable_checkpoint, unpacked_checkpoint
from agr_ray.models.predictions import Predictions, class_probs_array
from agr_ray.predict.attributes import AttributePredictor, attribute_columns, uncalibrated
from agr_ray.predict.downloads import use_one_cpu
from agr_ray.predict.resolve import resolve
from agr_ray.progress import progress
from agr_ray.runtime.cluster import check_fits, cluster, worker_count
from agr_ray.runtime.crops import part_dataset
from agr_ray.schema import CROP_STATUSES, PREDICTION_FIELDS, PREDICTIONS, Status
from agr_ray.storage import ChangedObject, MissingObject, Storage, StorageError, StorageFailed, StorageUnavailable
from agr_ray.storage.lock import RunLock, run_lock

FORMAT_VERSION: Final = 1
_CARD_ATTEMPTS: Final = 20
_KEPT_COLUMNS: Final = tuple(field.name for field in PREDICTIONS if field not in PREDICTION_FIELDS)


def evaluate(job: EvaluateJob) -> dict[str, Any]:
    """Predict, calibrate if asked to, measure, write the files, print a summary; return the metrics.

    Raises:
        ConfigError: there is no such checkpoint or set, the split is empty, or training saw images of it.
    """
    console = make_console()
    config = job.evaluate
    storage = Storage.from_config(job.storage)
    for uri, name in ((config.data, "data"), (config.checkpoint, "checkpoint")):
        storage.probe(uri, f"evaluate.{name}")
    if config.out:
        storage.probe(config.out, "evaluate.out", write=True)
    prepared = open_prepared(storage, config.data, "evaluate.data")
    checkpoint = storage.absolute(config.checkpoint).rstrip("/")
    with local_checkpoint(storage, checkpoint, "evaluate.checkpoint") as directory:
        meta, digest = read_meta(directory), model_digest(directory)
        _check_compatible(meta, prepared, config)
        space = LabelSpace.from_json(meta["label_space"])
        measured_in, mapping = _mapped(meta, space, prepared)
        pipeline, calibration, reason = resolve(
            directory,
            Pipeline(predict=job.predict),
            key="evaluate.checkpoint",
            allow_uncalibrated=config.allow_uncalibrated,
            recalibrate=config.calibrate,
        )
        if (directory / CALIBRATION).exists() and reason:
            console.print(f"warning: {reason}")
        measured = Pipeline(vision=prepared.vision, predict=pipeline.predict)
        for line in _vision_differences(measured, pipeline, calibrates=config.calibrate, calibration=calibration):
            console.print(line)
        out = _out(storage, config, checkpoint, digest, prepared, measured)
        chosen, statuses = _chosen_rows(storage, prepared, config)
        num_seen = _num_seen_in_training(directory, chosen)
        if num_seen != 0 and not config.allow_overlap:
            said = (
                f"evaluate.checkpoint {checkpoint}: does not say on which images it was trained"
                if num_seen is None
                else f"evaluate.split {config.split} of {prepared.uri}: the checkpoint was trained on {num_seen:,} of "
                f"its {chosen.num_rows:,} images"
            )
            raise ConfigError(f"{said}; --evaluate.allow_overlap true measures all the same")
        with ExitStack() as stack:
            # The lock is beside the checkpoint, not inside it, because checkpoints are copied as whole folders.
            written = [checkpoint, out] if config.calibrate else [out]
            owner, expiry_s = f"evaluation {out}", config.lock_expiry_s
            held = (run_lock(storage, f"{uri}.lock", owner, expiry_s=expiry_s, console=console) for uri in written)
            locks = [stack.enter_context(lock) for lock in held]
            stack.enter_context(cluster(job.cluster))
            packed = portable_checkpoint(directory)
            table = _predict(
                config, measured.predict, storage, prepared, chosen.num_rows, packed, mapping, locks, console
            )
            predictions = _predictions(table, space)
            labels = read_labels(table, measured_in)
            _check_finite(predictions, checkpoint)
            if config.calibrate:
                calibration = Calibration.fit(
                    read_labels(table, space),
                    predictions,
                    coverage=config.coverage,
                    risk=config.abstain_risk,
                    model_digest=digest,
                    pipeline=measured,
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
                metrics["calibration"] = coverage_report(labels, predictions, calibration) | {
                    "num_calibrated_on": calibration.n,
                    "num_seen_in_calibration": _num_among(chosen, set(calibration.content_codes)),
                    "num_seen_in_training": calibration.num_seen_in_training,
                    "warning": calibration.overlap_warning,
                    "calibrated_on_split_manifest_sha256": calibration.split_manifest_sha256,
                    "notes": list(calibration.notes),
                }
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
                "statuses": statuses,
                **measured.to_json(),
                "label_space": space.name,
                "label_mapping": None
                if prepared.label_space == space
                else {
                    "from": prepared.label_space.name,
                    "races": mapping,
                    "age_groups": list(measured_in.age_groups),
                },
            }
            _check(locks)
            storage.write_table(table, storage.join(out, "predictions.parquet"))
            text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
            _check(locks)
            storage.write(storage.join(out, "metrics.json"), text.encode())
            _check(locks)
            add_to_card(storage, checkpoint, meta, metrics, console)
    _print_summary(console, metrics, out)
    if config.calibrate and calibration is not None:
        _print_fitted(console, calibration, storage.join(checkpoint, CALIBRATION))
    if calibration is not None:
        _print_calibration(console, metrics["calibration"])
    return metrics


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
    for values in predictions:
        if values is not None:
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
        there = json.loads(storage.read(storage.join(out, "metrics.json")))["evaluation"]
    except MissingObject:
        if storage.exists(out) and any(True for _ in storage.list(out)):
            raise ConfigError(f"evaluate.out {out}: exists and holds no evaluation; choose another folder") from None
        return out
    ours = (model, prepared.split_manifest_sha256, config.split, pipeline.predict.model_dump(mode="json"))
    if ours != tuple(there[name] for name in ("model_digest", "split_manifest_sha256", "split", "predict")):
        raise ConfigError(
            f"evaluate.out {out}: holds the evaluation of {there['checkpoint']} on split {there['split']} of "
            f"{there['data']}; choose another folder"
        )
    return out


def add_to_card(
    storage: Storage, checkpoint: str, meta: dict[str, Any], metrics: dict[str, Any], console: Console
) -> None:
    """Put what was measured into the checkpoint's model card; make one for a checkpoint from before there were any.

    A checkpoint that may only be read keeps its card, with a warning: the measurement itself is kept elsewhere.
    """
    uri = storage.join(checkpoint, CARD)
    try:
        for _ in range(_CARD_ATTEMPTS):  # several evaluations of one checkpoint may run at once
            with contextlib.suppress(ChangedObject, MissingObject, FileExistsError):
                if storage.exists(uri):
                    card, etag = storage.read_with_etag(uri)
                    storage.write(uri, with_measured(card.decode(), metrics).encode(), if_match=etag)
                else:
                    storage.write(uri, with_measured(model_card(meta), metrics).encode(), if_absent=True)
                return
        raise StorageFailed(f"{uri} was changed by others in each of {_CARD_ATTEMPTS} attempts to write it")
    except (StorageError, StorageUnavailable) as error:
        console.print(f"warning: the model card was not updated: {error}")


class CropPredictor:
    """Parts of crop rows -> rows of schema.PREDICTIONS. One worker's own."""

    def __init__(
        self,
        storage: Storage,
        checkpoint: dict[str, bytes],
        side_px: int,
        config: EvaluateConfig,
        predict_config: PredictConfig,
        mapping: Mapping[str, str],
    ) -> None:
        use_one_cpu()
        with unpacked_checkpoint(checkpoint) as directory:
            device = "cuda" if config.use_gpu else "cpu"
            self._predictor = AttributePredictor.load(directory, predict_config, device=device)
        self._storage = storage
        self._side_px = side_px
        self._config = config
        self._mapping = mapping

    def __call__(self, parts: pa.Table) -> Iterator[pa.Table]:
        """Yield the predictions of the split's crops in each of the parts."""
        for uri in parts["part"].to_pylist():
            rows = self._storage.read_table(uri, columns=[*_KEPT_COLUMNS, "crop"])
            rows = select_crops(rows, self._config.split, usable_statuses(use_fallback=True))
            rows = map_races(rows, self._mapping)
            for start in range(0, rows.num_rows, self._config.batch_size):
                batch = rows.slice(start, self._config.batch_size)
                predictions = self._predictor.predict(decoded_crops(batch, self._side_px))
                columns = prediction_columns(predictions, batch.num_rows, self._predictor.space)
                yield pa.table({name: batch[name] for name in _KEPT_COLUMNS} | columns, schema=PREDICTIONS)


def prediction_columns(predictions: Predictions, num_rows: int, space: LabelSpace) -> dict[str, pa.Array]:
    """Return the columns of schema.PREDICTION_FIELDS; a task without a head gives nulls."""
    columns = attribute_columns(uncalibrated(predictions), num_rows, space)
    return {
        field.name: columns.get(field.name.removesuffix("_pred"), pa.nulls(num_rows, field.type))
        for field in PREDICTION_FIELDS
    }


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


def _mapped(meta: dict[str, Any], space: LabelSpace, prepared: PreparedSet) -> tuple[LabelSpace, dict[str, str]]:
    """Return the label space to measure in, and the race in it for each race of the data.

    Races are the checkpoint's, or the data's if it has no race head; age groups are the data's, because an age in years
    has a group in any space, and an age range lies in a group of its own space.

    Raises:
        ConfigError: the data's races do not map onto the checkpoint's.
    """
    data = prepared.label_space
    if space == data:
        return space, race_mapping(data, space)
    measured_in = replace(space, age_groups=data.age_groups)
    if "race" not in meta["model"]["tasks"]:
        measured_in = replace(measured_in, races=data.races)
    try:
        return measured_in, race_mapping(data, measured_in)
    except ValueError as error:
        raise ConfigError(f"evaluate.data {prepared.uri}: {error}") from None


def _chosen_rows(storage: Storage, prepared: PreparedSet, config: EvaluateConfig) -> tuple[pa.Table, dict[str, int]]:
    """Return the rows that are measured, and how many of the split have which status: some have no crop."""
    rows = storage.read_table(prepared.crops(storage), columns=["content_hash", "split", "status"])
    in_split = rows if config.split == "all" else rows.filter(pc.equal(rows["split"], config.split))
    statuses = Counter(in_split["status"].to_pylist())
    rows = select_crops(rows, config.split, usable_statuses(use_fallback=True))
    if not rows.num_rows:
        raise ConfigError(f"evaluate.split {config.split}: no crop in it; {prepared.uri} has {prepared.splits}")
    return rows, dict(sorted(statuses.items()))


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
    return _num_among(chosen, set(state["train_images"].tolist()))


def _num_among(chosen: pa.Table, codes: Set[int]) -> int:
    """Count the images whose content has one of the `content_codes`."""
    return sum(int(content_codes([content])[0]) in codes for content in chosen["content_hash"].to_pylist())


def _vision_differences(
    measured: Pipeline, checkpoint: Pipeline, *, calibrates: bool, calibration: Calibration | None
) -> list[str]:
    """Return a line about crops that were made with other settings than the checkpoint's, where that matters."""
    before, after = checkpoint.decisive(), measured.decisive()
    different = ", ".join(f"{key} = {after[key]}, not {before[key]}" for key in before if before[key] != after[key])
    if not different:
        return []
    if calibrates:
        return [
            f"note: the crops were made with {different}; a calibrated checkpoint scores with the settings that it "
            "was calibrated under, and so with these"
        ]
    if calibration is not None:
        return [
            f"warning: the crops were made with {different}, under which the checkpoint was calibrated; what "
            "follows says little of how its intervals hold"
        ]
    return []


def _predict(
    config: EvaluateConfig,
    predict_config: PredictConfig,
    storage: Storage,
    prepared: PreparedSet,
    num_rows: int,
    checkpoint: Any,
    mapping: Mapping[str, str],
    locks: Sequence[RunLock],
    console: Console,
) -> pa.Table:
    """Return the predictions of the split, sorted by key."""
    gpus = 1.0 if config.use_gpu else 0.0
    num_workers = worker_count(config.num_workers, use_gpu=config.use_gpu)
    check_fits("evaluate.num_workers", num_workers, 1.0, gpus)
    predictions = part_dataset(storage, prepared).map_batches(
        CropPredictor,
        fn_constructor_args=(storage, checkpoint, prepared.crop_side_px, config, predict_config, mapping),
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
            _check(locks)
            tables.append(table)
            update(sum(each.num_rows for each in tables), "")
    made = pa.concat_tables(tables).sort_by("key")
    if made.num_rows != num_rows:
        raise RuntimeError(f"{made.num_rows} predictions of {num_rows} crops")
    return made


def _predictions(table: pa.Table, space: LabelSpace) -> Predictions:
    def array(name: str) -> Any:
        return None if table[name].null_count == table.num_rows else np.asarray(table[name])

    race_probs = None
    if table["race_probs"].null_count < table.num_rows:
        race_probs = class_probs_array(table["race_probs"], space.races)
    return Predictions(array("age_pred"), array("p_male"), race_probs)


def _measure(
    table: pa.Table, labels: Labels, predictions: Predictions, meta: dict[str, Any], space: LabelSpace
) -> dict[str, Any]:
    subjects = pc.rank(table["group_id"], tiebreaker="dense") if table["group_id"].null_count == 0 else None
    return metrics_report(
        labels,
        predictions,
        fallback=np.asarray(pc.equal(table["status"], str(Status.FALLBACK))),
        baseline=_training_baseline(meta, space),
        clusters=None if subjects is None else np.asarray(subjects).astype(np.int64),
    )


def _training_baseline(meta: dict[str, Any], space: LabelSpace) -> Baseline | None:
    """Return the guesses fitted on the training labels; None for a checkpoint that does not hold them."""
    values = meta["data"].get("baseline")
    return None if values is None else Baseline.from_json(values, space)


def _print_summary(console: Console, metrics: dict[str, Any], out: str) -> None:
    said = metrics["evaluation"]
    console.print(f"{said['source']}, split {said['split']}")
    table = make_table("metric", "model", "95 % interval", "baseline")
    for task, name, label, scale, unit in HEADLINES:
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
    )
    without_crop = {name: count for name, count in said["statuses"].items() if name not in CROP_STATUSES}
    if without_crop:
        reasons = ", ".join(f"{name} {count:,}" for name, count in without_crop.items())
        console.print(f"not measured, because they have no crop: {reasons}")
    console.print(f"split manifest SHA-256 {said['split_manifest_sha256']}")
    console.print(f"{out}/metrics.json, {out}/predictions.parquet")


def _print_fitted(console: Console, calibration: Calibration, uri: str) -> None:
    """Say what was fitted, and what could not be."""
    parts = []
    if calibration.age is not None:
        widths = calibration.age.half_widths_years
        parts.append(f"age +-{min(widths):.1f} to {max(widths):.1f} years by predicted age group")
    for task, part in (("gender", calibration.gender), ("race", calibration.race)):
        if part is not None:
            parts.append(f"{task} temperature {part.temperature:.2f}, abstains {_below(part.abstain_below)}")
    said = "; ".join(parts) or "nothing could be fitted"
    console.print(f"calibrated on {calibration.n:,} images: {said}")
    for note in calibration.notes:
        console.print(f"note: {note}")
    console.print(uri)


def _below(abstain_below: float) -> str:
    if abstain_below in (0.0, NEVER_SURE):
        return "never" if abstain_below == 0.0 else "always"
    return f"below {100 * abstain_below:.1f} %"


def _print_calibration(console: Console, measured: dict[str, Any]) -> None:
    """Say what was measured beside what was promised."""
    if measured["warning"]:
        console.print(f"warning: {measured['warning']}")
    seen = measured["num_seen_in_calibration"]
    if seen:
        console.print(
            f"warning: {seen:,} of these images were calibrated on, which flatters what follows; measure on others",
        )
    table = make_table("calibrated", "promised", "measured", "95 % interval", "images")
    remarks = []
    age = measured["age"]
    if age is not None:
        share, between = _per_cent(age["coverage"]), _between(age["interval"])
        table.add_row("true age in its interval", _per_cent(age["nominal"]), share, between, f"{age['n']:,}")
        remarks.append(f"age: intervals are {age['mean_width_years']:.1f} years wide on average")
    for task in ("gender", "race"):
        part = measured[task]
        if part is not None:
            error, between = _per_cent(part["error"]), _between(part["interval"])
            table.add_row(
                f"{task} error where told", f"<= {_per_cent(part['risk'])}", error, between, f"{part['accepted']:,}"
            )
            remarks.append(
                f"{task}: abstains on {_per_cent(part['abstained'])} of {part['n']:,}; "
                f"calibration error {_per_cent(part['ece_before'])}, now {_per_cent(part['ece'])}; "
                f"NLL {part['nll_before']:.3f}, now {part['nll']:.3f}"
            )
    console.print(table)
    for remark in remarks:
        console.print(remark)
    if age is not None:
        members = (item for group in age["groups"].values() for item in group.items())
        failed = [
            f"{name} {_per_cent(part['coverage'])} of {part['n']:,}"
            for name, part in members
            if part["interval"][1] < age["nominal"]
        ]
        if failed:
            said = ", ".join(failed)
            console.print(f"age intervals cover less than promised for: {said}")


def _per_cent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _between(interval: list[float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"

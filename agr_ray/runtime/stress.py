"""The stress test of an evaluation: its images, corrupted, on the workers of a Ray cluster.

    OUT/
      stress.parquet             schema.STRESS: every metric under every condition
      stress.png, stress.svg     its curves
      stress_examples.png        a rendered face under every condition
      stress/                    predictions of each condition (`predict.stress_folder`)

A condition that is complete is not predicted again, so the same command resumes after a kill.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy
from rich.console import Console

from agr_ray.config import ClusterConfig, EvaluateConfig, PredictConfig
from agr_ray.data.crops import read_images, read_labels
from agr_ray.data.prepared import PreparedSet
from agr_ray.errors import ConfigError, JobError
from agr_ray.evaluation.robustness import Condition, measure, measure_yaw, stress_rows
from agr_ray.labels import LabelSpace
from agr_ray.learn.progress import duration
from agr_ray.models.predictions import Predictions, finite_rows
from agr_ray.predict.downloads import one_cpu
from agr_ray.predict.prediction_rows import read_predictions
from agr_ray.predict.stress_folder import StressFolder
from agr_ray.predict.stress_predictor import (
    SAMPLE_COLUMNS,
    StressPredictor,
    conditions_of,
    level_text,
    sampled_ids,
    units_of,
)
from agr_ray.progress_bar import progress
from agr_ray.registry import check_name
from agr_ray.runtime.cluster import cluster
from agr_ray.runtime.evaluation_workers import fitting_workers, predicts_here
from agr_ray.runtime.part_runner import run_parts
from agr_ray.schema import STRESS, STRESSED_METRICS
from agr_ray.storage import Storage
from agr_ray.vision.corruptions import CORRUPTIONS, SEVERITIES

TABLE: Final = "stress.parquet"
_FORMAT_VERSION: Final = 1


@dataclass(frozen=True)
class StressTest:
    """A checkpoint, and the evaluation that has measured it on images as they are."""

    storage: Storage
    config: EvaluateConfig
    predict: PredictConfig
    cluster: ClusterConfig
    prepared: PreparedSet
    out: str
    """Folder of the evaluation."""
    checkpoint: dict[str, bytes]
    """Its files, as `portable_checkpoint`."""
    model_digest: str
    tasks: Sequence[str]
    space: LabelSpace
    """Of the checkpoint."""
    measured_in: LabelSpace
    """In which labels and predictions are compared."""
    predictions: pa.Table
    """schema.PREDICTIONS of the images as they are."""
    metrics: Mapping[str, Any]
    """Of these predictions."""
    images_per_s: float
    """How fast the images as they are were predicted."""


def check_corruptions(config: EvaluateConfig) -> None:
    """Check the names in `evaluate.stress_corruptions`.

    Raises:
        ConfigError: there is no such corruption.
    """
    for name in config.stress_corruptions:
        try:
            check_name("corruption", name, CORRUPTIONS)
        except ValueError as error:
            raise ConfigError(f"evaluate.stress_corruptions {name}: {error}") from None


def stress(test: StressTest, check_locks: Callable[[], None], console: Console) -> dict[str, Any]:
    """Predict every condition that is not complete, write table and figure, and return the section of metrics.json.

    Args:
        test: what to do.
        check_locks: raises LockLost if another job has taken over.
        console: gets the plan, progress and result.

    Raises:
        JobError: predictions are not finite.
    """
    from agr_ray.report.stress import (  # imports matplotlib, which only this needs
        examples_figure,
        print_stress,
        stress_figure,
    )

    config, storage = test.config, test.storage
    conditions = conditions_of(config.stress_corruptions)
    image_ids = sampled_ids(test.predictions["image_id"].to_pylist(), config.stress_images, config.stress_seed)
    folder = StressFolder(storage, storage.join(test.out, "stress"))
    check_locks()
    if folder.begin(_plan(test, image_ids)):
        console.print(f"{folder.uri}: the predictions of another stress test were deleted")
    complete = folder.complete(conditions)
    pending = [condition for condition in conditions if condition not in complete]
    _print_plan(test, len(conditions), len(pending), len(image_ids), console)
    if pending:
        num_rows = len(pending) * len(image_ids)
        with progress(console, "predicting corrupted images", num_rows) as update:
            for remark, num_done in _predicted(test, folder, pending, image_ids, check_locks):
                update(num_done, remark)
    clean = _select(test.predictions, image_ids)
    labels, persons = read_labels(clean, test.measured_in), _persons(clean)
    corrupted = {condition: _finite(test, folder.read(condition), condition) for condition in conditions}
    robustness = measure(labels, _read(test, clean), corrupted, persons)
    everyone = test.predictions
    yaw = measure_yaw(
        read_labels(everyone, test.measured_in),
        _read(test, everyone),
        np.asarray(everyone["yaw"].cast(pa.float32()), np.float32),
        _persons(everyone),
    )
    rows = stress_rows(robustness, yaw, {condition: level_text(condition) for condition in conditions})
    table = pa.Table.from_pylist(rows, STRESS)
    check_locks()
    storage.write_table(table, storage.join(test.out, TABLE))
    figure = stress_figure(rows, _baseline(test.metrics), f"{test.prepared.source}, split {config.split}")
    for name, drawn in (("stress.png", figure), ("stress.svg", figure), ("stress_examples.png", examples_figure())):
        body = BytesIO()
        kind = name.rpartition(".")[2]
        drawn.savefig(body, format=kind, metadata={"Date": None} if kind == "svg" else None)
        check_locks()
        storage.write(storage.join(test.out, name), body.getvalue())
    print_stress(console, robustness, test.out)
    return {
        "num_images": len(image_ids),
        "seed": config.stress_seed,
        "levels": {
            name: [level_text(Condition(name, severity)) for severity in SEVERITIES]
            for name in dict.fromkeys(condition.corruption for condition in conditions)
        },
        **robustness.to_json(),
        "yaw": [each.to_json() for each in yaw],
    }


def _plan(test: StressTest, image_ids: Sequence[str]) -> dict[str, Any]:
    """Return what the predictions depend on, as plain values."""
    return {
        "format_version": _FORMAT_VERSION,
        "model_digest": test.model_digest,
        "data": test.prepared.digest,
        "predict": test.predict.model_dump(mode="json"),
        "precisions": sorted(set(test.predictions["precision"].to_pylist())),
        "seed": test.config.stress_seed,
        "images_sha256": hashlib.sha256("\n".join(image_ids).encode()).hexdigest(),
        "levels": {name: [float(level) for level in each.levels] for name, each in CORRUPTIONS.items()},
    }


def _print_plan(test: StressTest, num_conditions: int, num_pending: int, num_images: int, console: Console) -> None:
    num_predictions = num_pending * num_images
    line = (
        f"stress test: {num_conditions // len(SEVERITIES)} corruptions x {len(SEVERITIES)} severities on "
        f"{num_images:,} of {test.predictions.num_rows:,} images"
    )
    if num_pending < num_conditions:
        line += f"; {num_conditions - num_pending} of {num_conditions} are complete"
    if num_pending:
        line += f"; {num_predictions:,} predictions, about {duration(num_predictions / test.images_per_s)}"
    console.print(line)


def _predicted(
    test: StressTest,
    folder: StressFolder,
    pending: Sequence[Condition],
    image_ids: Sequence[str],
    check_locks: Callable[[], None],
) -> Iterator[tuple[str, int]]:
    """Predict the conditions and write each as it is complete; yield the last one and the predictions made so far."""
    sample = read_images(test.storage, test.prepared.parts(test.storage), image_ids, SAMPLE_COLUMNS)
    num_done, remark = 0, ""
    tables: dict[str, list[pa.Table]] = defaultdict(list)
    by_name = {_name(condition): condition for condition in pending}
    for table in _unit_tables(test, pending, sample):
        for name in pc.unique(table["condition"]).to_pylist():
            tables[name].append(table.filter(pc.equal(table["condition"], name)).drop_columns("condition"))
            if sum(each.num_rows for each in tables[name]) == len(image_ids):
                check_locks()
                folder.write(by_name[name], tables.pop(name))
                remark = name
        num_done += table.num_rows
        yield remark, num_done


def _unit_tables(test: StressTest, pending: Sequence[Condition], sample: pa.Table) -> Iterator[pa.Table]:
    """Yield predictions in any order, with the column `condition`."""
    config = test.config
    arguments = (
        *(test.checkpoint, test.prepared.crop_side_px, config.stress_seed),
        *(test.predict, "cuda" if config.use_gpu else "cpu"),
    )
    units = units_of(pending, sample.num_rows)
    if predicts_here(config, len(pending) * sample.num_rows):
        with one_cpu():
            predictor = StressPredictor(sample, *arguments)
            for unit in units:
                yield _named(predictor.predict(unit), unit.condition)
        return
    with cluster(test.cluster):
        num_workers, gpus = fitting_workers(config)
        pool = ActorPoolStrategy(size=min(num_workers, len(units)))
        yield from run_parts(_Worker, (sample, pending, *arguments), range(len(units)), pool, gpus)


class _Worker:
    """Predicts units, which are numbered as by `units_of`."""

    def __init__(self, sample: pa.Table, pending: Sequence[Condition], *arguments: Any) -> None:
        self._units = units_of(pending, sample.num_rows)
        self._predictor = StressPredictor(sample, *arguments)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[pa.Table]:
        for number in batch["part"].tolist():
            unit = self._units[number]
            yield _named(self._predictor.predict(unit), unit.condition)


def _named(table: pa.Table, condition: Condition) -> pa.Table:
    return table.append_column("condition", pa.array([_name(condition)] * table.num_rows))


def _name(condition: Condition) -> str:
    return f"{condition.corruption} {condition.severity}"


def _select(table: pa.Table, image_ids: Sequence[str]) -> pa.Table:
    return table.filter(pc.is_in(table["image_id"], value_set=pa.array(image_ids))).sort_by("image_id")


def _read(test: StressTest, table: pa.Table) -> Predictions:
    return read_predictions(table, test.tasks, test.space)


def _finite(test: StressTest, table: pa.Table, condition: Condition) -> Predictions:
    """Return the predictions under a condition.

    Raises:
        JobError: some are not finite.
    """
    predictions = _read(test, table)
    if not finite_rows(predictions).all():
        raise JobError(
            f"evaluate.checkpoint {test.config.checkpoint}: its predictions for images corrupted by {_name(condition)} "
            "are not all finite"
        )
    return predictions


def _persons(table: pa.Table) -> NDArray[Any]:
    """Return the person of each row; the image where it is unknown."""
    return np.asarray(pc.coalesce(table["group_id"], table["image_id"]).to_pylist(), dtype=object)


def _baseline(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the constant baseline's value of each of schema.STRESSED_METRICS."""
    names = (metric.partition("_") for metric in STRESSED_METRICS)
    return {f"{task}_{key}": metrics["baseline"][task][key] for task, _, key in names}

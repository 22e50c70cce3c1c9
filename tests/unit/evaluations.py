"""An evaluation's folder, made from random predictions."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agr_ray.config import ModelConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.evaluation.audit import metrics_report
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.coverage import coverage_report
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import UTKFACE, Labels, LabelSpace
from agr_ray.models.predictions import Predictions
from agr_ray.schema import PREDICTIONS

NUM_ROWS = 1500
FALLBACK = np.arange(NUM_ROWS) % 40 == 0


def random_labels(space: LabelSpace = UTKFACE, num_rows: int = NUM_ROWS) -> Labels:
    """Return labels of which a few are missing."""
    rng = np.random.default_rng(0)
    age = rng.gamma(3.0, 11.0, num_rows).clip(1, 100).round().astype(np.float32)
    gender, race = rng.integers(0, 2, num_rows), rng.integers(0, len(space.races), num_rows)
    age[:5], gender[5:10], race[10:15] = np.nan, -1, -1
    return Labels(space, age, gender, race)


def random_predictions(labels: Labels, tasks: Sequence[str], *, noise: float = 1.0) -> Predictions:
    """Return predictions that are often right."""
    rng, num = np.random.default_rng(1), len(labels)
    age = np.nan_to_num(labels.age, nan=40.0) * 0.9 + 3.0 + rng.normal(0.0, 5.0 * noise, num)
    p_male = 1.0 / (1.0 + np.exp(-(3.0 * (2 * labels.gender.clip(0) - 1) + rng.normal(0.0, 2.0 * noise, num))))
    noisy = rng.normal(0.0, 1.2 * noise, (num, len(labels.space.races)))
    exponents = np.exp(3.0 * np.eye(len(labels.space.races))[labels.race.clip(0)] + noisy)
    race = exponents / exponents.sum(axis=1, keepdims=True)
    every = {"age": age.clip(0, 116), "gender": p_male, "race": race}
    return {task: every[task].astype(np.float32) for task in tasks}


@functools.cache
def _measured(tasks: tuple[str, ...], calibrated: bool) -> dict[str, Any]:
    """Return the metrics of random predictions, and their calibration."""
    labels = random_labels()
    predictions = random_predictions(labels, tasks)
    metrics = metrics_report(labels, predictions, FALLBACK, Baseline.fit(labels))
    if calibrated:
        quality = {name: np.ones(NUM_ROWS) for name in ("detector_score", "sharpness", "yaw", "pitch", "face_px")}
        calibration = Calibration.fit(
            labels,
            predictions,
            coverage=0.9,
            risk=0.05,
            correct_age=False,
            model_digest="ab" * 32,
            pipeline=Pipeline(),
            precisions=("float32",),
            split_manifest_sha256="cd" * 32,
            content_codes=(),
            num_seen_in_training=0,
            quality=quality,
        )
        metrics["calibration"] = coverage_report(labels, predictions, calibration) | {
            "num_seen_in_calibration": 0,
            "warning": "",
        }
    return dict(metrics)


def write_evaluation(
    folder: Path,
    *,
    tasks: Sequence[str] = ("age", "gender", "race"),
    calibrated: bool = False,
    source: str = "utkface",
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write metrics.json and predictions.parquet; return the metrics.

    Args:
        folder: to write into.
        tasks: of the network.
        calibrated: whether the checkpoint is calibrated.
        source: name of the data.
        changes: of the section `evaluation`.
    """
    metrics = copy.deepcopy(_measured(tuple(tasks), calibrated))
    metrics["evaluation"] = {
        "format_version": 3,
        "checkpoint": str(folder.parent / "runs" / "lite" / "best"),
        "model_digest": "ab" * 32,
        "data": "data/utkface",
        "source": source,
        "split": "test",
        "split_manifest_sha256": "cd" * 32,
        "trained_on_split_manifest_sha256": "cd" * 32,
        "tasks": list(tasks),
        "label_space": UTKFACE.to_json(),
        "label_mapping": None,
        "model": {
            "model": ModelConfig(tasks=tuple(tasks)).model_dump(mode="json"),
            "transform": {"template": "five_point_v1", "image_size": 224},
            "config": {"train": {"batch_size": 32, "lr": 1e-4}, "loss": {"age_weight": 1.0, "gender_weight": 0.5}},
            "data": {"source": "utkface", "num_train_rows": 15_000},
            "git_commit": "c0ffee",
        },
        "precisions": ["float32"],
        "num_seen_in_training": 0,
        "statuses": {"fallback": int(FALLBACK.sum()), "ok": int((~FALLBACK).sum()), "unreadable": 3},
        **(changes or {}),
    }
    labels = random_labels()
    predictions = random_predictions(labels, tasks)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    ages = {"age": labels.age, "age_pred": predictions.get("age", np.full(NUM_ROWS, np.nan, np.float32))}
    columns = [
        pa.array(ages[field.name], field.type, from_pandas=True)
        if field.name in ages
        else pa.nulls(NUM_ROWS, field.type)
        for field in PREDICTIONS
    ]
    plain = pa.schema([field.with_nullable(True) for field in PREDICTIONS])
    pq.write_table(pa.table(columns, schema=plain), folder / "predictions.parquet")
    return dict(metrics)

"""Read an evaluation's folder for its page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from agr_ray.errors import ConfigError
from agr_ray.evaluation.age_bands import AgeBand, age_bands
from agr_ray.models.checkpoint import CALIBRATION
from agr_ray.report.evaluation_folder import PREDICTIONS_FILE, read_metrics
from agr_ray.report.evaluation_page import MeasuredModel, evaluation_page
from agr_ray.report.page import Page
from agr_ray.storage import Storage, StorageError, StorageUnavailable

_STRESS_FILE: Final = "stress.parquet"
_SHEETS: Final = "explain"


def evaluation_report(storage: Storage, uri: str, others: Sequence[str], *, with_faces: bool) -> Page:
    """Return the page of an evaluation.

    Args:
        storage: of the folders.
        uri: the evaluation's folder.
        others: folders of evaluations of the same model on other data.
        with_faces: show the sheets of `evaluate --explain`.

    Raises:
        ConfigError: a folder holds no evaluation, or another model's.
    """
    metrics = read_metrics(storage, uri)
    other_metrics = [read_metrics(storage, other) for other in others]
    for other, each in zip(others, other_metrics, strict=True):
        if each["evaluation"]["model_digest"] != metrics["evaluation"]["model_digest"]:
            raise ConfigError(
                f"{other}: an evaluation of {each['evaluation']['checkpoint']}, but {uri} is of another model, "
                f"{metrics['evaluation']['checkpoint']}; agr-ray evaluate --compare compares two models"
            )
    stress_file = storage.join(uri, _STRESS_FILE)
    return evaluation_page(
        MeasuredModel(
            uri=uri,
            metrics=metrics,
            age_bands=_age_bands(storage, uri) if "age" in metrics["evaluation"]["tasks"] else [],
            stress=storage.read_table(stress_file).to_pylist()
            if "stress" in metrics and storage.exists(stress_file)
            else [],
            sheets=_sheets(storage, uri) if with_faces else {},
            calibrated_since=_calibrated_since(storage, metrics),
            others=other_metrics,
        )
    )


def _calibrated_since(storage: Storage, metrics: Mapping[str, Any]) -> bool:
    """Return whether the evaluated checkpoint now has another calibration; False if that can't be found out."""
    record = metrics["evaluation"]
    try:
        measured = record["calibration_sha256"]
        text = storage.read(storage.join(record["checkpoint"], CALIBRATION))
        is_of_model = json.loads(text)["model_digest"] == record["model_digest"]
    except (StorageError, StorageUnavailable, ValueError, KeyError, TypeError):
        return False
    return bool(is_of_model) and hashlib.sha256(text).hexdigest() != measured


def _age_bands(storage: Storage, uri: str) -> list[AgeBand]:
    columns = ("age", "age_pred")
    predictions = storage.read_table(storage.join(uri, PREDICTIONS_FILE), columns=columns)
    truth, predicted = (np.asarray(predictions[name].cast("float64").to_numpy(), np.float64) for name in columns)
    return age_bands(truth, predicted)


def _sheets(storage: Storage, uri: str) -> dict[str, bytes]:
    folder = storage.join(uri, _SHEETS)
    if not storage.exists(folder):
        raise ConfigError(f"report.faces: {uri} has no sheets of faces; run agr-ray evaluate with --explain first")
    found = storage.list(folder, (".png",))
    return {info.key.rpartition("/")[2].removesuffix(".png"): storage.read(info.uri) for info in found}

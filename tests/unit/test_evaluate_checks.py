"""Checks before an evaluation starts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from prepared_sets import prepared_set

from agr_ray.config import EvaluateConfig
from agr_ray.config.pipeline import DEFAULT_PIPELINE
from agr_ray.data.prepared import open_prepared
from agr_ray.errors import ConfigError, JobError
from agr_ray.labels import UTKFACE
from agr_ray.predict.crop_predictor import prediction_columns
from agr_ray.predict.prediction_rows import read_predictions
from agr_ray.report.evaluation_folder import out_folder
from agr_ray.runtime.evaluate import _check_finite
from agr_ray.storage import Storage


def test_predictions_that_are_not_finite_are_counted_by_image() -> None:
    age = np.array([30, np.nan, 40, 50], np.float32)
    p_male = np.array([0.1, np.nan, np.inf, 0.5], np.float32)
    race_probs = np.full((4, 5), 0.2, np.float32)

    with pytest.raises(JobError, match=r"checkpoint c: its predictions for 2 of 4 images are not finite"):
        _check_finite({"age": age, "gender": p_male, "race": race_probs}, "c")
    _check_finite({"race": race_probs}, "c")


def test_predictions_survive_conversion_to_rows_even_if_all_are_nan() -> None:
    nan = np.full(3, np.nan, np.float32)
    predictions = {"age": nan, "race": np.array([[0.2] * 5, [np.nan] * 5, [0.2] * 5], np.float32)}
    table = pa.table(prediction_columns(predictions, 3, UTKFACE))

    assert (table["age_pred"].null_count, table["p_male"].null_count) == (3, 3)
    again = read_predictions(table, ("age", "race"), UTKFACE)
    assert list(again) == ["age", "race"]
    for task in again:
        np.testing.assert_array_equal(again[task], predictions[task])


def test_a_spread_survives_conversion_to_rows_and_is_null_without_a_distribution() -> None:
    predictions = {"age": np.array([30.25, 40.1], np.float32), "age_spread": np.array([np.pi, 1e-7], np.float32)}
    table = pa.table(prediction_columns(predictions, 2, UTKFACE))
    again = read_predictions(table, ("age",), UTKFACE)
    assert list(again) == ["age", "age_spread"]
    np.testing.assert_array_equal(again["age_spread"], predictions["age_spread"])
    assert list(read_predictions(table, ("gender",), UTKFACE)) == ["gender"]

    without = pa.table(prediction_columns({"age": predictions["age"]}, 2, UTKFACE))
    assert without["age_spread"].to_pylist() == [None, None]
    assert list(read_predictions(without, ("age",), UTKFACE)) == ["age"]


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"evaluation": {"split": "test"}}'])
def test_a_foreign_metrics_file_is_not_overwritten(tmp_path: Path, content: str) -> None:
    out, prepared = (
        tmp_path / "out",
        open_prepared(Storage(), str(prepared_set(tmp_path / "prepared")), "evaluate.data"),
    )
    out.mkdir()
    (out / "metrics.json").write_text(content)
    with pytest.raises(
        ConfigError, match=r"^evaluate\.out .*out: holds a metrics\.json that no evaluation wrote; choose"
    ):
        out_folder(Storage(), EvaluateConfig(out=str(out)), "c", "digest", prepared, DEFAULT_PIPELINE)

    theirs = {"model_digest": "digest", "split_manifest_sha256": prepared.split_manifest_sha256, "split": "test"}
    theirs |= {"checkpoint": "c", "data": "d", "predict": DEFAULT_PIPELINE.predict.model_dump()}
    (out / "metrics.json").write_text(json.dumps({"evaluation": theirs}))
    assert out_folder(Storage(), EvaluateConfig(out=str(out)), "c", "digest", prepared, DEFAULT_PIPELINE) == str(out)

"""Metrics of corrupted images, against arithmetic by hand."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from agr_ray.evaluation.robustness import METRICS, Condition, measure, measure_yaw, stress_rows
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.predictions import Predictions
from agr_ray.schema import STRESS, STRESSED_METRICS

NAN = math.nan
AGES = [10.0, 20.0, 30.0, 40.0]


def labels(age: list[float], gender: list[int]) -> Labels:
    return Labels(UTKFACE, np.array(age, np.float32), np.array(gender, np.int64), np.full(len(age), -1))


def predictions(age: list[float], p_male: list[float]) -> Predictions:
    race = np.full((len(age), 5), 0.2, np.float32)
    return {"age": np.array(age, np.float32), "gender": np.array(p_male, np.float32), "race": race}


TRUTH = labels(AGES, [0, 0, 1, -1])
CLEAN = predictions([12, 20, 28, 40], [0.1, 0.2, 0.9, 0.9])
WORSE = {
    Condition("blur", 1): predictions([14, 20, 26, 40], [0.1, 0.2, 0.9, 0.1]),
    Condition("blur", 2): predictions([20, 30, 40, 50], [0.9, 0.2, 0.9, 0.1]),
    Condition("noise", 1): predictions([0, 0, 0, 0], [0.9, 0.9, 0.1, 0.1]),
}
PERSONS = np.arange(4)


def test_the_names_of_the_metrics_are_those_of_the_schema() -> None:
    assert tuple(METRICS) == STRESSED_METRICS


def test_each_condition_by_hand() -> None:
    measured = measure(TRUTH, CLEAN, WORSE, PERSONS)

    assert measured.n == 4
    assert {name: each.value for name, each in measured.clean.items()} == {
        "age_mae_years": 1.0,
        "age_bias_years": 0.0,
        "age_within_5": 1.0,
        "gender_accuracy": 1.0,
    }
    assert measured.clean["age_mae_years"].difference is None
    blurred = measured.conditions[Condition("blur", 2)]
    assert (blurred["age_mae_years"].value, blurred["age_bias_years"].value) == (10.0, 10.0)
    assert (blurred["age_mae_years"].difference, blurred["age_within_5"].difference) == (9.0, -1.0)
    assert blurred["gender_accuracy"].value == pytest.approx(2 / 3)


def test_means_are_over_severities_and_then_over_corruptions() -> None:
    measured = measure(TRUTH, CLEAN, WORSE, PERSONS)

    assert measured.by_corruption["blur"]["age_mae_years"].value == (2.0 + 10.0) / 2
    assert measured.by_corruption["noise"]["age_mae_years"].value == 25.0
    assert measured.mean["age_mae_years"].value == (6.0 + 25.0) / 2
    assert measured.mean["age_mae_years"].difference == (6.0 + 25.0) / 2 - 1.0
    assert measured.mean["gender_accuracy"].value == pytest.approx(((1.0 + 2 / 3) / 2 + 0.0) / 2)


def test_identical_predictions_have_a_difference_of_exactly_zero() -> None:
    same = measure(TRUTH, CLEAN, {Condition("blur", 1): CLEAN}, PERSONS).conditions[Condition("blur", 1)]

    assert [(each.difference, each.difference_interval) for each in same.values()] == [(0.0, [0.0, 0.0])] * 4


def test_a_planted_difference_is_found_that_separate_intervals_would_hide() -> None:
    rng = np.random.default_rng(0)
    truth = labels(rng.uniform(20, 60, 300).tolist(), [-1] * 300)
    errors = rng.normal(0, 15, 300)
    clean = predictions((truth.age + errors).tolist(), [0.5] * 300)
    worse = predictions((truth.age + errors + 0.7 * np.sign(errors)).tolist(), [0.5] * 300)

    measured = measure(truth, clean, {Condition("blur", 1): worse}, np.arange(300))

    blurred = measured.conditions[Condition("blur", 1)]["age_mae_years"]
    assert blurred.difference == pytest.approx(0.7, abs=1e-4)
    assert blurred.difference_interval == pytest.approx([0.7, 0.7], abs=1e-3)
    assert blurred.interval is not None
    assert measured.clean["age_mae_years"].interval is not None
    assert blurred.interval[0] < measured.clean["age_mae_years"].interval[1]


def test_images_of_one_person_are_resampled_together() -> None:
    ages = [20.0, 20.0, 40.0, 40.0] * 20
    truth, guess = labels(ages, [-1] * 80), predictions([30.0 if age == 20 else 42.0 for age in ages], [0.5] * 80)
    widths = []
    for persons in (np.arange(80), np.arange(80) % 4):
        interval = measure(truth, guess, {}, persons).clean["age_mae_years"].interval
        assert interval is not None
        widths.append(interval[1] - interval[0])

    assert widths[1] > 2 * widths[0]


def test_one_person_has_no_interval() -> None:
    measured = measure(TRUTH, CLEAN, WORSE, np.zeros(4, np.int64))

    assert measured.clean["age_mae_years"].interval is None
    assert measured.mean["age_mae_years"].difference_interval is None


def test_yaw_is_measured_in_bins_of_either_side() -> None:
    yaw = np.array([-9.0, 10.0, -45.0, NAN])

    bins = measure_yaw(TRUTH, WORSE[Condition("blur", 2)], yaw, PERSONS)

    assert [(each.name, each.n) for each in bins] == [
        ("0 to 10 degrees", 1),
        ("10 to 20 degrees", 1),
        ("45 to 90 degrees", 1),
        ("unknown", 1),
    ]
    assert [each.metrics["gender_accuracy"].value for each in bins[:3]] == [0.0, 1.0, 1.0]
    assert "gender_accuracy" not in bins[3].metrics


def test_rows_fit_the_schema() -> None:
    levels = {condition: f"level {condition.severity}" for condition in WORSE}
    yaw = measure_yaw(TRUTH, CLEAN, np.array([0.0, 12.0, 30.0, 5.0]), PERSONS)

    table = pa.Table.from_pylist(stress_rows(measure(TRUTH, CLEAN, WORSE, PERSONS), yaw, levels), STRESS)

    assert list(zip(*(table[name].to_pylist() for name in ("corruption", "severity", "level", "n")), strict=True)) == [
        ("clean", 0, "", 4),
        ("blur", 1, "level 1", 4),
        ("blur", 2, "level 2", 4),
        ("noise", 1, "level 1", 4),
        ("yaw", 1, "0 to 10 degrees", 2),
        ("yaw", 2, "10 to 20 degrees", 1),
        ("yaw", 3, "30 to 45 degrees", 1),
    ]
    assert table["age_mae_years"].to_pylist() == [1.0, 2.0, 10.0, 25.0, 1.0, 0.0, 2.0]
    assert table["age_mae_years_difference"].to_pylist() == [None, 1.0, 9.0, 24.0, None, None, None]
    assert table["race_accuracy"].null_count == 7

"""Metrics, against arithmetic by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from agr_ray.evaluation.audit import metrics_report
from agr_ray.evaluation.groups import GroupSums, class_counts
from agr_ray.evaluation.metrics import Baseline, MetricSums, objective
from agr_ray.labels import ADIENCE, FAIRFACE, UTKFACE, Labels
from agr_ray.models.predictions import Predictions

NAN = math.nan


def labels(age: list[float], gender: list[int], race: list[int]) -> Labels:
    return Labels(UTKFACE, np.array(age, np.float32), np.array(gender, np.int64), np.array(race, np.int64))


def predictions(age: list[float], p_male: list[float], race: list[int]) -> Predictions:
    probabilities = np.full((len(race), len(UTKFACE.races)), 0.1, np.float32)
    probabilities[np.arange(len(race)), race] = 0.6
    return {"age": np.array(age, np.float32), "gender": np.array(p_male, np.float32), "race": probabilities}


TRUTH = labels([10, 25, 40, NAN], [0, 0, 1, 1], [0, 1, 1, -1])
GUESS = predictions([12, 20, 70, 50], [0.2, 0.7, 0.9, 0.5], [0, 1, 4, 2])


def some(num_rows: int, seed: int = 0) -> tuple[Labels, Predictions]:
    rng = np.random.default_rng(seed)
    truth = Labels(
        UTKFACE,
        np.where(rng.random(num_rows) < 0.1, NAN, rng.uniform(0, 100, num_rows)).astype(np.float32),
        rng.integers(-1, 2, num_rows),
        rng.integers(-1, 5, num_rows),
    )
    age = np.nan_to_num(truth.age) + rng.normal(0, 8, num_rows)
    guess = {
        "age": age.astype(np.float32),
        "gender": rng.random(num_rows, np.float32),
        "race": rng.dirichlet(np.ones(5), num_rows).astype(np.float32),
    }
    return truth, guess


def summed(truth: Labels, guess: Predictions) -> MetricSums:
    sums = MetricSums(truth.space)
    sums.update(truth, guess)
    return sums


def test_age_metrics_by_hand() -> None:
    age = summed(TRUTH, GUESS).to_json()["age"]
    assert age["n"] == 3
    assert age["mae_years"] == pytest.approx((2 + 5 + 30) / 3)
    assert age["bias_years"] == pytest.approx((2 - 5 + 30) / 3)
    assert age["within_5"] == pytest.approx(2 / 3)
    assert age["cs"] == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3] + [2 / 3] * 11)
    # Groups: 0-10 -> 11-20 (one off), 21-30 -> 11-20 (one off), 31-40 -> 61-70.
    assert age["exact_group"] == 0.0
    assert age["one_off"] == pytest.approx(2 / 3)
    assert age["confusion"][2][1] == 1


def test_classes_by_hand_with_truth_in_rows() -> None:
    values = summed(TRUTH, GUESS).to_json()
    # p_male 0.5 is not over 0.5: female.
    assert values["gender"]["confusion"] == [[1, 1], [1, 1]]
    assert values["gender"]["accuracy"] == 0.5
    assert values["race"]["n"] == 3
    assert values["race"]["confusion"][1] == [0, 1, 0, 0, 1]
    assert values["race"]["accuracy"] == pytest.approx(2 / 3)
    assert values["race"]["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)  # over the two races that occur


def test_age_groups_are_the_papers_after_rounding_halves_upwards() -> None:
    ages = np.array([0, 10, 10.49, 10.5, 20, 21, 80.4, 80.5, 116, -3])
    assert [UTKFACE.age_groups[k] for k in UTKFACE.age_group(ages)] == [
        "0-10",
        "0-10",
        "0-10",
        "11-20",
        "11-20",
        "21-30",
        "71-80",
        "81+",
        "81+",
        "0-10",
    ]


def test_parts_add_up_to_the_whole() -> None:
    truth, guess = some(50)
    parts = MetricSums(UTKFACE)
    for rows in (slice(0, 20), slice(20, 50)):
        share = Labels(UTKFACE, truth.age[rows], truth.gender[rows], truth.race[rows])
        parts.update(share, {task: values[rows] for task, values in guess.items()})
    np.testing.assert_allclose(parts.vector, summed(truth, guess).vector)


def test_the_report_is_json_with_null_where_labels_are_missing() -> None:
    truth = labels([NAN, NAN], [-1, 1], [-1, -1])
    report = metrics_report(truth, predictions([20, 30], [0.1, 0.9], [0, 1]))
    decoded = json.loads(json.dumps(report, allow_nan=False))
    assert decoded["age"]["mae_years"] is None
    assert decoded["race"]["balanced_accuracy"] is None
    assert decoded["intervals"]["age"]["mae_years"] is None
    assert decoded["gender"]["accuracy"] == 1.0
    assert decoded["groups"]["race"]["asian"]["n"] == 0


def test_report_of_no_rows_at_all() -> None:
    report = metrics_report(labels([], [], []), predictions([], [], []))
    assert report["n"] == 0
    assert report["baseline"]["guess"] == {"fitted_on": "evaluated", "age_years": None, "gender": None, "race": None}


def test_single_task_model_reports_its_task_only() -> None:
    truth, guess = some(30)
    report = metrics_report(truth, {"gender": guess["gender"]})
    assert report["age"]["n"] == report["race"]["n"] == report["baseline"]["age"]["n"] == 0
    assert report["gender"]["n"] == report["baseline"]["gender"]["n"] > 0


def test_groups_partition_the_labelled_rows() -> None:
    truth, guess = some(200)
    report = metrics_report(truth, guess, fallback=np.arange(200) < 10)
    groups = report["groups"]
    assert report["n_fallback"] == 10
    assert sum(table["n"] for table in groups["gender"].values()) == (truth.gender >= 0).sum()
    assert sum(table["n"] for table in groups["age_group"].values()) == np.isfinite(truth.age).sum()
    assert len(groups["gender_race"]) == 10
    chosen = (truth.gender == 1) & (truth.race == 2) & np.isfinite(truth.age)
    assert guess["age"] is not None
    expected = np.abs(guess["age"] - truth.age)[chosen].mean()
    assert groups["gender_race"]["male/asian"]["age"]["mae_years"] == pytest.approx(float(expected), rel=1e-5)


def test_group_sums_over_batches_equal_the_reports_groups() -> None:
    truth, guess = some(300)
    sums = GroupSums(UTKFACE)
    for rows in (slice(0, 100), slice(100, 101), slice(101, 300)):
        part = {task: values[rows] for task, values in guess.items()}
        sums.update(truth.take(rows), part)
    groups = metrics_report(truth, guess)["groups"]

    found = sums.to_json()

    assert list(found) == ["gender", "race", "age_group", "gender_race"]
    assert list(groups) == [*found, "gender_age_group", "race_age_group"]
    for attribute, members in found.items():
        assert list(members) == list(groups[attribute])
        for name, table in members.items():
            assert table["n"] == groups[attribute][name]["n"]
            for task in ("age", "gender", "race"):
                assert table[task] == pytest.approx({key: groups[attribute][name][task][key] for key in table[task]})


def test_group_sums_without_rows_and_without_a_head() -> None:
    sums = GroupSums(UTKFACE)
    assert sums.to_json()["race"]["indian"]["age"]["mae_years"] is None
    sums.update(TRUTH, {"gender": GUESS["gender"]})
    table = sums.to_json()["gender"]["female"]
    assert (table["n"], table["age"]["n"], table["race"]["n"]) == (2, 0, 0)
    assert table["gender"] == {"n": 2, "accuracy": 0.5, "balanced_accuracy": 0.5}


def test_the_vector_of_all_sums_is_a_view() -> None:
    sums = MetricSums(UTKFACE, num_cells=3)
    sums.update(TRUTH, GUESS, cells=np.array([0, 2, 2, 1]))
    assert np.shares_memory(sums.vector, sums.race)
    sums.vector[:] *= 2
    assert sums.to_json()["n"] == 8
    assert (sums.age[:, 0]).tolist() == [2, 0, 4]
    assert sums.of(np.array([False, False, True])).to_json()["race"]["n"] == 4


def test_classes_are_counted_without_missing_labels() -> None:
    counts = class_counts(TRUTH)
    assert counts["gender"] == {"female": 2, "male": 2}
    assert counts["race"] == {"white": 1, "black": 2, "asian": 0, "indian": 0, "others": 0}
    assert {name: count for name, count in counts["age_group"].items() if count} == {"0-10": 1, "21-30": 1, "31-40": 1}
    assert counts["gender_race"]["male/black"] == 1


def test_baseline_is_median_and_majority_of_the_labels_that_it_was_fitted_on() -> None:
    baseline = Baseline.fit(labels([20, 30, 90, NAN], [1, 1, 0, -1], [2, 2, 3, -1]))
    report = metrics_report(TRUTH, GUESS, baseline=baseline)
    guess = {"fitted_on": "train", "age_years": 30.0, "gender": "male", "race": "asian"}
    assert report["baseline"]["guess"] == guess
    assert report["baseline"]["age"]["mae_years"] == pytest.approx((20 + 5 + 10) / 3)
    assert report["baseline"]["gender"]["accuracy"] == 0.5
    assert report["baseline"]["gender"]["balanced_accuracy"] == 0.5
    assert report["baseline"]["race"]["accuracy"] == 0.0


def test_the_objective_is_the_mean_error_relative_to_the_baseline() -> None:
    values = summed(TRUTH, GUESS).to_json()
    baseline = summed(TRUTH, Baseline.fit(TRUTH).predict(4)).to_json()
    # Age: 37/3 against the median 25's (15 + 0 + 15)/3; gender 0.5 against 0.5; race 1/3 against 1/3.
    assert objective(values, baseline, ("age", "gender", "race")) == pytest.approx((37 / 30 + 1 + 1) / 3)
    assert objective(values, baseline, ("gender",)) == pytest.approx(1.0)
    assert objective(MetricSums(UTKFACE).to_json(), MetricSums(UTKFACE).to_json(), ("age",)) is None


def test_ranges_count_for_age_groups_and_not_for_errors_in_years() -> None:
    age = np.array([30, NAN, NAN, NAN, NAN], np.float32)
    low, high = (np.array(ends, np.float32) for ends in ([NAN, 50, 20, 3, NAN], [NAN, 59, 29, 9, NAN]))
    truth = Labels(FAIRFACE, age, np.full(5, -1), np.full(5, -1), low, high)
    guess = {"age": np.array([33, 52, 31, 30, 5], np.float32)}

    report = metrics_report(truth, guess)

    of_age = report["age"]
    assert (of_age["n"], of_age["n_range"], of_age["mae_years"]) == (1, 3, 3.0)
    assert (of_age["exact_group"], of_age["one_off"]) == (2 / 4, 3 / 4)
    assert of_age["distance_years"] == (3 + 0 + 2 + 21) / 4
    assert report["labels"]["age_group"] == list(FAIRFACE.age_groups)
    assert report["groups"]["age_group"]["3-9"]["age"]["exact_group"] == 0.0
    assert report["baseline"]["guess"]["age_years"] == np.median([30, 54.5, 24.5, 6])
    assert report["intervals"]["age"]["mae_years"] is None
    assert report["intervals"]["age"]["one_off"] is not None
    sums = GroupSums(FAIRFACE)
    sums.update(truth, guess)
    assert sums.to_json()["age_group"]["30-39"]["age"] == {
        "n": 1, "n_range": 0, "n_spanning": 0,
        "mae_years": 3.0, "bias_years": 3.0, "within_5": 1.0, "exact_group": 1.0, "one_off": 1.0,
    }  # fmt: skip
    only_ranges = truth.take(np.isnan(age))
    own = summed(only_ranges, {"age": guess["age"][1:]}).to_json()
    guessed = summed(only_ranges, Baseline.fit(only_ranges).predict(4)).to_json()
    assert objective(own, guessed, ("age",)) == pytest.approx((23 / 3) / guessed["age"]["distance_years"])


def test_a_range_that_spans_several_groups_is_counted_separately() -> None:
    age, low, high = (np.array(v, np.float32) for v in ([NAN, NAN, 30], [25, 21, NAN], [32, 30, NAN]))
    truth = Labels(UTKFACE, age, np.full(3, 0), np.full(3, -1), low, high)
    guess = {"age": np.array([31, 31, 31], np.float32)}  # in 31-40, as are ages of the first range

    report = metrics_report(truth, guess)

    of_age = report["age"]
    assert (of_age["n"], of_age["n_range"], of_age["n_spanning"]) == (1, 2, 1)
    assert (of_age["exact_group"], of_age["one_off"], np.sum(of_age["confusion"])) == (0.0, 1.0, 2)
    assert of_age["distance_years"] == (0 + 1 + 1) / 3
    assert report["intervals"]["age"]["one_off"] == pytest.approx([0.5 - 0.3419, 1.0], abs=1e-4)  # 2 of 2
    assert sum(group["n"] for group in report["groups"]["age_group"].values()) == 2
    sums = GroupSums(UTKFACE)
    sums.update(truth, guess)
    women = sums.to_json()["gender"]["female"]["age"]
    assert (women["n_range"], women["n_spanning"], women["exact_group"], women["one_off"]) == (2, 1, 0.0, 1.0)


def test_a_space_without_races_has_no_race_figures() -> None:
    truth = Labels(ADIENCE, np.array([30, 40], np.float32), np.array([0, 1]), np.full(2, -1))
    report = metrics_report(truth, {"age": np.array([30, 45], np.float32), "gender": np.array([0.1, 0.2], np.float32)})

    nothing = dict.fromkeys(("accuracy", "balanced_accuracy", "overconfidence", "auc", "ece"))
    assert report["race"] == {"n": 0, "confusion": [], **nothing}
    assert (report["labels"]["race"], report["groups"]["race"], report["groups"]["gender_race"]) == ([], {}, {})
    assert report["gender"]["confusion"] == [[1, 0], [1, 0]]
    assert class_counts(truth)["race"] == {}


def test_seven_races_have_a_matrix_of_seven() -> None:
    truth = Labels(FAIRFACE, np.full(7, 30, np.float32), np.full(7, 0), np.arange(7))
    guess = {"race": np.eye(7, dtype=np.float32)[[0, 1, 2, 3, 4, 5, 5]]}
    assert metrics_report(truth, guess)["race"]["confusion"] == (np.eye(7)[[0, 1, 2, 3, 4, 5, 5]]).tolist()

"""Intervals: their coverage by simulation, agreement with a bootstrap, and comparisons between groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as reference

from agr_ray.evaluation.auc import group_auc
from agr_ray.evaluation.audit import metrics_report
from agr_ray.evaluation.disparities import MIN_ROWS, disparity
from agr_ray.evaluation.estimates import Estimates, exact_ends, from_influence, ratios
from agr_ray.evaluation.units import MAX_UNITS, Units, unit_sums, units_of
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.predictions import Predictions

NAN = math.nan


def interval_of(parts: np.ndarray, wholes: np.ndarray, units: Units, kind: str) -> np.ndarray:
    """Return the interval of a ratio of sums over rows."""
    sums = [unit_sums(units, weights=values) for values in (parts, wholes)]
    return ratios(*sums, kind)[0].intervals()[0]  # type: ignore[arg-type]


# Units


def test_a_few_persons_are_units_themselves() -> None:
    units = units_of(np.array([70, 5, 70, 2**40, 5]), 5)
    assert (units.codes.tolist(), units.num, units.of) == ([1, 0, 1, 2, 0], 3, "person")
    assert units_of(None, 3).codes.tolist() == [0, 1, 2]


def test_many_persons_are_put_into_groups_that_divide_none() -> None:
    persons = np.repeat(np.arange(20_000), 3)
    units = units_of(persons, len(persons), seed=4)
    assert (units.num, units.of) == (MAX_UNITS, "person groups")
    np.testing.assert_array_equal(units.codes[::3], units.codes[2::3])
    sizes = np.bincount(units.codes[::3], minlength=MAX_UNITS)
    assert sizes.var() == pytest.approx(sizes.mean(), rel=0.1)  # as random as can be
    assert not np.array_equal(units.codes, units_of(persons, len(persons), seed=5).codes)


def test_groups_of_persons_have_the_standard_error_of_the_persons() -> None:
    rng = np.random.default_rng(0)
    persons = np.repeat(np.arange(30_000), 2)
    errors = np.repeat(rng.normal(10, 3, 30_000), 2) + rng.normal(0, 1, 60_000)
    low, high = interval_of(errors, np.ones(60_000), units_of(persons, 60_000), "positive")
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt((9 + 0.5) / 30_000), rel=0.05)


def test_unit_sums_leave_out_rows_without_a_code() -> None:
    units = Units(np.array([0, 1, 1, 2], np.int16), 4, "person")
    codes, weights = np.array([1, 0, -1, 1]), np.array([1.0, 2.0, 4.0, 8.0])
    assert unit_sums(units, codes, 2, weights).tolist() == [[0, 1], [2, 0], [0, 8], [0, 0]]
    assert unit_sums(units).tolist() == [[1], [2], [1], [0]]


# Single intervals


@pytest.mark.parametrize(("hits", "num"), [(0, 5), (5, 5), (3, 10), (900, 1000), (1, 100_000)])
@pytest.mark.parametrize("tail", [0.025, 0.01])
def test_exact_ends_are_those_of_scipy(hits: int, num: int, tail: float) -> None:
    two_sided = binomtest(hits, num).proportion_ci(1.0 - 2.0 * tail, method="exact")
    one_sided = binomtest(hits, num, alternative="less").proportion_ci(1.0 - tail, method="exact")

    low, high = exact_ends(hits, num - hits, tail)

    assert (low, high) == pytest.approx((two_sided.low, two_sided.high), rel=1e-9)
    assert high == pytest.approx(one_sided.high, rel=1e-9)


@pytest.mark.parametrize("num_right", [0, 3, 50, 99, 100])
def test_a_share_of_independent_rows_has_nearly_the_exact_interval(num_right: int) -> None:
    right = np.arange(100) < num_right
    low, high = interval_of(right, np.ones(100), units_of(None, 100), "share")
    exact = binomtest(num_right, 100).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=0.004)
    assert low <= exact.low + 1e-12
    assert high >= exact.high - 1e-12


def test_no_error_among_a_persons_rows_is_one_observation() -> None:
    persons = np.repeat(np.arange(10), 50)
    low, _ = interval_of(np.ones(500), np.ones(500), units_of(persons, 500), "share")
    assert low == pytest.approx(binomtest(10, 10).proportion_ci(0.95, method="exact").low)


def test_intervals_contain_the_value_and_have_the_theoretical_width() -> None:
    rng = np.random.default_rng(1)
    right = rng.random(2000) < 0.8
    truth = Labels(UTKFACE, np.full(2000, NAN, np.float32), np.ones(2000, np.int64), np.full(2000, -1))
    guess: Predictions = {"gender": np.where(right, 0.9, 0.1).astype(np.float32)}
    low, high = metrics_report(truth, guess)["intervals"]["gender"]["accuracy"]
    share = right.mean()
    assert low < share < high
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 2000), rel=0.03)


def test_images_of_one_person_count_together() -> None:
    rng = np.random.default_rng(0)
    age = rng.uniform(0, 100, 40).astype(np.float32)
    guess = age + rng.normal(0, 8, 40).astype(np.float32)
    repeated = Labels(UTKFACE, np.repeat(age, 25), np.full(1000, -1), np.full(1000, -1))
    once = Labels(UTKFACE, age, np.full(40, -1), np.full(40, -1))
    persons = np.repeat(np.arange(40), 25)

    def width(labels: Labels, guessed: np.ndarray, persons: np.ndarray | None = None) -> float:
        low, high = metrics_report(labels, {"age": guessed}, persons=persons)["intervals"]["age"]["mae_years"]
        return float(high - low)

    together = width(repeated, np.repeat(guess, 25), persons)
    assert together == pytest.approx(width(once, guess))
    assert together > 3 * width(repeated, np.repeat(guess, 25))


def test_a_single_row_or_person_has_no_interval() -> None:
    labels = Labels(UTKFACE, np.full(3, 30, np.float32), np.array([1, -1, -1]), np.array([-1, -1, -1]))
    guess = {"age": np.array([31, 35, 50], np.float32), "gender": np.array([0.9, 0.9, 0.9], np.float32)}

    apart = metrics_report(labels, guess)["intervals"]
    together = metrics_report(labels, guess, persons=np.array([4, 4, 4]))["intervals"]

    assert apart["age"]["mae_years"] is not None
    assert [*apart["gender"].values(), *apart["race"].values()] == [None] * 8
    assert [value for name, value in together["age"].items() if name != "cs"] == [None] * 6
    assert together["age"]["cs"] == [None] * 16


# Coverage, by simulation


def clustered(rng: np.random.Generator, num_persons: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the person of each row, one to five rows for each, and what the rows of a person have in common."""
    persons = np.repeat(np.arange(num_persons), rng.integers(1, 6, num_persons))
    return persons, rng.normal(size=num_persons)[persons]


@pytest.mark.parametrize("num_persons", [25, 400])
def test_intervals_of_means_and_shares_hold_the_truth_as_often_as_they_say(num_persons: int) -> None:
    """Absolute errors and rare errors of persons with several images each. 1,000 samples: 95 % +- 1.4."""
    rng = np.random.default_rng(5)
    true_mae = np.abs(rng.normal(size=10**6) * 2 + rng.normal(size=10**6) * 4).mean()
    covered = np.zeros(2)
    true_share = 0.06691  # P(x + y > 2.121), both standard normal: 1.5 standard deviations
    for _ in range(1000):
        persons, shared = clustered(rng, num_persons)
        num = len(persons)
        units = units_of(persons, num)
        noise = rng.normal(size=num)
        low, high = interval_of(np.abs(2 * shared + 4 * noise), np.ones(num), units, "positive")
        covered[0] += low <= true_mae <= high
        low, high = interval_of(shared + noise > 1.5 * math.sqrt(2), np.ones(num), units, "share")
        covered[1] += low <= true_share <= high
    assert 920 <= covered[0] <= 970
    assert 930 <= covered[1] <= 990  # Clopper and Pearson's intervals are on the safe side


def test_intervals_of_the_auc_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(6)
    num_covered = 0
    for _ in range(400):
        persons, shared = clustered(rng, 40)
        num = len(persons)
        positive = rng.random(num) < 0.3
        scores = 1 / (1 + np.exp(-(2.0 * positive + shared + rng.normal(size=num))))
        units = units_of(persons, num)
        found = group_auc(scores.astype(np.float32), positive, np.zeros(num, int), 1, units)
        scarcer = np.minimum(found.num_positive, found.num_negative)
        low, high = from_influence("fraction", found.value, found.influence, np.array([40.0]), scarcer).intervals()[0]
        num_covered += low <= 0.8413 <= high  # P(2 + x > 0), x normal with variance 4
    assert 368 <= num_covered <= 394


def test_the_standard_errors_are_those_of_a_bootstrap_over_persons() -> None:
    rng = np.random.default_rng(7)
    persons, shared = clustered(rng, 150)
    num = len(persons)
    truth = Labels(
        UTKFACE, rng.integers(1, 90, num).astype(np.float32), rng.integers(0, 2, num), rng.integers(0, 5, num)
    )
    probs = rng.dirichlet(np.ones(5), num) + 0.5 * np.eye(5)[truth.race]
    guess: Predictions = {
        "age": (truth.age + 5 * shared + 4 * rng.normal(size=num)).clip(0, 116).astype(np.float32),
        "gender": (1 / (1 + np.exp(-(3 * truth.gender - 1.5 + shared)))).astype(np.float32),
        "race": (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32),
    }
    names = [("age", "mae_years"), ("age", "bias_years"), ("race", "balanced_accuracy"), ("race", "auc")]
    names += [("gender", "overconfidence")]
    of_person = [np.flatnonzero(persons == person) for person in range(150)]

    def values(chosen: np.ndarray) -> list[float]:
        errors, race, male = (guess["age"] - truth.age)[chosen], truth.race[chosen], guess["gender"][chosen]
        aucs = [reference.roc_auc_score(race == k, guess["race"][chosen, k]) for k in range(5)]
        is_right = (male > 0.5) == (truth.gender[chosen] == 1)
        return [
            float(np.abs(errors).mean()),
            float(errors.mean()),
            reference.balanced_accuracy_score(race, guess["race"][chosen].argmax(axis=1)),
            float(np.mean(aucs)),
            float(np.maximum(male, 1 - male).mean() - is_right.mean()),
        ]

    samples = [values(np.concatenate([of_person[person] for person in rng.integers(0, 150, 150)])) for _ in range(200)]
    report = metrics_report(truth, guess, persons=persons)
    for (task, name), spread in zip(names, np.std(samples, axis=0, ddof=1), strict=True):
        low, high = report["intervals"][task][name]
        # 200 resamples give a standard deviation to 5 %.
        assert (high - low) / 2 == pytest.approx(1.976 * spread, rel=0.15), (task, name)


# Worst and best groups


def shares(right: list[int], num: list[int]) -> Estimates:
    """Return the shares of groups of independent rows."""
    value, rows = np.array(right) / np.array(num), np.array(num, np.float64)
    return Estimates("share", value, np.sqrt(value * (1 - value) / (rows - 1)), rows, rows)


def test_the_worst_and_best_group_with_gap_and_ratio() -> None:
    found = disparity(["a", "b", "c", "d"], shares([90, 60, 80, 2], [100, 100, 100, 4]), lower_is_better=False)

    assert found is not None
    assert (found["num_groups"], found["num_small"]) == (3, 1)
    assert found["worst_small"] == {"name": "d", "value": 0.5, "n": 4}
    assert found["worst"] == {"name": "b", "value": 0.6, "n": 100}
    assert found["best"] == {"name": "a", "value": 0.9, "n": 100}
    assert found["gap"] == pytest.approx(0.3)
    assert found["ratio"] == pytest.approx(1.5)
    assert 0.1 < found["gap_interval"][0] < 0.3 < found["gap_interval"][1] < 0.5
    assert 1.1 < found["ratio_interval"][0] < 1.5 < found["ratio_interval"][1] < 2.1
    assert found["differs"]
    errors = disparity(["a", "b", "c", "d"], shares([90, 60, 80, 2], [100, 100, 100, 4]), lower_is_better=True)
    assert errors is not None
    assert (errors["worst"]["name"], errors["best"]["name"]) == ("a", "b")


def test_a_group_without_errors_has_no_certain_ratio() -> None:
    found = disparity(["a", "b"], shares([0, 20], [50, 50]), lower_is_better=True)
    assert found is not None
    assert (found["ratio"], found["ratio_interval"]) == (None, None)
    assert found["differs"]
    barely = disparity(["a", "b"], shares([1, 20], [50, 50]), lower_is_better=True)
    assert barely is not None
    assert barely["ratio"] == pytest.approx(20.0)
    assert barely["ratio_interval"][0] > 1


def test_one_large_group_is_compared_with_nothing() -> None:
    assert disparity(["a", "b"], shares([5, 20], [MIN_ROWS - 1, 50]), lower_is_better=True) is None


def test_the_worst_bias_is_the_farthest_from_zero() -> None:
    rows = np.full(3, 100.0)
    biases = Estimates("signed", np.array([-6.0, 1.0, 2.0]), np.full(3, 0.5), rows, rows)
    found = disparity(["old", "b", "young"], biases, lower_is_better=True)
    assert found is not None
    assert (found["worst"]["name"], found["best"]["name"]) == ("old", "young")
    assert found["worst_small"] is None
    assert (found["gap"], found["ratio"]) == (8.0, None)


def test_equal_groups_differ_in_few_samples_and_a_planted_difference_is_found() -> None:
    rng = np.random.default_rng(8)
    names = [str(k) for k in range(9)]
    num_false, num_found = 0, 0
    for _ in range(400):
        num = rng.integers(40, 200, 9)
        equal = disparity(names, shares(rng.binomial(num, 0.85).tolist(), num.tolist()), lower_is_better=False)
        planted = np.where(np.arange(9) == 4, 0.6, 0.85)
        other = disparity(names, shares(rng.binomial(200, planted).tolist(), [200] * 9), lower_is_better=False)
        assert equal is not None
        assert other is not None
        num_false += equal["differs"]
        num_found += other["differs"] and other["worst"]["name"] == "4"
    assert num_false <= 400 * 0.05
    assert num_found >= 390


# Cells and classes with a single row


def test_cells_with_one_person_make_the_mean_over_cells_less_certain() -> None:
    """Each cell has two images; then the images of one half of the cells go."""
    rng = np.random.default_rng(9)
    genders, races, ages = (each.ravel() for each in np.meshgrid([0, 1], range(5), [5, 25, 45], indexing="ij"))
    repeated = np.repeat(np.arange(30), 20)
    errors = rng.exponential(6, 600)

    def width(chosen: np.ndarray) -> float:
        own = repeated[chosen]
        truth = Labels(UTKFACE, ages[own].astype(np.float32), genders[own], races[own])
        found = metrics_report(truth, {"age": (ages[own] + errors[chosen]).astype(np.float32)})
        assert found["age"]["num_cells"] == 30
        low, high = found["intervals"]["age"]["cell_mae_years"]
        return float(high - low)

    everything = width(np.arange(600))
    assert everything == pytest.approx(2 * 1.96 * 6 / math.sqrt(600), rel=0.1)
    single = width(np.arange(0, 600, 20))
    assert single == pytest.approx(everything * math.sqrt(20), rel=0.4)


def test_a_class_with_one_row_makes_the_balanced_accuracy_uncertain() -> None:
    genders = np.repeat([0, 1], [500, 1])
    truth = Labels(UTKFACE, np.full(501, NAN, np.float32), genders, np.full(501, -1))
    guess = {"gender": np.where(np.arange(501) % 10 == 0, 0.9, 0.1).astype(np.float32)}  # 90 % of women, and the man
    found = metrics_report(truth, guess)

    assert found["gender"]["balanced_accuracy"] == pytest.approx(0.95)
    low, _ = found["intervals"]["gender"]["balanced_accuracy"]
    assert low < 0.5
    assert found["gender"]["auc"] == pytest.approx(0.95)
    assert found["intervals"]["gender"]["auc"] is None

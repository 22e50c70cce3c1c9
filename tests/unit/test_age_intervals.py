"""Age intervals whose width follows the predicted distribution, on faces whose true uncertainty is known."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
from mapie.conformity_scores import ResidualNormalisedScore
from mapie.regression import SplitConformalRegressor
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin

from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.conformal import NUM_NEIGHBOURS, GroupIntervals, SpreadIntervals
from agr_ray.evaluation.coverage import coverage_report
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.predictions import Predictions

MEAN_YEARS, STD_YEARS = 33.0, 20.0


def draw(num_rows: int, seed: int) -> tuple[Labels, Predictions]:
    """Draw faces of whole ages, some far harder than others, and a network that knows how hard each is.

    It predicts mean and spread of the age, given what it saw and the ages in training, so it predicts old faces too
    young.
    """
    rng = np.random.default_rng(seed)
    is_old = rng.random(num_rows) < 0.1
    age = np.clip(np.rint(rng.normal(np.where(is_old, 75, 30), np.where(is_old, 10, 16))), 0, 116)
    noise = (1.0 + 0.08 * np.minimum(age, 60)) * np.exp(rng.normal(0.0, 0.6, num_rows))
    seen = age + rng.normal(0.0, noise)
    trust = STD_YEARS**2 / (STD_YEARS**2 + noise**2)
    predicted = np.clip(MEAN_YEARS + trust * (seen - MEAN_YEARS), 0.0, 116.0)
    missing = np.full(num_rows, -1)
    return Labels(UTKFACE, age.astype(np.float32), missing, missing), {
        "age": predicted.astype(np.float32),
        "age_spread": (noise * np.sqrt(trust)).astype(np.float32),
    }


def fit(labels: Labels, predictions: Predictions, coverage: float = 0.9) -> Calibration:
    return Calibration.fit(labels, predictions, coverage=coverage, risk=0.1)


def without_spread(predictions: Predictions) -> Predictions:
    return {"age": predictions["age"]}


FRESH = draw(10_000, seed=1)


def test_intervals_by_spread_cover_every_age_group_and_are_narrower() -> None:
    reports, others = [], []
    for seed in range(2, 10):
        labels, predictions = draw(1500, seed)
        reports.append(coverage_report(*FRESH, fit(labels, predictions))["age"])
        plain = fit(labels, without_spread(predictions))
        others.append(coverage_report(FRESH[0], without_spread(FRESH[1]), plain)["age"])

    def by_group(parts: list[dict[str, Any]]) -> dict[str, float]:
        return {
            group: float(np.mean([part["groups"]["age_group"][group]["coverage"] for part in parts]))
            for group in UTKFACE.age_groups
        }

    assert 0.89 <= np.mean([part["coverage"] for part in reports]) <= 0.925
    assert min(by_group(reports).values()) >= 0.86 > min(by_group(others).values())
    widths = [float(np.mean([part["mean_width_years"] for part in parts])) for parts in (reports, others)]
    assert widths[0] < 0.95 * widths[1]


@pytest.mark.parametrize("num_rows", [20, 50, 200])
def test_few_images_cover_as_promised_over_repeated_draws(num_rows: int) -> None:
    truth, ages, spread = FRESH[0].age[:2000], FRESH[1]["age"][:2000], FRESH[1]["age_spread"][:2000]
    covered = []
    for seed in range(2, 152):
        labels, predictions = draw(num_rows, seed)
        fitted = (predictions["age"], predictions["age_spread"], labels.age)
        intervals = SpreadIntervals.fit(*(each.astype(np.float64) for each in fitted), 0.9)
        assert intervals is not None
        low, high = intervals.ends(ages, spread)
        covered.append(((low <= truth) & (truth <= high)).mean())
    assert np.mean(covered) == pytest.approx(0.905, abs=0.015)


def test_a_certain_face_has_a_narrower_interval_than_an_uncertain_one_of_the_same_age() -> None:
    calibration = fit(*draw(3000, seed=2))
    ages, spread = np.full(3, 40.0, np.float32), np.array([2.0, 5.0, 10.0], np.float32)
    made = calibration.apply({"age": ages, "age_spread": spread})

    assert made.age_low is not None
    assert made.age_high is not None
    widths = made.age_high - made.age_low
    assert widths[0] < 0.6 * widths[1] < 0.6 * widths[2]
    assert ((made.age_low <= ages) & (ages <= made.age_high)).all()


class Known(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Predicts a column of its input."""

    def __init__(self, column: int = 0) -> None:
        self.column = column

    def fit(self, x: NDArray[Any], y: NDArray[Any]) -> Known:
        self.is_fitted = True
        return self

    def predict(self, x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(x)[:, self.column]


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
def test_with_few_images_the_ends_are_those_of_mapies_normalised_score(coverage: float) -> None:
    # With so few, all images are neighbours of every age. No age is a whole number, so the ends are not rounded.
    rng = np.random.default_rng(3)
    truth = rng.uniform(40.0, 70.0, NUM_NEIGHBOURS)
    spread = rng.uniform(1.0, 5.0, NUM_NEIGHBOURS)
    ages = truth + rng.normal(0.0, spread)
    intervals = SpreadIntervals.fit(ages, spread, truth, coverage)
    assert intervals is not None
    new_ages, new_spread = rng.uniform(45.0, 65.0, 200), rng.uniform(1.0, 5.0, 200)
    low, high = intervals.ends(new_ages.astype(np.float32), new_spread.astype(np.float32))

    def scaled(ages: NDArray[Any], spread: NDArray[Any]) -> NDArray[Any]:
        scale = (1 - intervals.weight) * intervals.mean_spread_years + intervals.weight * spread
        return np.stack([ages, scale], axis=1)

    score = ResidualNormalisedScore(residual_estimator=Known(1).fit(truth, truth), prefit=True)
    oracle = SplitConformalRegressor(Known(0).fit(truth, truth), coverage, score, prefit=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle.conformalize(scaled(ages, spread), truth)
        ends = oracle.predict_interval(scaled(new_ages, new_spread))[1][:, :, 0]

    assert low == pytest.approx(ends[:, 0], abs=1e-4)
    assert high == pytest.approx(ends[:, 1], abs=1e-4)


def test_without_a_distribution_the_ends_are_those_of_mapies_absolute_score() -> None:
    rng = np.random.default_rng(4)
    truth = rng.uniform(21.0, 29.0, 49)
    ages = truth + rng.normal(0.0, 2.0, 49)
    intervals = GroupIntervals.fit(ages, truth, 0.9, UTKFACE)
    assert intervals is not None
    low, high = intervals.ends(ages.astype(np.float32), UTKFACE)
    oracle = SplitConformalRegressor(Known(0).fit(truth, truth), 0.9, "absolute", prefit=True)
    oracle.conformalize(ages[:, None], truth)
    ends = oracle.predict_interval(ages[:, None])[1][:, :, 0]

    assert low == pytest.approx(ends[:, 0], abs=1e-4)
    assert high == pytest.approx(ends[:, 1], abs=1e-4)


def test_an_age_is_excluded_by_the_errors_at_that_age_alone() -> None:
    # Children are predicted exactly, and the old 20 years too young. A face of 65 may be 80 or more; one of 30 may not.
    truth = np.repeat([5.0, 30.0, 85.0], 100)
    ages = np.repeat([5.0, 30.0, 65.0], 100) + np.tile(np.linspace(-1.0, 1.0, 100), 3)
    intervals = SpreadIntervals.fit(ages, np.full(300, 4.0), truth, 0.9)
    assert intervals is not None
    low, high = intervals.ends(np.array([5, 30, 65], np.float32), np.full(3, 4.0, np.float32))

    # Ages 58 to 116 have the old faces as their neighbours, ages up to 17 the children.
    assert low.tolist() == [5, 30, 58]
    assert high.tolist() == [5, 30, 85]


def test_ends_are_whole_years_if_the_labels_are() -> None:
    labels, predictions = draw(500, seed=5)
    made = fit(labels, predictions).apply(FRESH[1])
    assert made.age is not None
    assert made.age_low is not None
    assert made.age_high is not None
    inner = (made.age_low < made.age) & (made.age < made.age_high)
    assert inner.mean() > 0.95
    assert (made.age_low[inner] == np.rint(made.age_low[inner])).all()
    halves = Labels(UTKFACE, labels.age + np.float32(0.3), labels.gender, labels.race)
    other = fit(halves, predictions).apply(FRESH[1])
    assert other.age_low is not None
    assert (other.age_low != np.rint(other.age_low)).mean() > 0.5


def test_a_spread_that_says_nothing_gets_no_weight() -> None:
    labels, predictions = draw(2000, seed=6)
    rng = np.random.default_rng(7)
    noise = np.exp(rng.normal(0.0, 1.0, 2000)).astype(np.float32)
    useful, useless = fit(labels, predictions), fit(labels, predictions | {"age_spread": noise})

    for calibration, least, most in ((useful, 0.75, 0.9), (useless, 0.0, 0.25)):
        assert calibration.age is not None
        assert calibration.age.by_spread is not None
        assert least <= calibration.age.by_spread.weight <= most


@pytest.mark.parametrize("spread", [0.0, 3.0])
@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_a_constant_spread_and_few_images_give_finite_ordered_ends(spread: float, coverage: float) -> None:
    labels, predictions = draw(130, seed=8)
    constant = predictions | {"age_spread": np.full(130, spread, np.float32)}
    made = fit(labels, constant, coverage).apply(constant)

    assert made.age is not None
    assert made.age_low is not None
    assert made.age_high is not None
    assert (made.age_low <= made.age).all()
    assert (made.age <= made.age_high).all()
    assert ((made.age_low <= labels.age) & (labels.age <= made.age_high)).mean() >= coverage


def test_faces_have_the_same_interval_alone_and_together_and_nan_has_none() -> None:
    calibration = fit(*draw(500, seed=9))
    ages, spread = FRESH[1]["age"].copy(), FRESH[1]["age_spread"].copy()
    ages[3] = spread[5] = np.nan
    together = calibration.apply({"age": ages, "age_spread": spread})
    assert together.age_low is not None
    assert np.flatnonzero(np.isnan(together.age_low)).tolist() == [3, 5]
    for row in (0, 4, 9_999):
        alone = calibration.apply({"age": ages[row : row + 1], "age_spread": spread[row : row + 1]})
        assert alone.age_low is not None
        assert alone.age_low[0] == together.age_low[row]
    nobody = calibration.apply({"age": ages[:0], "age_spread": spread[:0]})
    assert nobody.age_low is not None
    assert nobody.age_low.shape == (0,)


def test_intervals_by_spread_are_kept_in_json_and_checked() -> None:
    calibration = fit(*draw(200, seed=10))
    said = json.loads(json.dumps(calibration.to_json(), allow_nan=False))
    again = Calibration.from_json(said)
    assert again.age == calibration.age
    by_spread = said["age"]["by_spread"]
    for damage, complaint in (
        (by_spread | {"factors": [1.0]}, "expected 117 factors, found 1"),
        (by_spread | {"surplus": 1}, "unexpected keyword argument 'surplus'"),
        ({"weight": 0.5}, "'factors'"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Calibration.from_json(said | {"age": said["age"] | {"by_spread": damage}})

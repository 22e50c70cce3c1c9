"""Comparisons of networks: estimates, intervals and paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from agr_ray.config.presets import PRESETS
from agr_ray.evaluation.comparison import METRICS, compare
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.predictions import Predictions
from agr_ray.report.comparison import cited, difference_text, text
from agr_ray.schema import COMPARED_METRICS

NUM_IMAGES = 300
RNG = np.random.default_rng(0)
AGES = RNG.integers(1, 90, NUM_IMAGES).astype(np.float32)
LABELS = Labels(UTKFACE, AGES, RNG.integers(0, 2, NUM_IMAGES), RNG.integers(0, 5, NUM_IMAGES))
APART = np.arange(NUM_IMAGES)


def guessed(error_years: float, share_right: float, seed: int) -> Predictions:
    """Return predictions with a mean error and a share of correct classes."""
    rng = np.random.default_rng(seed)
    is_right = rng.random(NUM_IMAGES) < share_right
    races = np.where(is_right, LABELS.race, (LABELS.race + 1) % 5)
    signs = rng.choice([-1.0, 1.0], NUM_IMAGES)
    return {
        "age": (AGES + signs * rng.exponential(error_years, NUM_IMAGES)).clip(0, 116).astype(np.float32),
        "gender": np.where(is_right, LABELS.gender, 1 - LABELS.gender).astype(np.float32),
        "race": np.eye(5, dtype=np.float32)[races],
    }


def test_the_metrics_are_those_of_the_table() -> None:
    assert tuple(METRICS) == COMPARED_METRICS


def test_a_value_is_the_mean_over_runs_and_lies_in_its_interval() -> None:
    runs = [guessed(6.0, 0.8, 1), guessed(9.0, 0.7, 2)]
    estimates = compare({"paper": runs}, LABELS, APART, "paper")["paper"]

    errors = [np.abs(run["age"] - AGES).mean() for run in runs]
    assert estimates["age_mae_years"].value == pytest.approx(np.mean(errors))
    right = [(run["race"].argmax(axis=1) == LABELS.race).mean() for run in runs]
    assert estimates["race_accuracy"].value == pytest.approx(np.mean(right))
    for estimate in estimates.values():
        assert estimate.interval[0] < estimate.value < estimate.interval[1]
        assert (estimate.difference, estimate.differs) == (None, False)


def test_intervals_are_students_with_the_variance_between_seeds() -> None:
    """Three runs of equal errors in all images: no variance over images, and one between seeds."""
    labels = Labels(UTKFACE, np.full(4, 40.0, np.float32), np.zeros(4, np.int64), np.zeros(4, np.int64))
    errors = {"paper": [5.0, 6.0, 7.0], "cbam": [4.0]}
    runs = {name: [{"age": np.full(4, 40.0 + error, np.float32)} for error in each] for name, each in errors.items()}
    estimates = compare(runs, labels, np.arange(4), "paper")
    t = 4.302653  # 97.5 % quantile, 2 degrees of freedom

    paper, cbam = estimates["paper"]["age_mae_years"], estimates["cbam"]["age_mae_years"]
    assert paper.interval == pytest.approx((6.0 - t / 3**0.5, 6.0 + t / 3**0.5), rel=1e-5)
    assert cbam.interval == pytest.approx((0.0, 4.0 + t), rel=1e-5)  # an error is not negative
    half = t * (1 + 1 / 3) ** 0.5
    assert cbam.difference_interval == pytest.approx((-2.0 - half, -2.0 + half), rel=1e-5)


def test_intervals_over_seeds_hold_the_true_difference_as_often_as_they_say() -> None:
    """Two networks with the same mean, two seeds each, and far more variance between seeds than over images."""
    rng = np.random.default_rng(7)
    labels = Labels(UTKFACE, np.full(20, 40.0, np.float32), np.zeros(20, np.int64), np.zeros(20, np.int64))

    def run(error: float) -> Predictions:
        return {"age": (40.0 + error + rng.normal(0, 0.1, 20)).astype(np.float32)}

    num_covered = 0
    for _ in range(200):
        runs = {name: [run(10.0 + rng.normal()) for _ in range(2)] for name in ("paper", "cbam")}
        estimates = compare(runs, labels, np.arange(20), "paper", num_resamples=50)
        num_covered += not estimates["cbam"]["age_mae_years"].differs
    assert 180 <= num_covered <= 199


@pytest.mark.parametrize("num_images", [10, 200])
def test_intervals_of_runs_that_only_err_on_other_images_are_neither_too_narrow_nor_far_too_wide(
    num_images: int,
) -> None:
    """Each run errs by an error of its own for each image, and no seed is better than another."""
    rng = np.random.default_rng(7)
    missing = np.zeros(num_images, np.int64)
    labels = Labels(UTKFACE, np.full(num_images, 40.0, np.float32), missing, missing)

    def run() -> Predictions:
        return {"age": (50.0 + rng.normal(0, 3.0, num_images)).astype(np.float32)}

    num_covered = 0
    for _ in range(200):
        runs = {name: [run(), run()] for name in ("paper", "cbam")}
        estimates = compare(runs, labels, np.arange(num_images), "paper", num_resamples=100)
        num_covered += not estimates["cbam"]["age_mae_years"].differs
    assert 182 <= num_covered <= 199


def test_a_metric_says_whether_its_intervals_hold_seeds() -> None:
    ages = [{"age": guessed(8.0, 0.8, seed)["age"]} for seed in (1, 2)]
    estimates = compare({"single_task_age": ages, "paper": [guessed(8.0, 0.8, 1)]}, LABELS, APART, "paper")

    assert {metric: each.includes_seeds for metric, each in estimates["paper"].items()} == {
        "age_mae_years": True,
        "age_within_5": True,
        "age_one_off": True,
        "gender_accuracy": False,
        "race_accuracy": False,
    }


def test_one_person_has_no_interval() -> None:
    runs = {"paper": [guessed(8.0, 0.8, 1)], "cbam": [guessed(6.0, 0.9, 2)]}
    assert compare(runs, LABELS, np.zeros(NUM_IMAGES), "paper") == {"paper": {}, "cbam": {}}


def test_seeds_that_differ_widen_the_interval() -> None:
    def width(*seeds_and_errors: tuple[int, float]) -> float:
        runs = [guessed(error, 0.8, seed) for seed, error in seeds_and_errors]
        low, high = compare({"paper": runs}, LABELS, APART, "paper")["paper"]["age_mae_years"].interval
        return high - low

    assert width((1, 5.0), (2, 12.0)) > 2 * width((1, 8.0), (2, 8.0))


def test_a_paired_difference_is_surer_than_two_intervals_apart() -> None:
    base = guessed(8.0, 0.8, 1)
    better = dict(base) | {"age": (AGES + 0.9 * (base["age"] - AGES)).astype(np.float32)}
    estimates = compare({"paper": [base], "cbam": [better]}, LABELS, APART, "paper")
    paper, cbam = estimates["paper"]["age_mae_years"], estimates["cbam"]["age_mae_years"]

    assert paper.interval[0] < cbam.interval[1]  # the intervals overlap
    assert cbam.difference == pytest.approx(cbam.value - paper.value)
    assert cbam.differs
    assert not estimates["cbam"]["race_accuracy"].differs


def test_images_of_one_person_count_together() -> None:
    """Six images of each person with the same error are no more certain than one."""
    few = np.repeat(np.abs(np.random.default_rng(3).normal(0, 8, NUM_IMAGES // 6)), 6).astype(np.float32)
    runs: dict[str, list[Predictions]] = {"paper": [{"age": AGES + few}]}

    def width(clusters: np.ndarray) -> float:
        low, high = compare(runs, LABELS, clusters, "paper")["paper"]["age_mae_years"].interval
        return high - low

    assert width(APART // 6) == pytest.approx(6**0.5 * width(APART), rel=0.1)


def test_a_network_without_a_task_has_no_such_metric() -> None:
    ages_only = {"age": guessed(8.0, 0.8, 1)["age"]}
    estimates = compare({"single_task_age": [ages_only]}, LABELS, APART, "paper")["single_task_age"]

    assert list(estimates) == ["age_mae_years", "age_within_5", "age_one_off"]
    assert estimates["age_mae_years"].difference is None


def test_estimates_are_shown_with_their_unit() -> None:
    runs = {"paper": [guessed(8.0, 0.8, 1)], "cbam": [guessed(6.0, 0.9, 2)]}
    estimates = compare(runs, LABELS, APART, "paper")["cbam"]

    assert text("age_mae_years", estimates["age_mae_years"]).startswith(f"{estimates['age_mae_years'].value:.2f} (")
    assert text("race_accuracy", estimates["race_accuracy"]).startswith(f"{100 * estimates['race_accuracy'].value:.1f}")
    assert difference_text("race_accuracy", estimates["race_accuracy"])[0] in "+-"
    assert text("race_accuracy", None) == difference_text("race_accuracy", None) == ""


def test_the_papers_figures_are_those_of_its_tables() -> None:
    assert cited("ldl", "age_mae_years") == 4.20
    assert cited("sa_net", "race_accuracy") == 0.91
    assert cited("faceage", "gender_accuracy") is None
    assert cited("vit", "age_mae_years") is None
    assert cited("ldl", "age_within_5") is None
    assert len([preset for preset in PRESETS.values() if preset.cited is not None]) == 16

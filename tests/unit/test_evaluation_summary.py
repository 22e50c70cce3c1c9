"""The terminal output of an evaluation is in plain words, and names what it leaves out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import random_labels, random_predictions, write_evaluation

from agr_ray.config import EvaluateConfig
from agr_ray.console import make_console
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.coverage import coverage_report
from agr_ray.report.evaluation_summary import (
    calibration_gain,
    print_calibration,
    print_fitted,
    print_following,
    print_summary,
)


def printed(function: Any, *arguments: Any) -> list[str]:
    out = io.StringIO()
    function(make_console(out), *arguments)
    return out.getvalue().splitlines()


@pytest.fixture
def metrics(tmp_path: Path) -> dict[str, Any]:
    return write_evaluation(tmp_path / "eval", calibrated=True)


def disparity(worst: str, best: str, *, differs: bool = True, **changes: Any) -> dict[str, Any]:
    sides = {"worst": {"name": worst, "value": 5.61, "n": 90}, "best": {"name": best, "value": 4.14, "n": 80}}
    return {"num_groups": 2, "num_small": 0, "worst_small": None, "differs": differs, **sides} | changes


def test_differences_name_the_worst_the_best_and_the_small_groups(metrics: dict[str, Any]) -> None:
    small = {"num_small": 7, "worst_small": {"name": "61-70", "value": 32.8, "n": 12}}
    for breakdown in ("gender", "race", "age_group"):
        for task, name in (("age", "mae_years"), ("gender", "accuracy"), ("race", "accuracy")):
            metrics["disparities"][breakdown][task][name] = disparity("a", "b", differs=False)
    metrics["disparities"]["age_group"]["age"]["mae_years"] = disparity("21-30", "31-40", **small)
    metrics["disparities"]["race"]["race"]["accuracy"] = None

    lines = printed(print_summary, metrics, "OUT")

    assert (
        "age MAE by age group: worst 5.61 years for 21-30, best 4.14 years for 31-40, of two groups; left out: 7 "
        "groups of fewer than 30 images; worst: 61-70, 32.80 years, n=12"
    ) in lines
    (same,) = (line for line in lines if line.startswith("no significant difference: "))
    assert "age MAE by gender, gender accuracy by gender" in same
    assert "not compared, because fewer than two groups have 30 images: race accuracy by race" in lines
    assert not any(line.startswith("next, ") for line in lines)


def test_the_worst_small_group_is_recorded(metrics: dict[str, Any]) -> None:
    found = metrics["disparities"]["age_group"]["age"]["mae_years"]

    assert found["num_small"] >= 1
    worst = max(
        (of["age"]["mae_years"], name) for name, of in metrics["groups"]["age_group"].items() if 0 < of["age"]["n"] < 30
    )
    assert (found["worst_small"]["value"], found["worst_small"]["name"]) == worst
    assert found["worst_small"]["n"] < 30


def test_right_age_groups_are_named_in_full(metrics: dict[str, Any]) -> None:
    text = "\n".join(printed(print_summary, metrics, "OUT"))

    assert "in the right age group " in text
    assert "in the right age group or the next" in text


def test_failing_coverage_is_a_list_without_small_groups(metrics: dict[str, Any]) -> None:
    part = {"coverage": 0.5, "interval": [0.4, 0.6], "mean_width_years": 20.0}
    metrics["calibration"]["age"]["groups"] = {
        "age_group": {"21-30": part | {"n": 60}, "81+": part | {"n": 5}},
        "race": {"black": part | {"n": 2}, "white": part | {"n": 90, "interval": [0.4, 0.95]}},
    }

    lines = printed(print_calibration, metrics)

    assert lines[-2:] == [
        "age intervals cover significantly less than 90.0 % for (2 groups of fewer than 30 images are left out):",
        "  21-30: 50.0 % of 60 images",
    ]


@pytest.mark.parametrize("with_spread", [False, True])
def test_the_fitted_calibration_is_in_plain_words(with_spread: bool) -> None:
    labels = random_labels()
    predictions = random_predictions(labels, ("age", "gender", "race"))
    if with_spread:
        predictions["age_spread"] = np.full(len(labels), 18.4, np.float32)
    calibration = Calibration.fit(labels, predictions, coverage=0.9, risk=0.05)

    text = "\n".join(printed(print_fitted, calibration, "URI"))

    assert "  age: 90 % of true ages are within " in text
    assert "  gender: the model was " in text
    assert not any(word in text for word in ("temperature", "weight", "spread"))


def test_a_model_that_always_abstains_says_what_to_do() -> None:
    labels = random_labels(num_rows=100)
    predictions = random_predictions(labels, ("gender",), noise=9.0)

    (note,) = (note for note in Calibration.fit(labels, predictions, coverage=0.9, risk=0.02).notes if "always" in note)

    assert "at most 2 % of its answers are wrong; more validation images or a better model help" in note
    assert "--abstain_risk, such as 0.4" in note


def test_figures_of_the_calibration_images_are_called_optimistic(metrics: dict[str, Any]) -> None:
    metrics["calibration"]["num_seen_in_calibration"] = 520
    metrics["evaluation"]["split"] = "val"

    (warning,) = (line for line in printed(print_calibration, metrics) if line.startswith("warning: "))

    assert "the figures below are optimistic; those above are slightly optimistic, too" in warning


@pytest.mark.parametrize(
    ("split", "calibrate", "command"),
    [
        ("val", True, "next, measure on test images: agr-ray evaluate --checkpoint CHECKPOINT --data DATA"),
        ("val", False, "next, see the errors by group: agr-ray report OUT"),
        ("test", True, "next, see the errors by group: agr-ray report OUT"),
    ],
)
def test_the_next_command_follows_from_the_split(split: Any, calibrate: bool, command: str) -> None:
    config = EvaluateConfig(checkpoint="c", data="d", split=split, calibrate=calibrate)

    assert printed(print_following, config, "CHECKPOINT", "DATA", "OUT") == [command]


@pytest.mark.parametrize(
    ("after", "interval", "remark"),
    [
        (0.05, [0.1, 0.2], ""),
        (0.08, [-0.1, 0.2], " (worse, but within chance for 300 images)"),
        (0.08, [0.1, 0.2], " (worse, and more than by chance: calibrate again, on images like these)"),
        (0.08, [-0.2, -0.1], " (but the probabilities as a whole fit these images better: the log loss is lower)"),
    ],
)
def test_a_worse_calibration_error_has_a_remark(after: float, interval: list[float], remark: str) -> None:
    part = {"ece": after, "ece_before": 0.06, "nll_change_interval": interval, "n": 300}

    assert calibration_gain(part) == remark


def test_the_change_of_the_log_loss_has_an_interval() -> None:
    labels = random_labels()
    predictions = random_predictions(labels, ("gender",))
    calibration = Calibration.fit(labels, predictions, coverage=0.9, risk=0.05)

    gender = coverage_report(labels, predictions, calibration)["gender"]

    low, high = gender["nll_change_interval"]
    assert low < gender["nll"] - gender["nll_before"] < high

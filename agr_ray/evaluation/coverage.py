"""Measure a calibration on labelled images that it was not fitted on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.calibration import Calibration, gender_probs
from agr_ray.evaluation.cells import Cells
from agr_ray.evaluation.estimates import CONFIDENCE, exact_ends
from agr_ray.evaluation.reliability import expected_calibration_error
from agr_ray.evaluation.selection import logits_of
from agr_ray.evaluation.terms import FloatArray
from agr_ray.labels import IntArray, Labels
from agr_ray.models.predictions import Predictions


def coverage_report(labels: Labels, predictions: Predictions, calibration: Calibration) -> dict[str, Any]:
    """Measure the calibration on n labelled images, which should not be those that it was fitted on.

    Keys:

    - `n`;
    - `age`: nominal, n, coverage, interval and mean_width_years; groups.BREAKDOWN.NAME has the last four for each
      group of true labels, by each of `cells.BREAKDOWNS`; mae_years, bias_years, and both without the correction,
      mae_years_before and bias_years_before;
    - `gender` and `race`: n, risk, abstained (share of all images), accepted, error (share of the accepted), interval,
      nll, nll_before, ece, ece_before (`before`: without calibration), and nll_change_interval, the 95 % interval of
      the mean change of nll (None: one image).

    `interval` is the exact 95 % interval (Clopper and Pearson 1934) of the share before it. Parts that are not
    calibrated, or have no labelled image, are None.

    Args:
        labels: the truth; images with a missing label are left out.
        predictions: of the same images, uncalibrated.
        calibration: fitted on other images.
    """
    calibrated = calibration.apply(predictions)
    age, gender, race = None, None, None
    if calibrated.age_low is not None and calibrated.age_high is not None:
        age = _coverage(labels, calibrated.age_low, calibrated.age_high, calibration.coverage)
        if age is not None:
            assert calibrated.age is not None
            age |= _errors(labels, calibrated.age, "") | _errors(labels, predictions["age"], "_before")
    if calibrated.abstain_gender is not None:
        before, after = gender_probs(predictions["gender"]), gender_probs(calibrated.p_male)
        gender = _selection(labels.gender, before, after, calibrated.abstain_gender, calibration.risk)
    if calibrated.abstain_race is not None:
        race = _selection(
            labels.race, predictions["race"], calibrated.race_probs, calibrated.abstain_race, calibration.risk
        )
    return {"n": len(labels), "age": age, "gender": gender, "race": race}


def _coverage(
    labels: Labels, age_low: NDArray[np.float32], age_high: NDArray[np.float32], nominal: float
) -> dict[str, Any] | None:
    known = np.isfinite(labels.age)
    within = (age_low <= labels.age) & (labels.age <= age_high)
    widths = age_high.astype(np.float64) - age_low

    def part(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        num, num_within = int(chosen.sum()), int(within[chosen].sum())
        return {
            "n": num,
            "coverage": num_within / num,
            "interval": _interval(num_within, num),
            "mean_width_years": float(widths[chosen].mean()),
        }

    if not known.any():
        return None
    cells = Cells(labels.space)
    of_row = cells.codes(labels)
    by_group: dict[str, dict[str, Any]] = {}
    for breakdown, groups in cells.groups.items():
        chosen = {group.name: known & own[of_row] for group, own in zip(groups, cells.members(breakdown), strict=True)}
        by_group[breakdown] = {name: part(rows) for name, rows in chosen.items() if rows.any()}
    return {"nominal": nominal, **part(known), "groups": by_group}


def _errors(labels: Labels, predicted: NDArray[np.float32], suffix: str) -> dict[str, float]:
    errors = (predicted - labels.age.astype(np.float64))[np.isfinite(labels.age)]
    return {f"mae_years{suffix}": float(np.abs(errors).mean()), f"bias_years{suffix}": float(errors.mean())}


def _selection(
    truth: IntArray,
    before: NDArray[np.floating[Any]] | None,
    after: NDArray[np.floating[Any]] | None,
    abstain: NDArray[np.bool_],
    risk: float,
) -> dict[str, Any] | None:
    assert before is not None
    assert after is not None
    known = truth >= 0
    if not known.any():
        return None
    truth, before, after, accept = truth[known], before[known], after[known], ~abstain[known]
    num, num_accepted = len(truth), int(accept.sum())
    num_wrong = int((after.argmax(axis=1) != truth)[accept].sum())
    rows = np.arange(num)
    nll, nll_before = (-logits_of(probs)[rows, truth] for probs in (after, before))
    return {
        "n": num,
        "risk": risk,
        "abstained": 1.0 - num_accepted / num,
        "accepted": num_accepted,
        "error": num_wrong / num_accepted if num_accepted else None,
        "interval": _interval(num_wrong, num_accepted) if num_accepted else None,
        "nll": float(nll.mean()),
        "nll_before": float(nll_before.mean()),
        "nll_change_interval": _change_interval(nll - nll_before),
        "ece": expected_calibration_error(after, truth),
        "ece_before": expected_calibration_error(before, truth),
    }


def _change_interval(changes: FloatArray) -> list[float] | None:
    if len(changes) < 2:
        return None
    reach = 1.96 * float(changes.std(ddof=1)) / len(changes) ** 0.5
    return [float(changes.mean()) - reach, float(changes.mean()) + reach]


def _interval(num_true: int, num: int) -> list[float]:
    low, high = exact_ends(num_true, num - num_true, tail=(1.0 - CONFIDENCE) / 2.0)
    return [float(low), float(high)]

"""Everything that metrics.json holds about predictions for labelled images, computed once, from the rows.

Rows are summed up in slices, by cell (true gender, race and age group) and sampling unit (person, or random group of
persons), so memory for sums does not grow with the number of rows. Only the AUC and the selective risk sort all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.cells import BREAKDOWNS, Cells
from agr_ray.evaluation.disparities import disparity
from agr_ray.evaluation.estimates import CONFIDENCE, Estimates, plain_values
from agr_ray.evaluation.figures import CLASS_TASKS, Figures, Rows, TermSums, pieces, slices
from agr_ray.evaluation.groups import GroupSums
from agr_ray.evaluation.metrics import Baseline, MetricSums
from agr_ray.evaluation.reliability import ReliabilitySums
from agr_ray.evaluation.selective import selective_risk
from agr_ray.evaluation.terms import most_likely
from agr_ray.evaluation.thresholds import DEFAULT_BUFFER_YEARS, DEFAULT_THRESHOLDS, ThresholdSums
from agr_ray.evaluation.units import MAX_UNITS, Units, units_of
from agr_ray.labels import Labels
from agr_ray.models.predictions import Predictions
from agr_ray.progress_bar import Update

_MAX_SUMS: Final = 1_250_000
"""Maximum number of units times cells: 10 MB for each of 15 terms."""
_MIN_UNITS: Final = 256
"""Minimum that many persons are put into: the standard deviation of a standard error is then 4 % of it."""
_COMPARED: Final[Mapping[tuple[str, str], bool]] = {
    ("age", "mae_years"): True,
    ("age", "bias_years"): True,
    ("age", "within_5"): False,
    ("gender", "accuracy"): False,
    ("gender", "auc"): False,
    ("race", "accuracy"): False,
    ("race", "auc"): False,
    ("detector", "fallback_share"): True,
}
"""Metrics whose worst and best groups are compared, and whether lower is better."""


def metrics_report(
    labels: Labels,
    predictions: Predictions,
    fallback: NDArray[np.bool_] | None = None,
    baseline: Baseline | None = None,
    persons: NDArray[Any] | None = None,
    *,
    age_uncertainty: NDArray[np.float32] | None = None,
    age_thresholds: Sequence[int] = DEFAULT_THRESHOLDS,
    age_buffer_years: int = DEFAULT_BUFFER_YEARS,
    seed: int = 0,
    update: Update | None = None,
) -> dict[str, Any]:
    """Return everything that metrics.json holds about n rows, as plain values. docs/evaluation.md explains all keys.

    `age.n` counts rows with an exact age, which errors in years use, and `age.n_range` rows with a range. Both count
    for `distance_years`, and for `exact_group`, `one_off` and `confusion`, except `age.n_spanning` ranges, which span
    several age groups.

    Args:
        labels: the truth.
        predictions: of the same rows.
        fallback: (n,) whether no face was found; None: faces were found in all.
        baseline: fitted on the training labels; None: it is fitted on these labels, and marked as such.
        persons: (n,) number of each row's person; the images of a person vary together. None: images are independent.
        age_uncertainty: (n,) by which ages are selected for `selective.age`, such as the width of their intervals;
            None: it is not known.
        age_thresholds: legal age thresholds, years.
        age_buffer_years: challenge age minus legal threshold.
        seed: of the random groups of persons.
        update: called with the number of rows that are summed up, and with what is computed from them then.
    """
    baseline = Baseline.fit(labels, fitted_on="evaluated") if baseline is None else baseline
    cells = Cells(labels.space)
    # Sums are kept by unit and cell: fewer units in a label space with very many cells.
    max_units = min(max(_MAX_SUMS // cells.num, _MIN_UNITS), MAX_UNITS)
    units = units_of(persons, len(labels), seed, max_units)
    codes = np.empty(len(labels), np.int16)
    for part in slices(len(labels)):
        codes[part] = cells.codes(labels.take(part))
    rows = Rows(labels, predictions, fallback, codes, units)
    sums, guesses = GroupSums(labels.space), MetricSums(labels.space)
    thresholds = [ThresholdSums(years, age_buffer_years, cells, units.num) for years in age_thresholds]
    terms = TermSums(cells, units.num)
    num_done = 0
    for piece in pieces(rows):
        own_cells = piece.cells.astype(np.int64)
        sums.update(piece.labels, piece.predictions, piece.fallback, own_cells)
        constant = baseline.predict(len(piece.labels))
        guesses.update(
            piece.labels, {task: guess for task, guess in constant.items() if task in predictions}, piece.fallback
        )
        terms.update(piece, own_cells)
        if "age" in predictions:
            for threshold in thresholds:
                threshold.update(piece.labels, piece.predictions, piece.units)
        num_done += len(piece.labels)
        if update is not None:
            update(num_done, "")
    figures = Figures(rows, cells, terms)
    for breakdown in ("all", *BREAKDOWNS):
        if update is not None:
            update(num_done, f"groups by {breakdown.replace('_', ' ')}" if breakdown != "all" else "all images")
        figures.of(breakdown)
    overall = _with_figures(sums.sums.to_json(), figures.of("all"), 0)
    overall["age"]["cell_mae_years"], cell_interval = figures.cell_mae()
    overall["age"]["num_cells"] = figures.num_cells_with_age
    overall["intervals"]["age"] |= {"cell_mae_years": cell_interval, "cs": terms.cs_intervals()}
    groups = sums.to_json(list(BREAKDOWNS), short=False)
    return {
        **overall,
        "labels": {
            "age_group": list(labels.space.age_groups),
            "gender": list(labels.space.genders),
            "race": list(labels.space.races),
        },
        "baseline": {"guess": baseline.to_json(), **guesses.to_json()},
        "groups": {
            breakdown: {
                name: _with_figures(values, figures.of(breakdown), place)
                for place, (name, values) in enumerate(members.items())
            }
            for breakdown, members in groups.items()
        },
        "disparities": {breakdown: _disparities(figures, breakdown) for breakdown in BREAKDOWNS},
        "age_thresholds": [each for each in (threshold.to_json() for threshold in thresholds) if each is not None],
        **_curves(rows, age_uncertainty),
        "uncertainty": {
            "confidence": CONFIDENCE,
            "method": "linearised",
            "unit": units.of,
            "num_units": int(np.count_nonzero(np.bincount(units.codes, minlength=units.num))),
        },
    }


def _with_figures(values: dict[str, Any], figures: Mapping[tuple[str, str], Estimates], place: int) -> dict[str, Any]:
    """Return a group's values with its AUC, calibration error and fallback share, and the intervals of its metrics."""
    report = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    report["detector"] = {}
    intervals: dict[str, dict[str, list[float] | None]] = {task: {} for task in ("age", *CLASS_TASKS, "detector")}
    for (task, name), estimates in figures.items():
        if name not in report[task]:
            (report[task][name],) = plain_values(estimates.value[place : place + 1])
        if name != "ece":
            intervals[task][name] = estimates.plain_intervals[place]
    report["intervals"] = intervals
    return report


def _disparities(figures: Figures, breakdown: str) -> dict[str, dict[str, Any]]:
    """Return the comparison of the worst and best groups by task and metric; None for a metric that has none."""
    names = [group.name for group in figures.cells.groups[breakdown]]
    report: dict[str, dict[str, Any]] = {}
    for (task, name), lower_is_better in _COMPARED.items():
        estimates = figures.of(breakdown)[task, name]
        report.setdefault(task, {})[name] = disparity(names, estimates, lower_is_better=lower_is_better)
    return report


def _curves(rows: Rows, age_uncertainty: NDArray[np.float32] | None) -> dict[str, Any]:
    """Return the sections `reliability` and `selective`: curves by confidence, None for a task without them."""
    reliability: dict[str, Any] = dict.fromkeys(CLASS_TASKS)
    selective: dict[str, Any] = dict.fromkeys(("age", *CLASS_TASKS))
    for task, truth in (("gender", rows.labels.gender), ("race", rows.labels.race)):
        known = np.flatnonzero(truth >= 0)
        if task not in rows.predictions or not len(known):
            continue
        units = Units(rows.units.codes[known], rows.units.num, rows.units.of)
        uncertainty, is_wrong = np.empty(len(known), np.float32), np.empty(len(known), bool)
        curve = ReliabilitySums(units.num)
        for part in slices(len(known)):
            predicted, confidence = most_likely(task, rows.predictions[task][known[part]])
            uncertainty[part], is_wrong[part] = 1.0 - confidence, predicted != truth[known[part]]
            curve.update(confidence, ~is_wrong[part], Units(units.codes[part], units.num, units.of))
        reliability[task] = curve.to_json()
        selective[task] = selective_risk(uncertainty, is_wrong, units, "share")
    if age_uncertainty is not None and "age" in rows.predictions:
        known = np.flatnonzero(np.isfinite(rows.labels.age))
        units = Units(rows.units.codes[known], rows.units.num, rows.units.of)
        error = np.abs(rows.predictions["age"][known].astype(np.float64) - rows.labels.age[known])
        selective["age"] = selective_risk(age_uncertainty[known], error, units, "positive")
    return {"reliability": reliability, "selective": selective}

"""Estimates of every metric for every group, from sums by sampling unit and cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.auc import group_auc, mean_auc
from agr_ray.evaluation.cells import BREAKDOWNS, Cells
from agr_ray.evaluation.estimates import Estimates, Kind, from_influence, ratios
from agr_ray.evaluation.metrics import CS_YEARS
from agr_ray.evaluation.reliability import NUM_BINS, gap_sums
from agr_ray.evaluation.terms import TERMS, FloatArray, row_terms
from agr_ray.evaluation.units import Units, unit_sums
from agr_ray.labels import IntArray, Labels
from agr_ray.models.predictions import Predictions

_SLICE_ROWS: Final = 500_000
_NUM_THREADS: Final = 2
_MIN_AUC_ROWS: Final = 5
"""Minimum rows of the scarcest class for an interval of the AUC."""
CLASS_TASKS: Final = ("gender", "race")
_RATIOS: Final[Mapping[tuple[str, str], tuple[str, str, Kind]]] = {
    ("age", "mae_years"): ("age_absolute", "age", "positive"),
    ("age", "bias_years"): ("age_signed", "age", "signed"),
    ("age", "within_5"): ("age_within", "age", "share"),
    ("age", "exact_group"): ("age_exact_group", "age_grouped", "share"),
    ("age", "one_off"): ("age_one_off", "age_grouped", "share"),
    ("gender", "accuracy"): ("gender_right", "gender", "share"),
    ("race", "accuracy"): ("race_right", "race", "share"),
    ("detector", "fallback_share"): ("fallback", "rows", "share"),
}
"""Metrics that are a ratio of two sums of terms: numerator, denominator and kind."""


class Rows(NamedTuple):
    """What is known of n rows, beside labels and predictions."""

    labels: Labels
    predictions: Predictions
    fallback: NDArray[np.bool_] | None
    cells: NDArray[np.int16]
    units: Units


def slices(num_rows: int) -> Iterator[slice]:
    """Yield slices of rows, small enough for temporary arrays."""
    yield from (slice(start, min(start + _SLICE_ROWS, num_rows)) for start in range(0, num_rows, _SLICE_ROWS))


def pieces(rows: Rows) -> Iterator[Rows]:
    """Yield the rows in slices."""
    for part in slices(len(rows.labels)):
        yield Rows(
            rows.labels.take(part),
            {task: values[part] for task, values in rows.predictions.items()},
            None if rows.fallback is None else rows.fallback[part],
            rows.cells[part],
            Units(rows.units.codes[part], rows.units.num, rows.units.of),
        )


class TermSums:
    """Sums of the terms of `row_terms` by unit and cell, of ages within k years by unit, of gaps by cell and bin."""

    def __init__(self, cells: Cells, num_units: int) -> None:
        self.cells = cells
        self._num_units = num_units
        self.sums: dict[str, FloatArray] = {}
        self._within = np.zeros((num_units, CS_YEARS))
        self.gaps = {task: np.zeros((cells.num, NUM_BINS)) for task in CLASS_TASKS}
        """Sums of right - confidence, (cells, bins)."""

    @property
    def names(self) -> list[str]:
        """Return the names of the terms."""
        return ["rows", "fallback", *TERMS]

    def update(self, rows: Rows, cells: IntArray) -> None:
        """Count n rows; `cells` are theirs, as int64."""
        terms: dict[str, NDArray[Any] | None] = dict(row_terms(rows.labels, rows.predictions))
        fallback = np.zeros(len(rows.labels)) if rows.fallback is None else rows.fallback
        for name, values in ({"rows": None, "fallback": fallback} | terms).items():
            summed = unit_sums(rows.units, cells, self.cells.num, values)
            if name in self.sums:
                self.sums[name] += summed
            else:
                self.sums[name] = summed
        for task in CLASS_TASKS:
            known, right, confidence = (np.asarray(terms[f"{task}{part}"]) for part in ("", "_right", "_confidence"))
            own = known > 0
            self.gaps[task] += gap_sums(confidence[own], right[own], cells[own], self.cells.num)
        exact = np.asarray(terms["age"]) > 0
        years = np.minimum(np.ceil(np.asarray(terms["age_absolute"])[exact]), CS_YEARS).astype(np.int64)
        own_units = Units(rows.units.codes[exact], self._num_units, rows.units.of)
        self._within += unit_sums(own_units, years, CS_YEARS + 1).cumsum(axis=1)[:, :CS_YEARS]

    def cs_intervals(self) -> list[list[float] | None]:
        """Return the interval of CS@k for each k."""
        if not self.sums:
            return [None] * CS_YEARS
        num = self.sums["age"].sum(axis=1, keepdims=True)
        estimates, _ = ratios(self._within, np.broadcast_to(num, self._within.shape), "share")
        return [interval for _, interval in estimates.to_json()]


class Figures:
    """Estimates of every metric, by breakdown; the breakdown `all` has one group."""

    def __init__(self, rows: Rows, cells: Cells, terms: TermSums) -> None:
        self._rows, self.cells, self._terms = rows, cells, terms
        self._known: dict[str, dict[tuple[str, str], Estimates]] = {}
        self.num_cells_with_age = 0
        self._no_rows = np.zeros((rows.units.num, cells.num))

    def of(self, breakdown: str) -> dict[tuple[str, str], Estimates]:
        """Return the estimates by task and metric, of the groups in the order of `Cells.groups`."""
        if breakdown not in self._known:
            self._known[breakdown] = self._estimates(breakdown)
        return self._known[breakdown]

    def _sums(self, term: str) -> FloatArray:
        return self._terms.sums.get(term, self._no_rows)

    def _in_groups(self, term: str, breakdown: str) -> FloatArray:
        """Return the sums of a term by unit and group, (units, groups)."""
        return self.cells.group_sums(self._sums(term), breakdown)

    def _estimates(self, breakdown: str) -> dict[tuple[str, str], Estimates]:
        sums = {term: self._in_groups(term, breakdown) for term in self._terms.names}
        figures = {name: ratios(sums[part], sums[whole], kind)[0] for name, (part, whole, kind) in _RATIOS.items()}
        for task in CLASS_TASKS:
            rows = sums[task]
            gap = sums[f"{task}_confidence"] - sums[f"{task}_right"]
            figures[task, "overconfidence"] = ratios(gap, rows, "signed")[0]
            # In groups by the task's own classes, there is one class in each.
            figures[task, "balanced_accuracy"] = (
                figures[task, "accuracy"] if task in BREAKDOWNS.get(breakdown, ()) else self._balanced(task, breakdown)
            )
            figures[task, "auc"] = self._auc(task, breakdown, rows)
            gaps = np.abs(self.cells.group_sums(self._terms.gaps[task].T, breakdown)).sum(axis=0)
            num = rows.sum(axis=0)
            with np.errstate(invalid="ignore", divide="ignore"):
                figures[task, "ece"] = _without_interval(np.where(num > 0, gaps / num, np.nan))
        return figures

    def _balanced(self, task: str, breakdown: str) -> Estimates:
        """Return the mean over classes of the share that is right; classes that a group does not have are left out."""
        right, rows = (self.cells.group_sums(self._sums(term), breakdown, task) for term in (f"{task}_right", task))
        num_units = np.count_nonzero(rows.sum(axis=2), axis=0).astype(np.float64)
        num_groups, num_classes = rows.shape[1:]
        if not num_classes:
            return _without_interval(np.full(num_groups, np.nan))
        flat = (len(rows), num_groups * num_classes)
        of_classes, influence = ratios(right.reshape(flat), rows.reshape(flat), "share")
        recalls, num_rows = (each.reshape(num_groups, num_classes) for each in (of_classes.value, of_classes.num_rows))
        present = np.isfinite(recalls)
        num = np.maximum(present.sum(axis=1), 1)
        value = np.where(present.any(axis=1), np.nan_to_num(recalls).sum(axis=1) / num, np.nan)
        influence = influence.reshape(len(rows), num_groups, num_classes).sum(axis=2) / num
        # So many rows, spread evenly over the classes, would have the same variance if all recalls were equal.
        inverse = np.where(present, 1.0 / np.maximum(num_rows, 1.0), 0.0).sum(axis=1)
        effective = np.where(inverse > 0, num**2 / np.maximum(inverse, 1e-300), 0.0)
        return from_influence("share", value, influence, np.minimum(num_units, effective), effective)

    def _auc(self, task: str, breakdown: str, rows: FloatArray) -> Estimates:
        """Return the AUC of each group; `rows` are the sums of labelled rows by unit and group."""
        num_groups = rows.shape[1]
        if task not in self._rows.predictions or task in BREAKDOWNS.get(breakdown, ()) or not rows.any():
            # No such head, no label, or each group has one class only.
            return _without_interval(np.full(num_groups, np.nan))
        of_cell = self.cells.of_attribute[task]
        codes = self.cells.group_codes(breakdown)
        groups = np.where(of_cell >= 0, codes, -1).astype(np.int16)[self._rows.cells]
        truth = of_cell.astype(np.int8)[self._rows.cells]
        values, units = self._rows.predictions[task], self._rows.units
        scores = {1: values} if task == "gender" else dict(enumerate(values.T))
        with ThreadPoolExecutor(_NUM_THREADS) as threads:  # sorting releases the interpreter's lock
            of_classes = threads.map(
                lambda item: group_auc(item[1], truth == item[0], groups, num_groups, units), scores.items()
            )
            auc = mean_auc(list(of_classes))
        scarcer = np.minimum(auc.num_positive, auc.num_negative)
        # With very few rows of a class, the variance between them is hardly known.
        num_units = np.where(scarcer < _MIN_AUC_ROWS, 0.0, np.minimum(np.count_nonzero(rows, axis=0), scarcer))
        return from_influence("fraction", auc.value, auc.influence, num_units, scarcer)

    def cell_mae(self) -> tuple[float | None, list[float] | None]:
        """Return the mean over cells of known gender, race and age group of the MAE in years, and its interval.

        A cell with a single person says nothing about the variance within it: there, the person's distance from the
        mean over cells is taken, which is larger on average.
        """
        attributes = [name for name, classes in self.cells.classes.items() if classes]
        known = np.all([self.cells.of_attribute[name] >= 0 for name in attributes], axis=0)
        rows = self._sums("age")[:, known]
        estimates, influence = ratios(self._sums("age_absolute")[:, known], rows, "positive")
        present = np.isfinite(estimates.value)
        self.num_cells_with_age = int(present.sum())
        if not present.any():
            return None, None
        value = float(estimates.value[present].mean())
        num_units = estimates.num_units[present]
        correction = np.sqrt(num_units / np.maximum(num_units - 1, 1))
        influence = influence[:, present] * correction
        of_single = np.where(rows[:, present] > 0, estimates.value[present] - value, 0.0)
        influence = np.where(num_units == 1, of_single, influence)
        mean = from_influence(
            "positive",
            np.array([value]),
            influence.mean(axis=1, keepdims=True),
            np.array([float(np.count_nonzero(rows.sum(axis=1)))]),
            np.array([rows.sum()]),
        )
        return value, mean.plain_intervals[0]


def _without_interval(value: FloatArray) -> Estimates:
    nothing = np.zeros(len(value))
    return Estimates("fraction", value, np.full(len(value), np.nan), nothing, nothing)

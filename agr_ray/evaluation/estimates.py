"""Estimates with intervals, from sums by sampling unit.

Standard errors are linearised: each metric is a smooth function of sums over persons, and its variance is that of the
sum of the persons' influences (infinitesimal jackknife, Jaeckel 1972; Efron 1982, The Jackknife, the Bootstrap and
Other Resampling Plans, chapter 6). They are the limit of a bootstrap over persons with infinitely many resamples, to
first order, at the cost of one pass.

Intervals of means are Student's t. Intervals of shares are those of Korn and Graubard (1998, Survey Methodology 24):
Clopper and Pearson's for the effective number of rows, so a group without an error does not get an interval of width
zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike

from agr_ray.evaluation.terms import FloatArray

CONFIDENCE: Final = 0.95
"""Of intervals, and of the bound on the risk among accepted images."""
MIN_UNITS: Final = 2
"""Minimum number of persons, or images where persons are unknown, for an interval."""

Kind = Literal["share", "fraction", "positive", "signed"]
"""`share`: of rows; `fraction`: another number from 0 to 1; `positive`: at least 0; `signed`: any number."""


@dataclass(frozen=True)
class Estimates:
    """A metric of several groups. NaN: the group has no such value."""

    kind: Kind
    value: FloatArray
    """(groups,)"""
    standard_error: FloatArray
    """(groups,)"""
    num_units: FloatArray
    """(groups,) persons with a row that counts."""
    num_rows: FloatArray
    """(groups,) rows that count."""

    def intervals(self, confidence: float = CONFIDENCE) -> FloatArray:
        """Return the lower and upper ends, (groups, 2); NaN with fewer than `MIN_UNITS` persons."""
        known = np.isfinite(self.value) & (self.num_units >= MIN_UNITS)
        ends = np.full((len(self.value), 2), np.nan)
        if known.any():
            of_known = Estimates(
                self.kind,
                self.value[known],
                self.standard_error[known],
                self.num_units[known],
                self.num_rows[known],
            )
            ends[known] = (
                _t_ends(of_known, confidence)
                if self.kind in ("positive", "signed")
                else _share_ends(of_known, confidence)
            )
        return ends

    @cached_property
    def plain_intervals(self) -> list[list[float] | None]:
        """Return the 95 % interval of each group as JSON holds it; None where there is none."""
        return [None if np.isnan(ends[0]) else [float(end) for end in ends] for ends in self.intervals()]

    def to_json(self) -> list[tuple[float | None, list[float] | None]]:
        """Return the value and the 95 % interval of each group."""
        return list(zip(plain_values(self.value), self.plain_intervals, strict=True))


def _t_ends(estimates: Estimates, confidence: float) -> FloatArray:
    """Return Student's intervals of n means, (n, 2)."""
    from scipy.special import stdtrit  # takes long to import; importing this module is cheap

    half = stdtrit(estimates.num_units - 1, (1.0 + confidence) / 2.0) * estimates.standard_error
    low = estimates.value - half
    if estimates.kind == "positive":
        low = np.maximum(low, 0.0)
    return np.stack([low, estimates.value + half], axis=1)


def _share_ends(estimates: Estimates, confidence: float) -> FloatArray:
    """Return Korn and Graubard's intervals of n shares, (n, 2).

    Other fractions, such as an AUC, are treated as a share of as many rows as give their variance.
    """
    from scipy.special import stdtrit

    num_units, num_rows, standard_error = estimates.num_units, estimates.num_rows, estimates.standard_error
    value = estimates.value.clip(0.0, 1.0)
    tail = (1.0 - confidence) / 2.0
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = value * (1.0 - value) / standard_error**2
        freedom = num_rows - 1 if estimates.kind == "share" else np.inf
        adjusted = effective * (stdtrit(freedom, 1.0 - tail) / stdtrit(num_units - 1, 1.0 - tail)) ** 2
    is_inside = (value > 0.0) & (value < 1.0) & (standard_error > 0.0)
    if estimates.kind == "share":
        adjusted = np.minimum(adjusted, num_rows)
    # If no row, or every row, counts, nothing tells how alike a person's rows are: each person then counts once.
    size = np.where(is_inside, adjusted, num_units)
    hits = value * size
    misses = np.maximum(size - hits, 0.0)
    low, high = exact_ends(hits, misses, tail)
    return np.stack([np.minimum(low, value), np.maximum(high, value)], axis=1)


def exact_ends(hits: ArrayLike, misses: ArrayLike, tail: float) -> tuple[FloatArray, FloatArray]:
    """Return Clopper and Pearson's (1934) lower and upper ends of shares, each of the shape of `hits`.

    Args:
        hits: rows that count, at least 0; need not be whole numbers.
        misses: rows that do not count, at least 0.
        tail: probability with which an end is on the wrong side: 0.025 for a two-sided interval of 95 %.
    """
    from scipy.special import betaincinv  # `scipy.stats.binomtest` takes 400 times as long

    hits, misses = np.asarray(hits, np.float64), np.asarray(misses, np.float64)
    low = np.where(hits > 0.0, betaincinv(np.maximum(hits, 1e-300), misses + 1.0, tail), 0.0)
    high = np.where(misses > 0.0, betaincinv(hits + 1.0, np.maximum(misses, 1e-300), 1.0 - tail), 1.0)
    return low, high


def ratios(
    parts: FloatArray, wholes: FloatArray, kind: Kind, num_rows: FloatArray | None = None
) -> tuple[Estimates, FloatArray]:
    """Return the ratio of two sums for each group, and the influence of each unit on it, (units, groups).

    Args:
        parts: (units, groups) sums of the numerator.
        wholes: (units, groups) sums of the denominator, at least 0.
        kind: see `Kind`.
        num_rows: (groups,) rows that count; None: the sum of the denominator.
    """
    whole = wholes.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(whole > 0, parts.sum(axis=0) / whole, np.nan)
        influence = np.where(whole > 0, (parts - wholes * np.nan_to_num(value)) / whole, 0.0)
    num_units = np.count_nonzero(wholes, axis=0).astype(np.float64)
    return from_influence(kind, value, influence, num_units, whole if num_rows is None else num_rows), influence


def from_influence(
    kind: Kind, value: FloatArray, influence: FloatArray, num_units: FloatArray, num_rows: FloatArray
) -> Estimates:
    """Return estimates whose variance is the sum of squared influences of the units, (units, groups)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        correction = np.where(num_units > 1, num_units / (num_units - 1), np.nan)
    error = np.sqrt(correction * np.einsum("ug,ug->g", influence, influence))
    return Estimates(kind, value, error, num_units, num_rows)


def _plain(value: float | np.floating[Any]) -> float | None:
    return None if np.isnan(value) else float(value)


def plain_values(values: FloatArray) -> list[float | None]:
    """Return numbers as JSON holds them; NaN: None."""
    return [_plain(value) for value in values]

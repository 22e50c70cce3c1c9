"""Age intervals by split conformal prediction (Vovk, Gammerman and Shafer 2005; Lei et al. 2018, JASA 113(523)).

A network that predicts a distribution over years gets `SpreadIntervals`: their width follows the spread of the
distribution, and they cover the true age as often as promised at every true age. Others get `GroupIntervals`, with one
width for each predicted age group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.terms import FloatArray
from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS, LabelSpace

MIN_ROWS: Final = 50
"""Minimum images for an age group to have its own width, and for gender or race to have a temperature. With 50 images,
the standard deviation of the coverage of a 90 % interval is 4 percentage points."""

NUM_NEIGHBOURS: Final = 75
"""Images of the nearest true ages on which the factor of an age is fitted, at least. On UTKFace with a weak model, 50
make intervals 1 % wider, and 150 make them 6 % narrower, but cover 81 instead of 87 % of the oldest age group."""

WITHIN_YEARS: Final = 4.0
"""All images within this distance of an age are among its neighbours, however many they are."""

WEIGHTS: Final = (0.0, 0.25, 0.5, 0.75, 0.9)
"""Weights of the spread that are tried. With the weight 0 all images have the same scale; with 1, a spread of 0 years
would allow no error at all."""

MIN_ROWS_TO_CHOOSE: Final = 200
"""With fewer images the weight is `USUAL_WEIGHT`: choosing by 20 to 50 images, intervals cover 2 percentage points less
(simulated)."""

USUAL_WEIGHT: Final = 0.5

_YEARS: Final = np.arange(AGE_MIN_YEARS, AGE_MAX_YEARS + 1)
_CHUNK_ROWS: Final = 1024  # arrays of a chunk fit into the cache, which halves the time

Ends = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Low and high ends of n intervals, (n,) years each."""


@dataclass(frozen=True)
class GroupIntervals:
    """Intervals of one half-width for each predicted age group with enough images (Mondrian conformal prediction)."""

    half_widths_years: tuple[float, ...]
    """By predicted (corrected) age group, in the order of the label space's age groups."""
    num_rows: tuple[int, ...]
    """Number of images on which each half-width was fitted: all if the group has fewer than `MIN_ROWS`."""

    @classmethod
    def fit(cls, ages: FloatArray, truth: FloatArray, coverage: float, space: LabelSpace) -> Self | None:
        """Fit on n images; None if they are too few.

        Args:
            ages: (n,) predicted (corrected) ages, years.
            truth: (n,) true ages, none missing.
            coverage: nominal share of true ages within their intervals.
            space: gives the age groups.
        """
        errors = np.abs(ages - truth)
        overall = conformal_quantile(errors, coverage)
        if overall is None:
            return None
        groups = space.age_group(ages)
        half_widths, num_rows = [], []
        for index in range(len(space.age_groups)):
            own = errors[groups == index]
            own_quantile = conformal_quantile(own, coverage) if len(own) >= MIN_ROWS else None
            half_widths.append(overall if own_quantile is None else own_quantile)
            num_rows.append(len(errors) if own_quantile is None else len(own))
        return cls(tuple(half_widths), tuple(num_rows))

    def ends(self, ages: NDArray[np.float32], space: LabelSpace) -> Ends:
        """Return the ends of the intervals of (n,) predicted (corrected) ages; NaN for NaN."""
        half_widths = np.asarray(self.half_widths_years)[space.age_group(ages)]
        return _valid(ages - half_widths), _valid(ages + half_widths)


@dataclass(frozen=True)
class SpreadIntervals:
    """Intervals whose width follows the spread of the predicted distribution, for each true age separately.

    The score of an image is its error divided by its scale, (1 - weight) mean spread + weight spread (normalised
    conformal prediction: Papadopoulos, Gammerman and Vovk 2008). The factor of an age is the conformal quantile of the
    scores of images whose true age is near it. An interval reaches from the lowest to the highest age whose factor,
    times the face's scale, is at least the distance to the prediction. So an age is excluded only if few faces of that
    age are predicted so differently (label-conditional conformal prediction: Vovk 2012, "Conditional validity of
    inductive conformal predictors").
    """

    weight: float
    """Of `WEIGHTS`, the one with the narrowest intervals on the images that they were fitted on, if they are enough."""
    mean_spread_years: float
    """Of these images."""
    factors: tuple[float, ...]
    """By true age, from `AGE_MIN_YEARS` to `AGE_MAX_YEARS`."""
    margin_years: float
    """0 if all true ages were whole years: then intervals end at whole years. Otherwise a half: the factor of a year
    counts for the ages that round to it."""

    @classmethod
    def fit(cls, ages: FloatArray, spread: FloatArray, truth: FloatArray, coverage: float) -> Self | None:
        """Fit on n images; None if they are too few.

        Args:
            ages: (n,) predicted (corrected) ages, years.
            spread: (n,) standard deviations of the predicted distributions, years.
            truth: (n,) true ages, none missing.
            coverage: nominal share of true ages within their intervals.
        """
        errors = np.abs(ages - truth)
        if conformal_quantile(errors, coverage) is None:
            return None
        mean = float(spread.mean()) or 1.0
        margin = 0.0 if (truth == np.rint(truth)).all() else 0.5
        neighbours = _neighbours(truth, coverage)
        best: tuple[float, Self] | None = None
        for weight in WEIGHTS if len(truth) >= MIN_ROWS_TO_CHOOSE else (USUAL_WEIGHT,):
            scores = errors / _scale(spread, mean, weight)
            factors = [conformal_quantile(scores[rows], coverage) for rows in neighbours]
            intervals = cls(weight, mean, tuple(each for each in factors if each is not None), margin)
            low, high = intervals.ends(ages.astype(np.float32), spread.astype(np.float32))
            width = float((high.astype(np.float64) - low).mean())
            if best is None or width < best[0]:
                best = width, intervals
        assert best is not None
        return best[1]

    def ends(self, ages: NDArray[np.float32], spread: NDArray[np.float32]) -> Ends:
        """Return the ends of the intervals of (n,) predicted (corrected) ages with their spread; NaN for NaN."""
        chunks = range(0, max(len(ages), 1), _CHUNK_ROWS)
        parts = [self._ends(ages[start : start + _CHUNK_ROWS], spread[start : start + _CHUNK_ROWS]) for start in chunks]
        low, high = (np.concatenate(each) for each in zip(*parts, strict=True))
        return low, high

    def half_widths_years(self) -> FloatArray:
        """Return how far a face of each true age with the mean spread may be predicted from it, years."""
        return self.mean_spread_years * np.asarray(self.factors)

    def _ends(self, ages: NDArray[np.float32], spread: NDArray[np.float32]) -> Ends:
        scale = _scale(spread.astype(np.float64), self.mean_spread_years, self.weight)
        centres = np.where(np.isnan(scale), np.nan, ages.astype(np.float64))
        # Rounding must not exclude the image that determined a factor.
        reach = scale[:, None] * (np.asarray(self.factors) * (1.0 + 1e-9))
        is_inside = np.abs(_YEARS - centres[:, None]) <= reach + self.margin_years
        first, last = is_inside.argmax(axis=1), is_inside.shape[1] - 1 - is_inside[:, ::-1].argmax(axis=1)
        rows = np.arange(len(ages))
        low = np.maximum(_YEARS[first] - self.margin_years, centres - reach[rows, first])
        high = np.minimum(_YEARS[last] + self.margin_years, centres + reach[rows, last])
        is_any = is_inside.any(axis=1)
        low, high = np.where(is_any, low, centres), np.where(is_any, high, centres)
        return _valid(np.minimum(low, centres)), _valid(np.maximum(high, centres))


def conformal_quantile(errors: FloatArray, coverage: float) -> float | None:
    """Return the ceil((n + 1) coverage)-th smallest error, a bound on a new error; None if that rank exceeds n."""
    rank = _rank(len(errors), coverage)
    return float(np.sort(errors)[rank - 1]) if rank <= len(errors) else None


def _rank(num: int, coverage: float) -> int:
    return math.ceil(round((num + 1) * coverage, 9))  # rounded first, because 100 * 0.55 is over 55


def _neighbours(truth: FloatArray, coverage: float) -> list[NDArray[np.bool_]]:
    """Return the images whose true age is near each age, (n,) bool: enough of them for the coverage, if there are."""
    num = NUM_NEIGHBOURS
    while _rank(num, coverage) > num:
        num += 1
    num = min(num, len(truth))
    distances = (np.abs(truth - year) for year in _YEARS)
    return [each <= max(float(np.partition(each, num - 1)[num - 1]), WITHIN_YEARS) for each in distances]


def _scale(spread: NDArray[np.floating[Any]], mean: float, weight: float) -> FloatArray:
    return np.asarray((1.0 - weight) * mean + weight * spread, np.float64)


def _valid(ends: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Clip to the range of labels, which excludes none."""
    return ends.clip(AGE_MIN_YEARS, AGE_MAX_YEARS).astype(np.float32)

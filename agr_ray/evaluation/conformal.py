"""Corrected ages, and age intervals by Mondrian split conformal prediction.

There is one width for each predicted age group with enough images (Vovk, Gammerman and Shafer 2005; Lei et al. 2018,
JASA 113(523)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.terms import FloatArray
from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS, Labels, LabelSpace

MIN_ROWS: Final = 50
"""Minimum images for an age group to have its own width, and for gender or race to have a temperature. With 50 images,
the standard deviation of the coverage of a 90 % interval is 4 percentage points."""


@dataclass(frozen=True)
class AgeCalibration:
    """Corrected ages and their intervals."""

    n: int
    """Images with an exact age that it was fitted on."""
    half_widths_years: tuple[float, ...]
    """By predicted (corrected) age group, in the order of the label space's age groups."""
    num_rows: tuple[int, ...]
    """Number of images on which each half-width was fitted: all n if the group has fewer than `MIN_ROWS`."""
    offset_years: float = 0.0
    """The corrected age is `offset_years` + `slope` times the predicted one."""
    slope: float = 1.0

    def apply(self, predicted: NDArray[np.float32], space: LabelSpace) -> tuple[NDArray[np.float32], ...]:
        """Return the corrected ages, and the low and the high ends of their intervals, (n,) years each."""
        ages = _corrected(predicted, self.offset_years, self.slope)
        half_widths = np.asarray(self.half_widths_years)[space.age_group(ages)]
        low, high = (
            # All labels are in this range, so clipping excludes none.
            np.clip(ages + sign * half_widths, AGE_MIN_YEARS, AGE_MAX_YEARS).astype(np.float32)
            for sign in (-1.0, 1.0)
        )
        return ages, low, high


def fit_age(
    labels: Labels, predicted: NDArray[np.float32], coverage: float, notes: list[str], *, correct: bool = False
) -> AgeCalibration | None:
    """Fit intervals on the images with an exact age; if these are too few, return None and add a note.

    Args:
        labels: the truth.
        predicted: (n,) ages of the same images, years.
        coverage: nominal share of true ages within their intervals.
        notes: a note on anything that could not be fitted is appended.
        correct: also fit the correction, by linear least squares of the true age on the predicted one. The intervals
            are fitted on the same images; two parameters hardly make them too narrow.
    """
    known = np.isfinite(labels.age)
    offset_years, slope = 0.0, 1.0
    if correct:
        offset_years, slope = _regression(predicted[known], labels.age[known], notes)
        predicted = _corrected(predicted, offset_years, slope)
    errors = np.abs(predicted[known].astype(np.float64) - labels.age[known])
    overall = _conformal_quantile(errors, coverage)
    if overall is None:
        num_ranges = int(np.isfinite(labels.age_range[0]).sum()) - len(errors)
        besides = f"; {num_ranges:,} others are labelled with an age range, which has no error" if num_ranges else ""
        notes.append(
            f"age: {len(errors)} images labelled with an exact age are too few for intervals of coverage {coverage}"
            + (" and so for corrected ages" if correct else "")
            + besides
        )
        return None
    groups = labels.space.age_group(predicted[known])
    half_widths, num_rows = [], []
    for index in range(len(labels.space.age_groups)):
        own = errors[groups == index]
        own_quantile = _conformal_quantile(own, coverage) if len(own) >= MIN_ROWS else None
        half_widths.append(overall if own_quantile is None else own_quantile)
        num_rows.append(len(errors) if own_quantile is None else len(own))
    return AgeCalibration(len(errors), tuple(half_widths), tuple(num_rows), offset_years, slope)


def _corrected(predicted: NDArray[np.float32], offset_years: float, slope: float) -> NDArray[np.float32]:
    """Return corrected ages, (n,) years."""
    if (offset_years, slope) == (0.0, 1.0):
        return predicted
    years = offset_years + slope * predicted.astype(np.float64)
    corrected: NDArray[np.float32] = years.clip(AGE_MIN_YEARS, AGE_MAX_YEARS).astype(np.float32)
    return corrected


def _regression(predicted: NDArray[np.float32], truth: NDArray[np.float32], notes: list[str]) -> tuple[float, float]:
    """Return the offset and the slope of the true age on the predicted one; 0 and 1, with a note, if none fits."""
    if len(truth) < MIN_ROWS:
        notes.append(f"age: not corrected, because {len(truth)} images with an exact age are fewer than {MIN_ROWS}")
        return 0.0, 1.0
    spread = float(np.ptp(predicted))
    slope, offset_years = (
        np.polyfit(predicted.astype(np.float64), truth.astype(np.float64), 1) if spread else (0.0, 0.0)
    )
    if slope <= 0.0:
        notes.append("age: not corrected, because older faces are not predicted to be older")
        return 0.0, 1.0
    return float(offset_years), float(slope)


def _conformal_quantile(errors: FloatArray, coverage: float) -> float | None:
    """Return the ceil((n + 1) coverage)-th smallest error, a bound on a new error; None if that rank exceeds n."""
    rank = math.ceil(round((len(errors) + 1) * coverage, 9))  # rounded first, because 100 * 0.55 is over 55
    return float(np.sort(errors)[rank - 1]) if rank <= len(errors) else None

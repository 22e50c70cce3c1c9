"""Corrected ages and their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.conformal import MIN_ROWS, GroupIntervals, SpreadIntervals
from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS, Labels, LabelSpace


@dataclass(frozen=True)
class AgeCalibration:
    """Corrected ages and their intervals. Exactly one of `by_spread` and `by_group` is given."""

    n: int
    """Images with an exact age that it was fitted on."""
    by_spread: SpreadIntervals | None
    """For a network that predicts a distribution over years."""
    by_group: GroupIntervals | None
    """For any other."""
    offset_years: float = 0.0
    """The corrected age is `offset_years` + `slope` times the predicted one."""
    slope: float = 1.0

    def apply(
        self, predicted: NDArray[np.float32], spread: NDArray[np.float32] | None, space: LabelSpace
    ) -> tuple[NDArray[np.float32], ...]:
        """Return the corrected ages, and the low and the high ends of their intervals, (n,) years each.

        Args:
            predicted: (n,) years.
            spread: (n,) years, `age_spread` of the predictions; only `by_spread` needs it.
            space: the label space of the age groups.
        """
        ages = _corrected(predicted, self.offset_years, self.slope)
        if self.by_spread is not None:
            assert spread is not None
            return ages, *self.by_spread.ends(ages, spread)
        assert self.by_group is not None
        return ages, *self.by_group.ends(ages, space)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], space: LabelSpace) -> Self:
        """Rebuild from the values of `dataclasses.asdict`.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or unknown, or has another shape.
        """
        by_spread, by_group = values["by_spread"], values["by_group"]
        if (by_spread is None) == (by_group is None):
            raise ValueError("expected either age.by_spread or age.by_group")
        if by_spread is not None:
            num_years = int(AGE_MAX_YEARS - AGE_MIN_YEARS) + 1
            by_spread = SpreadIntervals(**by_spread | {"factors": _numbers(by_spread, "factors", num_years)})
        if by_group is not None:
            names, num_groups = ("half_widths_years", "num_rows"), len(space.age_groups)
            by_group = GroupIntervals(**by_group | {name: _numbers(by_group, name, num_groups) for name in names})
        return cls(**{**values, "by_spread": by_spread, "by_group": by_group})


def fit_age(
    labels: Labels,
    predicted: NDArray[np.float32],
    spread: NDArray[np.float32] | None,
    coverage: float,
    notes: list[str],
    *,
    correct: bool = False,
) -> AgeCalibration | None:
    """Fit intervals on the images with an exact age; if these are too few, return None and add a note.

    Args:
        labels: the truth.
        predicted: (n,) ages of the same images, years.
        spread: (n,) `age_spread` of the same images, years; None: the network predicts no distribution.
        coverage: nominal share of true ages within their intervals.
        notes: a note on anything that could not be fitted is appended.
        correct: also fit the correction, by linear least squares of the true age on the predicted one. The intervals
            are fitted on the same images; two parameters hardly make them too narrow.
    """
    known = np.isfinite(labels.age)
    offset_years, slope = 0.0, 1.0
    if correct:
        offset_years, slope = _regression(predicted[known], labels.age[known], notes)
    ages = _corrected(predicted[known], offset_years, slope).astype(np.float64)
    truth = labels.age[known].astype(np.float64)
    by_spread, by_group = None, None
    if spread is None:
        by_group = GroupIntervals.fit(ages, truth, coverage, labels.space)
    else:
        by_spread = SpreadIntervals.fit(ages, spread[known].astype(np.float64), truth, coverage)
    if by_spread is None and by_group is None:
        num_ranges = int(np.isfinite(labels.age_range[0]).sum()) - len(truth)
        besides = f"; {num_ranges:,} others are labelled with an age range, which has no error" if num_ranges else ""
        notes.append(
            f"age: {len(truth)} images labelled with an exact age are too few for intervals of coverage {coverage}"
            + (" and so for corrected ages" if correct else "")
            + besides
        )
        return None
    return AgeCalibration(len(truth), by_spread, by_group, offset_years, slope)


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


def _numbers(values: Mapping[str, Any], name: str, num: int) -> tuple[Any, ...]:
    """Return a list of numbers as a tuple, after checking its length."""
    numbers = tuple(values[name])
    if len(numbers) != num:
        raise ValueError(f"expected {num} {name}, found {len(numbers)}")
    return numbers

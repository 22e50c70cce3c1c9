"""The worst and the best group of a breakdown, with their difference and ratio.

The two groups are chosen because their values are extreme, so an ordinary 95 % interval of their difference would
exclude 0 far too often. The intervals here hold for all pairs of groups together (Bonferroni; Dunn 1961, JASA 56). The
interval of a difference is put together from those of the two groups (MOVER; Zou and Donner 2008, Statistics in
Medicine 27), and so is that of a ratio (Donner and Zou 2012, Statistical Methods in Medical Research 21). Both treat
the groups as independent. Where a person's images are in two groups, such as two age groups, they are usually too wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.estimates import CONFIDENCE, Estimates

MIN_ROWS: Final = 30
"""Smaller groups, and groups of fewer persons, are left out: their intervals rest on too little."""


def disparity(names: Sequence[str], estimates: Estimates, *, lower_is_better: bool) -> dict[str, Any] | None:
    """Compare the worst and the best of several groups; None if fewer than two are large enough.

    Keys: `num_groups` (compared), `num_small` (left out: they have some rows, but too few) and `worst_small`, the worst
    of these (None: there are none); `worst` and `best`; each of the three has `name`, `value` and `n`; `gap` (worst -
    best, in absolute value) and `gap_interval`; `ratio` (larger / smaller; None if the smaller is 0) and
    `ratio_interval`; `differs`: whether the interval of the gap excludes 0, which means that the data show a difference
    between groups.

    Args:
        names: of the groups.
        estimates: of the groups. For a signed metric, such as a bias, the largest absolute value is the worst, and the
            gap is between the two ends.
        lower_is_better: whether it is an error.
    """
    has_value = np.isfinite(estimates.value)
    is_large = np.minimum(estimates.num_rows, estimates.num_units) >= MIN_ROWS
    large, small = np.flatnonzero(has_value & is_large), np.flatnonzero(has_value & ~is_large)
    if len(large) < 2:
        return None
    num_pairs = len(large) * (len(large) - 1) // 2
    # Each interval of a pair has the confidence that all pairs together need.
    ends = estimates.intervals(1.0 - (1.0 - CONFIDENCE) / num_pairs)
    values, rows = estimates.value[large], estimates.num_rows[large]
    low, high = (
        int(large[np.lexsort((-rows, extreme))[0]]) for extreme in (values, -values)
    )  # of equal values, the largest group
    is_high_worst = lower_is_better
    if estimates.kind == "signed":
        is_high_worst = abs(estimates.value[high]) >= abs(estimates.value[low])
    small_value, large_value = float(estimates.value[low]), float(estimates.value[high])
    (small_low, small_high), (large_low, large_high) = ends[low], ends[high]
    gap = large_value - small_value
    gap_interval = [
        gap - math.hypot(large_value - large_low, small_high - small_value),
        gap + math.hypot(large_high - large_value, small_value - small_low),
    ]
    worst, best = (high, low) if is_high_worst else (low, high)
    is_ratio = estimates.kind != "signed" and small_value > 0.0
    return {
        "num_groups": len(large),
        "num_small": len(small),
        "worst_small": _side(names, estimates, _worst(estimates, small, lower_is_better)) if len(small) else None,
        "worst": _side(names, estimates, worst),
        "best": _side(names, estimates, best),
        "gap": gap,
        "gap_interval": gap_interval,
        "ratio": large_value / small_value if is_ratio else None,
        "ratio_interval": _ratio_interval(large_value, large_low, large_high, small_value, small_low, small_high)
        if is_ratio
        else None,
        "differs": gap_interval[0] > 0.0,
    }


def _worst(estimates: Estimates, groups: NDArray[np.int64], lower_is_better: bool) -> int:
    values = estimates.value[groups]
    badness = np.abs(values) if estimates.kind == "signed" else values if lower_is_better else -values
    return int(groups[badness.argmax()])


def _side(names: Sequence[str], estimates: Estimates, index: int) -> dict[str, Any]:
    return {
        "name": names[index],
        "value": float(estimates.value[index]),
        "n": int(estimates.num_rows[index]),
    }


def _ratio_interval(
    part: float, part_low: float, part_high: float, whole: float, whole_low: float, whole_high: float
) -> list[float] | None:
    """Return the interval of part / whole (Donner and Zou 2012, equation 9); None if the whole may be 0."""
    if whole_low <= 0.0:
        return None

    # The lower end is multiplied by its conjugate, because the paper's form divides by 0 at whole_high = 2 * whole.
    product = part * whole
    lower = part_low * (2 * part - part_low)
    upper = part_high * (2 * part - part_high)
    under = product**2 - lower * whole_high * (2 * whole - whole_high)
    over = product**2 - upper * whole_low * (2 * whole - whole_low)
    return [
        lower / (product + math.sqrt(max(under, 0.0))),
        (product + math.sqrt(max(over, 0.0))) / (whole_low * (2 * whole - whole_low)),
    ]

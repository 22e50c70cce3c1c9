"""Selective prediction: the risk among the rows of which the model is most certain, against their share.

El-Yaniv and Wiener 2010 (JMLR 11); the area under the curve is that of Geifman, Uziel and El-Yaniv 2019 (ICLR): the
mean over all rows of the risk at the threshold that just accepts the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.estimates import Kind, from_influence, ratios
from agr_ray.evaluation.terms import FloatArray
from agr_ray.evaluation.units import Units

_NUM_POINTS: Final = 20
"""Coverages: 5, 10, ... 100 %."""
_PART_ROWS: Final = 500_000
"""Rows that are handled at a time after the sort."""


def selective_risk(
    uncertainty: NDArray[np.floating[Any]], loss: NDArray[Any], units: Units, kind: Kind
) -> dict[str, Any] | None:
    """Return the risk-coverage curve of n rows, and its area; None without rows.

    Keys: `n`; `area` and `area_interval`; `curve`, a list of points by coverage: `coverage` (share of rows accepted),
    `n` (accepted), `max_uncertainty` (of an accepted row), `risk` (their mean loss) and `interval` (95 %, of the risk
    with this threshold). Rows of equal uncertainty are accepted together, so a coverage may be higher than the 5, 10,
    ... 100 % that are asked for, and points that accept the same rows are given once.

    Args:
        uncertainty: (n,) the lower, the more certain.
        loss: (n,) of any type, at least 0: 1 for an error and 0 otherwise, or years.
        units: sampling unit of each row.
        kind: `share` if the loss is 0 or 1, else `positive`.
    """
    num_rows = len(loss)
    if not num_rows:
        return None
    order = np.argsort(uncertainty, kind="stable")
    sums = _Sums(units, num_rows)
    for start, end in _parts(uncertainty, order):
        rows = order[start:end]
        sums.update(start, uncertainty[rows], loss[rows].astype(np.float64), units.codes[rows])
    area, influence = sums.area()
    num_units = float(np.count_nonzero(np.bincount(units.codes, minlength=units.num)))
    estimate = from_influence(
        "fraction" if kind == "share" else kind,
        np.array([area]),
        influence[:, None],
        np.array([num_units]),
        np.array([float(num_rows)]),
    )
    return {
        "n": num_rows,
        "area": area,
        "area_interval": estimate.plain_intervals[0],
        "curve": sums.curve(kind),
    }


def _parts(uncertainty: NDArray[np.floating[Any]], order: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the first place and the end of parts of about `_PART_ROWS` rows that divide no block of equal values."""
    start = 0
    while start < len(order):
        end = min(start + _PART_ROWS, len(order))
        last = uncertainty[order[end - 1]]
        while end < len(order):
            is_other = uncertainty[order[end : end + _PART_ROWS]] != last
            if is_other.any():
                end += int(is_other.argmax())
                break
            end += len(is_other)
        yield start, end
        start = end


class _Sums:
    """Sums over rows in the order of their uncertainty.

    With weights w, the risk of a block of equal uncertainty is E/C, E and C being the sums of w * loss and of w up to
    its end, and the area is the mean of the risks weighted by w. A row enters E and C of its own block and of all later
    ones, so its influence on the area is (risk - area - later_risk + loss * later) / n, where `later` is the sum of
    size / C, and `later_risk` that of size * risk / C, over these blocks. Both are a total less the sum over earlier
    blocks, so one pass suffices.
    """

    def __init__(self, units: Units, num_rows: int) -> None:
        self._units, self._num_rows = units, num_rows
        self._lost, self._area = 0.0, 0.0
        self._earlier, self._earlier_risk = 0.0, 0.0
        # By unit: rows, losses, and the part of the influence that is known before the pass ends.
        self._rows, self._losses, self._known = np.zeros((3, units.num))
        wanted = {math.ceil(num_rows * point / _NUM_POINTS) for point in range(1, _NUM_POINTS + 1)}
        self._wanted = np.array(sorted(wanted))
        self._points: list[tuple[int, float, FloatArray, FloatArray]] = []

    def update(
        self, start: int, uncertainty: NDArray[np.floating[Any]], losses: FloatArray, codes: NDArray[np.int16]
    ) -> None:
        """Count the rows from place `start` on, in order; they are whole blocks."""
        ends = np.flatnonzero(np.concatenate([uncertainty[1:] != uncertainty[:-1], [True]])) + 1
        sizes = np.diff(ends, prepend=0)
        accepted = start + ends
        risks = (self._lost + np.cumsum(losses)[ends - 1]) / accepted
        shares, weighted = sizes / accepted, sizes * risks / accepted
        earlier = self._earlier + np.cumsum(shares) - shares
        earlier_risk = self._earlier_risk + np.cumsum(weighted) - weighted
        known = np.repeat(risks + earlier_risk, sizes) - losses * np.repeat(earlier, sizes)
        self._add_points(start, accepted, uncertainty[ends - 1], losses, codes)
        self._known += np.bincount(codes, known, self._units.num)
        self._area += float((sizes * risks).sum())
        self._lost += float(losses.sum())
        self._earlier += float(shares.sum())
        self._earlier_risk += float(weighted.sum())

    def _add_points(
        self,
        start: int,
        accepted: NDArray[np.int64],
        uncertainty: NDArray[np.floating[Any]],
        losses: FloatArray,
        codes: NDArray[np.int16],
    ) -> None:
        """Note rows and losses by unit at each wanted coverage of these rows."""
        last = start
        own = self._wanted[(self._wanted > start) & (self._wanted <= accepted[-1])]
        for place in np.unique(np.searchsorted(accepted, own)).tolist():
            self._add_units(last - start, int(accepted[place]) - start, losses, codes)
            last = int(accepted[place])
            self._points.append((last, float(uncertainty[place]), self._rows.copy(), self._losses.copy()))
        self._add_units(last - start, len(losses), losses, codes)

    def _add_units(self, first: int, end: int, losses: FloatArray, codes: NDArray[np.int16]) -> None:
        self._rows += np.bincount(codes[first:end], minlength=self._units.num)
        self._losses += np.bincount(codes[first:end], losses[first:end], self._units.num)

    def area(self) -> tuple[float, FloatArray]:
        """Return the area, and the influence of each unit on it, (units,)."""
        area = self._area / self._num_rows
        whole = self._known - (area + self._earlier_risk) * self._rows + self._earlier * self._losses
        return area, whole / self._num_rows

    def curve(self, kind: Kind) -> list[dict[str, Any]]:
        """Return the points of the curve."""
        rows, lost = (np.stack([point[part] for point in self._points], axis=1) for part in (2, 3))
        return [
            {
                "coverage": num / self._num_rows,
                "n": num,
                "max_uncertainty": uncertainty,
                "risk": risk,
                "interval": interval,
            }
            for (num, uncertainty, _, _), (risk, interval) in zip(
                self._points, ratios(lost, rows, kind)[0].to_json(), strict=True
            )
        ]

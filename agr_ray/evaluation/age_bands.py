"""Predicted ages by true age, as quantiles: a chart of any number of rows."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_ROWS: Final = 10
"""Fewer rows are put together with those of the next ages, or, if they are the oldest, of the ages before."""
_QUANTILES: Final = (0.1, 0.5, 0.9)


class AgeBand(NamedTuple):
    """The predicted ages of people of about the same age."""

    true_age_years: float
    """Their mean true age."""
    low_years: float
    """Tenth percentile of the predicted ages."""
    median_years: float
    high_years: float
    """Ninetieth percentile."""
    n: int


def age_bands(true_years: NDArray[np.floating[Any]], predicted_years: NDArray[np.floating[Any]]) -> list[AgeBand]:
    """Return the bands of n rows, youngest first: one for each year of age that has enough rows.

    Args:
        true_years: (n,); NaN: unknown, and left out.
        predicted_years: (n,) of the same rows.
    """
    known = np.isfinite(true_years)
    order = np.argsort(true_years[known], kind="stable")
    truth, predicted = true_years[known][order].astype(np.float64), predicted_years[known][order].astype(np.float64)
    bands: list[AgeBand] = []
    start = 0
    while start < len(truth):
        # All rows of the year that the band begins with; with too few, those of the next years too.
        end = int(np.searchsorted(truth, np.floor(truth[start]) + 1.0, side="left"))
        while end - start < MIN_ROWS and end < len(truth):
            end = int(np.searchsorted(truth, np.floor(truth[end]) + 1.0, side="left"))
        rows = slice(start, end)
        if end - start < MIN_ROWS and bands:  # the oldest: with those of the last band
            rows = slice(start - bands.pop().n, end)
        low, median, high = np.quantile(predicted[rows], _QUANTILES)
        num_rows = rows.stop - rows.start
        bands.append(AgeBand(float(truth[rows].mean()), float(low), float(median), float(high), num_rows))
        start = end
    return bands

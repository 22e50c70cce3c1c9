"""Expected calibration error, and the reliability curve: accuracy against confidence.

The expected calibration error is the mean gap between confidence and accuracy over 15 bins of equal width (Guo et al.
2017, ICML, equation 3). It has no interval: it is biased upwards, the more so the fewer rows there are (Roelofs et al.
2022, AISTATS), and where the model is calibrated its distribution is far from normal. The signed gap, `overconfidence`,
has one.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.estimates import ratios
from agr_ray.evaluation.terms import FloatArray
from agr_ray.evaluation.units import Units, unit_sums
from agr_ray.labels import IntArray

NUM_BINS: Final = 15


def confidence_bins(confidence: FloatArray) -> IntArray:
    """Return the bin of each confidence, (n,), of `NUM_BINS` of equal width from 0 to 1."""
    return np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def expected_calibration_error(probs: NDArray[np.floating[Any]], truth: IntArray) -> float:
    """Return the expected calibration error of n rows.

    Args:
        probs: (n, classes), n at least 1.
        truth: (n,) indices, none missing.
    """
    confidence = probs.max(axis=1).astype(np.float64)
    gap = (probs.argmax(axis=1) == truth) - confidence
    return float(np.abs(np.bincount(confidence_bins(confidence), gap)).sum() / len(truth))


def gap_sums(confidence: FloatArray, is_right: FloatArray, cells: IntArray, num_cells: int) -> FloatArray:
    """Return the sum of (right - confidence) of n rows by cell and bin, (cells, bins)."""
    places = cells * NUM_BINS + confidence_bins(confidence)
    summed = np.bincount(places, is_right - confidence, num_cells * NUM_BINS)
    return summed.reshape(num_cells, NUM_BINS).astype(np.float64, copy=False)


class ReliabilitySums:
    """Sums of the reliability curve; parts may be added in any order."""

    def __init__(self, num_units: int) -> None:
        self._rows, self._right, self._confidence = np.zeros((3, num_units, NUM_BINS))

    def update(self, confidence: FloatArray, is_right: NDArray[np.bool_], units: Units) -> None:
        """Count n rows.

        Args:
            confidence: (n,) probability of the predicted class.
            is_right: (n,) whether the predicted class is the true one.
            units: sampling unit of each row.
        """
        bins = confidence_bins(confidence)
        self._rows += unit_sums(units, bins, NUM_BINS)
        self._right += unit_sums(units, bins, NUM_BINS, is_right)
        self._confidence += unit_sums(units, bins, NUM_BINS, confidence)

    def to_json(self) -> list[dict[str, Any]]:
        """Return a point for each bin that has rows: its ends, n, mean confidence, accuracy and its 95 % interval."""
        accuracy, _ = ratios(self._right, self._rows, "share")
        num, total = self._rows.sum(axis=0), self._confidence.sum(axis=0)
        return [
            {
                "from": k / NUM_BINS,
                "to": (k + 1) / NUM_BINS,
                "n": int(num[k]),
                "confidence": float(total[k] / num[k]),
                "accuracy": value,
                "interval": interval,
            }
            for k, (value, interval) in enumerate(accuracy.to_json())
            if num[k]
        ]

"""Bootstrap intervals of the headline metrics."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.terms import FloatArray, row_terms
from agr_ray.labels import IntArray, Labels
from agr_ray.models.predictions import Predictions

NUM_RESAMPLES: Final = 1000
MIN_UNITS: Final = 2
"""Minimum number of rows (or persons) for an interval."""
_INTERVAL = 0.95
_CHUNK_WEIGHTS = 4_000_000


def intervals(
    labels: Labels,
    predictions: Predictions,
    clusters: IntArray | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, dict[str, list[float] | None]]:
    """Return 95 % percentile bootstrap intervals of the headline metrics.

    None for a metric with fewer than two rows (or persons): resampling a single one would give an interval of zero
    width. Each resample is a vector of weights over rows (or persons), so all resamples of all metrics are one matrix
    product. For the arguments see `metrics.metrics_report`.
    """
    terms = row_terms(labels, predictions)
    values = np.stack(list(terms.values()), axis=1)
    if clusters is not None:
        values = sums_by_person(values, clusters)
    rng = np.random.default_rng(seed)
    sums = dict(zip(terms, resampled_sums(values, num_resamples, rng).T, strict=True))

    num_units = dict(zip(terms, np.count_nonzero(values, axis=0), strict=True))

    def share(part: str, whole: str) -> FloatArray:
        if num_units[whole] < MIN_UNITS:
            return np.full(num_resamples, np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(sums[part] / sums[whole], np.float64)

    def recall(task: str, k: int) -> FloatArray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(sums[f"{task}_right_{k}"] / sums[f"{task}_true_{k}"], np.float64)

    def balanced(task: str, num_classes: int) -> FloatArray:
        if num_units[task] < MIN_UNITS:
            return np.full(num_resamples, np.nan)
        recalls = np.stack([recall(task, k) for k in range(num_classes)])
        present = np.isfinite(recalls)
        num_present = present.sum(axis=0)
        mean: FloatArray = np.where(present, recalls, 0.0).sum(axis=0) / np.where(num_present, num_present, np.nan)
        return mean

    return {
        "age": {
            "mae_years": percentiles(share("age_absolute", "age")),
            "bias_years": percentiles(share("age_signed", "age")),
            "within_5": percentiles(share("age_within", "age")),
            "exact_group": percentiles(share("age_exact_group", "age_grouped")),
            "one_off": percentiles(share("age_one_off", "age_grouped")),
        },
        "gender": {
            "accuracy": percentiles(share("gender_right", "gender")),
            "balanced_accuracy": percentiles(balanced("gender", len(labels.space.genders))),
        },
        "race": {
            "accuracy": percentiles(share("race_right", "race")),
            "balanced_accuracy": percentiles(balanced("race", len(labels.space.races))),
        },
    }


def sums_by_person(values: FloatArray, clusters: NDArray[Any]) -> FloatArray:
    """Return the sum of the rows of each person, (persons, ...), from (n, ...) rows and the (n,) person of each."""
    persons = np.unique(clusters, return_inverse=True)[1]
    summed = np.zeros((int(persons.max(initial=-1)) + 1, *values.shape[1:]))
    np.add.at(summed, persons, values)
    return summed


def resampled_sums(values: FloatArray, num_resamples: int, rng: np.random.Generator) -> FloatArray:
    """Return (num_resamples, columns): sums over n rows that are drawn with replacement, n being all rows."""
    num_rows = len(values)
    if num_rows == 0:
        return np.zeros((num_resamples, values.shape[1]))
    parts = []
    at_once = max(1, _CHUNK_WEIGHTS // num_rows)
    for first in range(0, num_resamples, at_once):
        num = min(at_once, num_resamples - first)
        drawn = rng.integers(0, num_rows, size=(num, num_rows))
        drawn += np.arange(num)[:, None] * num_rows
        weights = np.bincount(drawn.ravel(), minlength=num * num_rows).reshape(num, num_rows)
        parts.append(weights.astype(np.float64) @ values)
    return np.concatenate(parts)


def percentiles(samples: FloatArray) -> list[float] | None:
    """Return the 95 % interval of resampled values; None if none is finite."""
    finite = samples[np.isfinite(samples)]
    if not len(finite):
        return None
    tail = 50.0 * (1.0 - _INTERVAL)
    low, high = np.percentile(finite, (tail, 100.0 - tail))
    return [float(low), float(high)]

"""Metrics of a cross-validation: of each fold, and over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from agr_ray.evaluation.comparison import METRICS as COMPARED
from agr_ray.evaluation.terms import ratio, row_terms
from agr_ray.labels import Labels
from agr_ray.models.predictions import Predictions

METRICS: Final[Mapping[str, tuple[str, str]]] = {**COMPARED, "age_exact_group": ("age_exact_group", "age_grouped")}
"""Each metric's terms of `terms.row_terms`: its sum, and the number of its rows. The names are schema.FOLD_METRICS."""

Sums = dict[str, tuple[float, float]]


def fold_sums(labels: Labels, predictions: Predictions) -> Sums:
    """Return the sum and the number of rows of each metric, of n predictions of one fold."""
    terms = row_terms(labels, predictions)
    return {metric: (float(terms[part].sum()), float(terms[whole].sum())) for metric, (part, whole) in METRICS.items()}


def fold_values(sums: Sums) -> dict[str, float | None]:
    """Return each metric of a fold; None where no row has a label."""
    return {metric: ratio(*parts) for metric, parts in sums.items()}


def summarise(folds: Sequence[Sums]) -> list[dict[str, Any]]:
    """Return a row of schema.FOLD_SUMMARY for each metric that any fold has.

    `std` is the standard deviation of the folds' values with n - 1 in the denominator, and `standard_error` is it
    divided by the square root of their number, as Eidinger et al. (2014) report for Adience; both are null for a single
    fold. `pooled` divides once over all images: the figure that is usual for FG-NET, whose folds differ in size.
    """
    rows = []
    for metric in METRICS:
        values = [value for sums in folds if (value := ratio(*sums[metric])) is not None]
        if not values:
            continue
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(
            {
                "metric": metric,
                "num_folds": len(values),
                "mean": float(np.mean(values)),
                "std": std,
                "standard_error": None if std is None else std / math.sqrt(len(values)),
                "pooled": ratio(sum(sums[metric][0] for sums in folds), sum(sums[metric][1] for sums in folds)),
            }
        )
    return rows

"""Rows of comparison.parquet: estimates as columns, back again, and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from agr_ray.config.presets import PRESETS
from agr_ray.evaluation.comparison import Estimate
from agr_ray.schema import COMPARED_METRICS

LABELS: Final = {
    "age_mae_years": "age MAE, years",
    "age_within_5": "within 5 years",
    "age_one_off": "one-off",
    "gender_accuracy": "gender",
    "race_accuracy": "race",
}
_CITED: Final = {
    "age_mae_years": "mae_years",
    "age_one_off": "one_off",
    "gender_accuracy": "gender",
    "race_accuracy": "race",
}


def metric_columns(preset: str, estimates: Mapping[str, Estimate]) -> dict[str, float | None]:
    """Return the columns of the metrics: values, intervals, differences, and what the paper cites."""
    columns: dict[str, float | None] = {}
    for metric in COMPARED_METRICS:
        estimate = estimates.get(metric)
        if estimate is not None:
            columns[metric] = estimate.value
            columns[f"{metric}_low"], columns[f"{metric}_high"] = estimate.interval
            columns[f"{metric}_difference"] = estimate.difference
            for part, interval in (
                ("difference", estimate.difference_interval),
                ("adjusted", estimate.adjusted_interval),
            ):
                if interval is not None:
                    columns[f"{metric}_{part}_low"], columns[f"{metric}_{part}_high"] = interval
        columns[f"{metric}_cited"] = cited(preset, metric)
    return columns


def estimates_of(row: Mapping[str, Any], with_seeds: frozenset[str] = frozenset()) -> dict[str, Estimate]:
    """Return the estimates in a row, by metric; those of `with_seeds` hold the variance between seeds."""
    estimates = {}
    for metric in COMPARED_METRICS:
        if row[metric] is None:
            continue
        own, apart, adjusted = (
            (row[f"{metric}{part}_low"], row[f"{metric}{part}_high"]) for part in ("", "_difference", "_adjusted")
        )
        difference = row[f"{metric}_difference"]
        estimates[metric] = Estimate(
            row[metric],
            own,
            difference,
            None if difference is None else apart,
            None if difference is None else adjusted,
            metric in with_seeds,
        )
    return estimates


def cited(preset: str, metric: str) -> float | None:
    """Return what the paper cites; None: nothing."""
    figures = PRESETS[preset].cited
    return getattr(figures, _CITED[metric]) if figures is not None and metric in _CITED else None


def text(metric: str, estimate: Estimate | None) -> str:
    """Return an estimate with its interval: `7.31 (7.05-7.58)`, or in percent."""
    if estimate is None:
        return ""
    factor, digits = _unit(metric)
    low, high = (end * factor for end in estimate.interval)
    return f"{estimate.value * factor:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def difference_text(metric: str, estimate: Estimate | None) -> str:
    """Return the difference from the reference with its adjusted interval: `+0.31 (+0.05 to +0.58)`; in points of %."""
    if estimate is None or estimate.difference is None or estimate.adjusted_interval is None:
        return ""
    factor, digits = _unit(metric)
    low, high = (end * factor for end in estimate.adjusted_interval)
    return f"{estimate.difference * factor:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _unit(metric: str) -> tuple[float, int]:
    """Return the factor and the number of decimals with which a metric is shown."""
    return (1.0, 2) if metric == "age_mae_years" else (100.0, 1)

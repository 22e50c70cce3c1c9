"""Headline metrics of corrupted images beside those of the same images as they are.

Errors are averaged over severities and then over corruptions, as by Hendrycks and Dietterich, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations", ICLR 2019. Their mCE also divides each corruption's error
by that of AlexNet; these averages do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.comparison import METRICS as COMPARED
from agr_ray.evaluation.comparison import NUM_RESAMPLES, resample_weights
from agr_ray.evaluation.estimates import MIN_UNITS
from agr_ray.evaluation.terms import FloatArray
from agr_ray.evaluation.units import term_sums, units_of
from agr_ray.labels import Labels
from agr_ray.models.predictions import Predictions
from agr_ray.schema import CLEAN, STRESSED_METRICS, YAW

METRICS: Final[Mapping[str, tuple[str, str]]] = {
    name: {**COMPARED, "age_bias_years": ("age_signed", "age")}[name] for name in STRESSED_METRICS
}
"""Each metric's terms of `terms.row_terms`: its sum, and the number of its rows."""

YAW_EDGES_DEGREES: Final = (0.0, 10.0, 20.0, 30.0, 45.0, 90.0)
"""Of the bins of |yaw|; the last bin includes its upper edge. Yaw is accurate to about ten degrees."""


class Condition(NamedTuple):
    """A corruption and its severity."""

    corruption: str
    severity: int


@dataclass(frozen=True)
class Measured:
    """A metric under one condition, or its mean over several."""

    value: float
    interval: list[float] | None
    """95 %, over persons, or over images where persons are not known; None with fewer than two."""
    difference: float | None = None
    """From the clean images; None: these are the clean ones."""
    difference_interval: list[float] | None = None


Metrics = Mapping[str, Measured]
"""By name; a metric without a labelled image, or without a head, is left out."""


@dataclass(frozen=True)
class Robustness:
    """A stress test."""

    n: int
    """Number of images, the same under all conditions."""
    clean: Metrics
    conditions: Mapping[Condition, Metrics]
    by_corruption: Mapping[str, Metrics]
    """Means over the severities of a corruption."""
    mean: Metrics
    """Means of `by_corruption`; a bias of one corruption may cancel that of another."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values: clean, mean, and by corruption the mean and the severities."""
        return {
            "clean": _metrics_json(self.clean),
            "mean": _metrics_json(self.mean),
            "corruptions": {
                name: {
                    "mean": _metrics_json(metrics),
                    "severities": {
                        str(condition.severity): _metrics_json(each)
                        for condition, each in self.conditions.items()
                        if condition.corruption == name
                    },
                }
                for name, metrics in self.by_corruption.items()
            },
        }


@dataclass(frozen=True)
class YawBin:
    """The clean images whose head is turned by about as much."""

    name: str
    """Such as `10 to 20 degrees`, or `unknown`: no face was found."""
    n: int
    metrics: Metrics

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"name": self.name, "n": self.n, **_metrics_json(self.metrics)}


def measure(
    labels: Labels,
    clean: Predictions,
    corrupted: Mapping[Condition, Predictions],
    clusters: NDArray[Any],
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Robustness:
    """Measure all conditions on the same n images.

    Intervals are percentiles of a bootstrap that draws persons with replacement and takes all images of each. All
    conditions share the resamples, so a difference has an interval of its own, which is usually narrower.

    Args:
        labels: the truth.
        clean: predictions for the images as they are.
        corrupted: predictions for the same images in the same order.
        clusters: (n,) name or number of each image's person, or of the image where persons are unknown.
        seed: of the resampling.
        num_resamples: number of resamples.
    """
    columns = list(dict.fromkeys(term for pair in METRICS.values() for term in pair))
    units = units_of(np.unique(clusters, return_inverse=True)[1], len(labels), seed)
    summed = term_sums(units, labels, [clean, *corrupted.values()], columns)
    weights = resample_weights(units.num, num_resamples, seed)
    resampled = (weights @ summed.reshape(units.num, -1)).reshape(num_resamples, *summed.shape[1:])
    whole = summed.sum(axis=0)
    curves = {}
    for metric, (part, rows) in METRICS.items():
        k, n = columns.index(part), columns.index(rows)
        if whole[0, n]:
            with np.errstate(invalid="ignore", divide="ignore"):
                curves[metric] = _Curve(
                    whole[:, k] / whole[:, n],
                    resampled[:, :, k] / resampled[:, :, n],
                    has_interval=bool(np.count_nonzero(summed[:, 0, n]) >= MIN_UNITS),
                )
    places = {condition: place for place, condition in enumerate(corrupted, start=1)}
    names = list(dict.fromkeys(condition.corruption for condition in corrupted))
    of_corruption = {name: [place for each, place in places.items() if each.corruption == name] for name in names}
    return Robustness(
        n=len(labels),
        clean={metric: curve.clean() for metric, curve in curves.items()},
        conditions={
            condition: {metric: curve.mean([[place]]) for metric, curve in curves.items()}
            for condition, place in places.items()
        },
        by_corruption={
            name: {metric: curve.mean([group]) for metric, curve in curves.items()}
            for name, group in of_corruption.items()
        },
        mean={metric: curve.mean(list(of_corruption.values())) for metric, curve in curves.items()} if names else {},
    )


def measure_yaw(
    labels: Labels,
    predictions: Predictions,
    yaw_degrees: NDArray[np.floating],
    clusters: NDArray[Any],
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> list[YawBin]:
    """Measure the clean images by the yaw of their heads; bins without an image are left out.

    The bins hold different people, so a difference between two need not be due to the pose.

    Args:
        labels: the truth of n images.
        predictions: of the same images.
        yaw_degrees: (n,); NaN: unknown.
        clusters: as in `measure`.
        seed: as in `measure`.
        num_resamples: as in `measure`.
    """
    edges = YAW_EDGES_DEGREES
    numbers = np.searchsorted(edges[1:-1], np.abs(yaw_degrees), side="right")
    unknown = np.isnan(yaw_degrees)
    members = [
        (f"{low:g} to {high:g} degrees", (numbers == k) & ~unknown)
        for k, (low, high) in enumerate(itertools.pairwise(edges))
    ]
    bins = []
    for name, chosen in [*members, ("unknown", unknown)]:
        if chosen.any():
            part = {task: values[chosen] for task, values in predictions.items()}
            measured = measure(labels.take(chosen), part, {}, clusters[chosen], seed, num_resamples)
            bins.append(YawBin(name, measured.n, measured.clean))
    return bins


def stress_rows(robustness: Robustness, yaw: Sequence[YawBin], levels: Mapping[Condition, str]) -> list[dict[str, Any]]:
    """Return rows of schema.STRESS: the clean images, each condition, each bin of yaw.

    Args:
        robustness: of the conditions.
        yaw: of the clean images.
        levels: what each condition does, in words.
    """
    rows = [(CLEAN, 0, "", robustness.n, robustness.clean)]
    rows += [(*condition, levels[condition], robustness.n, each) for condition, each in robustness.conditions.items()]
    rows += [(YAW, number, each.name, each.n, each.metrics) for number, each in enumerate(yaw, start=1)]
    return [
        {"corruption": corruption, "severity": severity, "level": level, "n": n, **_columns(metrics)}
        for corruption, severity, level, n, metrics in rows
    ]


@dataclass(frozen=True)
class _Curve:
    """One metric under all conditions."""

    values: FloatArray
    """(conditions,); the first is clean."""
    samples: FloatArray
    """(resamples, conditions)."""
    has_interval: bool

    def clean(self) -> Measured:
        return Measured(float(self.values[0]), self._interval(self.samples[:, 0]))

    def mean(self, groups: Sequence[Sequence[int]]) -> Measured:
        """Average over the conditions of each group, and then over the groups."""
        value = float(np.mean([self.values[group].mean() for group in groups]))
        samples = np.mean([self.samples[:, group].mean(axis=1) for group in groups], axis=0)
        difference = self._interval(samples - self.samples[:, 0])
        return Measured(value, self._interval(samples), value - float(self.values[0]), difference)

    def _interval(self, samples: FloatArray) -> list[float] | None:
        finite = samples[np.isfinite(samples)]
        return np.percentile(finite, (2.5, 97.5)).tolist() if self.has_interval and len(finite) else None


def _columns(metrics: Metrics) -> dict[str, float | None]:
    columns: dict[str, float | None] = dict.fromkeys(METRICS)
    for name, each in metrics.items():
        columns |= {name: each.value, f"{name}_difference": each.difference}
        columns |= dict(zip((f"{name}_low", f"{name}_high"), each.interval or (None, None), strict=True))
        ends = (f"{name}_difference_low", f"{name}_difference_high")
        columns |= dict(zip(ends, each.difference_interval or (None, None), strict=True))
    return columns


def _metrics_json(metrics: Metrics) -> dict[str, Any]:
    return {
        name: {
            "value": each.value,
            "interval": each.interval,
            "difference": each.difference,
            "difference_interval": each.difference_interval,
        }
        for name, each in metrics.items()
    }

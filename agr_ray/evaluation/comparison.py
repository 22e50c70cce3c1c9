"""Compare networks on the same images: intervals over images and seeds, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from agr_ray.evaluation.bootstrap import MIN_UNITS, NUM_RESAMPLES, resampled_sums, sums_by_person
from agr_ray.evaluation.terms import FloatArray, row_terms
from agr_ray.labels import Labels
from agr_ray.models.predictions import Predictions

METRICS: Final[Mapping[str, tuple[str, str]]] = {  # the names are schema.COMPARED_METRICS
    "age_mae_years": ("age_absolute", "age"),
    "age_within_5": ("age_within", "age"),
    "age_one_off": ("age_one_off", "age_grouped"),
    "gender_accuracy": ("gender_right", "gender"),
    "race_accuracy": ("race_right", "race"),
}
"""Each metric's terms of `terms.row_terms`: its sum, and the number of its rows."""
_UPPER: Final = 0.975
"""Quantile at the upper end of a 95 % interval."""


@dataclass(frozen=True)
class Estimate:
    """A metric of a network, averaged over its runs."""

    value: float
    interval: tuple[float, float]
    """95 %, from the lower to the upper end."""
    difference: float | None
    """From the reference; None: it is the reference, or the reference has no such metric."""
    difference_interval: tuple[float, float] | None
    """95 %, of the difference on the same images."""
    includes_seeds: bool
    """Whether intervals hold the variance between seeds."""

    @property
    def differs(self) -> bool:
        """Return whether the interval of the difference excludes 0."""
        return self.difference_interval is not None and not (
            self.difference_interval[0] <= 0.0 <= self.difference_interval[1]
        )


@dataclass(frozen=True)
class _Spread:
    """The variance between runs of one network that differ only in their seed, pooled over all networks."""

    variance: float
    degrees_of_freedom: int
    """Number of runs minus number of networks, of networks with two runs or more; 0: there is no such network."""

    def half_width(self, samples: FloatArray, num_persons: int, num_runs: Sequence[int]) -> float:
        """Return half the width of the 95 % interval of a network's mean, or of the difference of two means.

        The degrees of freedom are those of Welch and Satterthwaite.

        Args:
            samples: (resamples,) means, or differences, of resampled persons.
            num_persons: number of persons.
            num_runs: of the network, or of both.
        """
        # A bootstrap of n persons understates the variance by the factor (n - 1) / n.
        parts = [(float(np.nanvar(samples)) * num_persons / (num_persons - 1), num_persons - 1)]
        if self.degrees_of_freedom:
            parts.append((self.variance * sum(1.0 / num for num in num_runs), self.degrees_of_freedom))
        total = sum(variance for variance, _ in parts)
        if not total:
            return 0.0
        freedom = total**2 / sum(variance**2 / each for variance, each in parts)
        return float(stats.t.ppf(_UPPER, freedom)) * math.sqrt(total)


def compare(
    runs: Mapping[str, Sequence[Predictions]],
    labels: Labels,
    clusters: NDArray[Any],
    reference: str,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, dict[str, Estimate]]:
    """Return the estimates of each network, by metric.

    A metric is left out if a network does not have it, or if fewer than two persons have its label.

    Intervals hold two variances. The one over persons comes from a bootstrap: each resample draws persons with
    replacement and takes all images of each, the same for all networks. The one over seeds is that between the runs of
    a network, less what the choice of images adds to it, pooled over all networks with several runs, and used for the
    networks with one run, too. This assumes that all networks vary alike. The quantile is Student's t. If no network
    that has the metric has several runs, its intervals hold the variance over persons only.

    Args:
        runs: predictions of each network's runs for the same n images, in the same order.
        labels: of the images.
        clusters: (n,) name or number of each image's person, or of the image where persons are unknown.
        reference: network from which differences are taken; if it is missing, there are none.
        seed: of the resampling.
        num_resamples: number of resamples.
    """
    columns = list(dict.fromkeys(term for pair in METRICS.values() for term in pair))
    names = [(name, number) for name, each in runs.items() for number in range(len(each))]
    terms = [row_terms(labels, runs[name][number]) for name, number in names]
    values = np.stack([np.stack([each[column] for column in columns], axis=1) for each in terms], axis=1)
    summed = sums_by_person(values, clusters)
    rng = np.random.default_rng(seed)
    shape = (num_resamples, *values.shape[1:])
    resampled = resampled_sums(summed.reshape(len(summed), -1), num_resamples, rng).reshape(shape)
    whole = values.sum(axis=0)
    estimates: dict[str, dict[str, Estimate]] = {name: {} for name in runs}
    for metric, (part, rows) in METRICS.items():
        k, n = columns.index(part), columns.index(rows)
        num_persons = np.count_nonzero(summed[:, :, n], axis=0)
        of_runs = {name: [names.index((name, number)) for number in range(len(each))] for name, each in runs.items()}
        of_runs = {name: each for name, each in of_runs.items() if num_persons[each].min() >= MIN_UNITS}
        with np.errstate(invalid="ignore", divide="ignore"):
            of_run = whole[:, k] / whole[:, n]
            resampled_of_run = resampled[:, :, k] / resampled[:, :, n]
        samples = {name: resampled_of_run[:, each].mean(axis=1) for name, each in of_runs.items()}
        spread = _spread([(of_run[each], resampled_of_run[:, each]) for each in of_runs.values()])
        highest = math.inf if metric == "age_mae_years" else 1.0
        for name, each in of_runs.items():
            value, persons_with_label = float(of_run[each].mean()), int(num_persons[each].min())
            half = spread.half_width(samples[name], persons_with_label, [len(each)])
            difference = difference_interval = None
            if reference in of_runs and name != reference:
                difference = value - float(of_run[of_runs[reference]].mean())
                apart, num_runs = samples[name] - samples[reference], [len(each), len(of_runs[reference])]
                wide = spread.half_width(apart, persons_with_label, num_runs)
                difference_interval = difference - wide, difference + wide
            interval = max(value - half, 0.0), min(value + half, highest)
            estimates[name][metric] = Estimate(
                value, interval, difference, difference_interval, spread.degrees_of_freedom > 0
            )
    return estimates


def _spread(of_networks: Sequence[tuple[FloatArray, FloatArray]]) -> _Spread:
    """Pool the variance of each network's runs around their mean.

    Runs also differ because each errs on other images, which the bootstrap of their mean already counts: this part is
    subtracted.

    Args:
        of_networks: for each, the metric of its m runs, (m,), and on resampled persons, (resamples, m).
    """
    several = [each for each in of_networks if len(each[0]) > 1]
    freedom = sum(len(values) - 1 for values, _ in several)
    if not freedom:
        return _Spread(0.0, 0)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values, _ in several)
    by_images = sum(
        float(np.nanvar(resampled - resampled.mean(axis=1, keepdims=True), axis=0).sum()) for _, resampled in several
    )
    return _Spread(max(squares - by_images, 0.0) / freedom, freedom)

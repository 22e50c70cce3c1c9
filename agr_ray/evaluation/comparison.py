"""Compare networks on the same images: intervals over images and seeds, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import stats

from agr_ray.evaluation.bootstrap import MIN_UNITS, NUM_RESAMPLES, resampled_sums
from agr_ray.evaluation.terms import FloatArray, row_terms
from agr_ray.labels import IntArray, Labels
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

    @property
    def differs(self) -> bool:
        """Return whether the interval of the difference excludes 0."""
        return self.difference_interval is not None and not (
            self.difference_interval[0] <= 0.0 <= self.difference_interval[1]
        )


@dataclass(frozen=True)
class _Spread:
    """The variance between the runs of one network that differ only in their seed, pooled over all networks."""

    variance: float
    degrees_of_freedom: int
    """Number of runs minus number of networks, of networks with two runs or more; 0: there is no such network."""

    def half_width(self, image_variance: float, num_runs: Sequence[int]) -> float:
        """Return half the width of the 95 % interval of a network's mean, or of the difference of two means.

        Args:
            image_variance: variance of the mean (the difference) over resampled images.
            num_runs: of the network, or of both.
        """
        if not self.degrees_of_freedom:
            return float(stats.norm.ppf(_UPPER)) * math.sqrt(image_variance)
        seed_variance = self.variance * sum(1.0 / num for num in num_runs)
        total = image_variance + seed_variance
        if not total:
            return 0.0
        # Welch and Satterthwaite. The image variance comes from many resamples, so its degrees of freedom are not
        # counted.
        share = max(seed_variance / total, 1e-6)
        return float(stats.t.ppf(_UPPER, self.degrees_of_freedom / share**2)) * math.sqrt(total)


def compare(
    runs: Mapping[str, Sequence[Predictions]],
    labels: Labels,
    clusters: IntArray,
    reference: str,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, dict[str, Estimate]]:
    """Return the estimates of each network, by metric.

    A metric is left out if a network does not have it, or if fewer than two persons have its label.

    Intervals hold two variances. The one over images comes from a bootstrap: each resample draws persons with
    replacement and takes all images of each, the same for all networks. The one over seeds is that between the runs of
    a network, pooled over all networks with several runs, and used for the networks with one run, too. This assumes
    that all networks vary alike. The quantile is Student's t with Satterthwaite's degrees of freedom. If no network has
    several runs, intervals hold the variance over images only.

    Args:
        runs: predictions of each network's runs for the same n images, in the same order.
        labels: of the images.
        clusters: (n,) number of each image's person, or of the image where persons are unknown.
        reference: network from which differences are taken; if it is missing, there are none.
        seed: of the resampling.
        num_resamples: number of resamples.
    """
    columns = list(dict.fromkeys(term for pair in METRICS.values() for term in pair))
    names = [(name, number) for name, each in runs.items() for number in range(len(each))]
    terms = [row_terms(labels, runs[name][number]) for name, number in names]
    values = np.stack([np.stack([each[column] for column in columns], axis=1) for each in terms], axis=1)
    persons = np.unique(clusters, return_inverse=True)[1]
    summed = np.zeros((int(persons.max(initial=-1)) + 1, *values.shape[1:]))
    np.add.at(summed, persons, values)
    rng = np.random.default_rng(seed)
    shape = (num_resamples, *values.shape[1:])
    resampled = resampled_sums(summed.reshape(len(summed), -1), num_resamples, rng).reshape(shape)
    whole = values.sum(axis=0)
    estimates: dict[str, dict[str, Estimate]] = {name: {} for name in runs}
    for metric, (part, rows) in METRICS.items():
        k, n = columns.index(part), columns.index(rows)
        num_persons = np.count_nonzero(summed[:, :, n], axis=0)
        of_runs = {
            name: [names.index((name, number)) for number in range(len(each))]
            for name, each in runs.items()
            if all(num_persons[names.index((name, number))] >= MIN_UNITS for number in range(len(each)))
        }
        with np.errstate(invalid="ignore", divide="ignore"):
            of_run = whole[:, k] / whole[:, n]
            samples = {
                name: (resampled[:, each, k] / resampled[:, each, n]).mean(axis=1) for name, each in of_runs.items()
            }
        spread = _spread([of_run[each] for each in of_runs.values()])
        lowest, highest = (0.0, math.inf) if metric == "age_mae_years" else (0.0, 1.0)
        for name, each in of_runs.items():
            value = float(of_run[each].mean())
            half = spread.half_width(float(np.nanvar(samples[name])), [len(each)])
            difference = difference_interval = None
            if reference in of_runs and name != reference:
                difference = value - float(of_run[of_runs[reference]].mean())
                variance = float(np.nanvar(samples[name] - samples[reference]))
                wide = spread.half_width(variance, [len(each), len(of_runs[reference])])
                difference_interval = difference - wide, difference + wide
            interval = max(value - half, lowest), min(value + half, highest)
            estimates[name][metric] = Estimate(value, interval, difference, difference_interval)
    return estimates


def _spread(of_runs: Sequence[FloatArray]) -> _Spread:
    """Return the pooled variance of each network's runs around their mean."""
    several = [each for each in of_runs if len(each) > 1]
    freedom = sum(len(each) - 1 for each in several)
    squares = sum(float(((each - each.mean()) ** 2).sum()) for each in several)
    return _Spread(squares / freedom if freedom else 0.0, freedom)

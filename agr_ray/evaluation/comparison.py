"""Compare networks on the same images: intervals over images and seeds, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from agr_ray.evaluation.cells import BREAKDOWNS, Cells
from agr_ray.evaluation.disparities import MIN_ROWS
from agr_ray.evaluation.estimates import MIN_UNITS
from agr_ray.evaluation.figures import slices
from agr_ray.evaluation.terms import FloatArray, row_terms
from agr_ray.evaluation.units import Units, term_sums, unit_sums, units_of
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
NUM_RESAMPLES: Final = 1000
_ERROR: Final = 0.05
"""Share of intervals that may miss the truth: they are 95 % intervals."""
_TERMS: Final = tuple(dict.fromkeys(term for pair in METRICS.values() for term in pair))


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
    adjusted_interval: tuple[float, float] | None
    """Of the difference, so wide that with a probability of 95 % all of the comparisons' intervals hold the truth."""
    includes_seeds: bool
    """Whether intervals hold the variance between seeds."""

    @property
    def differs(self) -> bool:
        """Return whether the adjusted interval of the difference excludes 0."""
        return self.adjusted_interval is not None and not (
            self.adjusted_interval[0] <= 0.0 <= self.adjusted_interval[1]
        )


@dataclass(frozen=True)
class _Spread:
    """The variance between runs of one network that differ only in their seed, pooled over all networks."""

    variance: float
    degrees_of_freedom: int
    """Number of runs minus number of networks, of networks with two runs or more; 0: there is no such network."""

    def half_width(
        self, samples: FloatArray, num_persons: int, num_runs: Sequence[int], error: float = _ERROR
    ) -> float:
        """Return half the width of the interval of a network's mean, or of the difference of two means.

        The degrees of freedom are those of Welch and Satterthwaite.

        Args:
            samples: (resamples,) means, or differences, of resampled persons.
            num_persons: number of persons.
            num_runs: of the network, or of both.
            error: share of such intervals that may miss the truth.
        """
        # A bootstrap of n persons understates the variance by the factor (n - 1) / n.
        parts = [(float(np.nanvar(samples)) * num_persons / (num_persons - 1), num_persons - 1)]
        if self.degrees_of_freedom:
            parts.append((self.variance * sum(1.0 / num for num in num_runs), self.degrees_of_freedom))
        total = sum(variance for variance, _ in parts)
        if not total:
            return 0.0
        freedom = total**2 / sum(variance**2 / each for variance, each in parts)
        return float(stdtrit(freedom, 1.0 - error / 2.0)) * math.sqrt(total)


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

    The adjusted intervals make up for the number of differences from the reference (Bonferroni). So if all networks are
    equally good, one of them differs from the reference in 5 % of comparisons at most, in each metric.

    Args:
        runs: predictions of each network's runs for the same n images, in the same order.
        labels: of the images.
        clusters: (n,) name or number of each image's person, or of the image where persons are unknown.
        reference: network from which differences are taken; if it is missing, there are none.
        seed: of the resampling.
        num_resamples: number of resamples.
    """
    units = units_of(np.unique(clusters, return_inverse=True)[1], len(labels), seed)
    sums = term_sums(units, labels, [each for of_network in runs.values() for each in of_network], _TERMS)
    weights = resample_weights(units.num, num_resamples, seed)
    num_runs = {name: len(each) for name, each in runs.items()}
    return _estimates(sums, weights, num_runs, reference, max(len(runs) - 1, 1))


@dataclass(frozen=True)
class Paired:
    """The comparison of two networks on the same images."""

    overall: Mapping[str, Estimate]
    """The second network, relative to the first, by metric."""
    first: Mapping[str, float]
    """The first network, by metric."""
    groups: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    """As `overall`, by breakdown and group; only groups of `MIN_ROWS` images or more."""
    group_firsts: Mapping[str, Mapping[str, Mapping[str, float]]]
    """As `first`."""
    num_rows: Mapping[str, Mapping[str, int]]
    """Images of each group that has any."""
    num_units: int
    """Persons, or random groups of persons."""
    num_comparisons: int
    """Differences within groups, for which their adjusted intervals make up. Overall, there is one for each metric."""


def compare_pair(
    first: Predictions,
    second: Predictions,
    labels: Labels,
    persons: NDArray[Any] | None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Paired:
    """Compare two networks on the same images, overall and by group, as `compare` does.

    One bootstrap serves all groups. The adjusted intervals make up for the number of metrics overall, and for the
    number of groups and metrics among the groups (Bonferroni), so networks that are equally good differ anywhere in 5 %
    of comparisons overall, and in 5 % among the groups.

    Args:
        first: predictions for n images.
        second: of the other network, for the same images.
        labels: of the images.
        persons: (n,) a number for each image's person; None: images are independent.
        seed: of the resampling.
        num_resamples: number of resamples.
    """
    cells, num_runs = Cells(labels.space), {"first": 1, "second": 1}
    units = units_of(persons, len(labels), seed)
    rows = np.zeros((units.num, cells.num))
    by_cell = [{term: np.zeros((units.num, cells.num)) for term in _TERMS} for _ in num_runs]
    for part in slices(len(labels)):
        own, own_units = labels.take(part), Units(units.codes[part], units.num, units.of)
        codes = cells.codes(own)
        rows += unit_sums(own_units, codes, cells.num)
        for of_network, each in zip(by_cell, (first, second), strict=True):
            terms = row_terms(own, {task: values[part] for task, values in each.items()})
            for term, summed in of_network.items():
                summed += unit_sums(own_units, codes, cells.num, terms[term])
    weights = resample_weights(units.num, num_resamples, seed)

    def sums_of(breakdown: str) -> FloatArray:
        """Return the sums of the terms, (groups, units, networks, terms)."""
        parts = [[cells.group_sums(of[term], breakdown) for term in _TERMS] for of in by_cell]
        return np.asarray(parts).transpose(3, 2, 0, 1)

    names = {breakdown: [group.name for group in cells.groups[breakdown]] for breakdown in BREAKDOWNS}
    num_rows = {
        breakdown: cells.group_sums(rows, breakdown).sum(axis=0).astype(int).tolist() for breakdown in BREAKDOWNS
    }
    num_units = {
        breakdown: np.count_nonzero(cells.group_sums(rows, breakdown), axis=0).tolist() for breakdown in BREAKDOWNS
    }
    large = {
        breakdown: [place for place, num in enumerate(num_units[breakdown]) if num >= MIN_ROWS]
        for breakdown in BREAKDOWNS
    }
    num_comparisons = max(len(METRICS) * sum(map(len, large.values())), 1)
    overall = _estimates(sums_of("all")[0], weights, num_runs, "first", len(METRICS))
    groups: dict[str, dict[str, Any]] = {}
    for breakdown, places in large.items():
        sums = sums_of(breakdown)
        groups[breakdown] = {
            names[breakdown][place]: _estimates(sums[place], weights, num_runs, "first", num_comparisons)
            for place in places
        }
    return Paired(
        overall["second"],
        _values(overall["first"]),
        {breakdown: {name: each["second"] for name, each in members.items()} for breakdown, members in groups.items()},
        {
            breakdown: {name: _values(each["first"]) for name, each in members.items()}
            for breakdown, members in groups.items()
        },
        {
            breakdown: {name: num for name, num in zip(names[breakdown], num_rows[breakdown], strict=True) if num}
            for breakdown in BREAKDOWNS
        },
        int(np.count_nonzero(rows.sum(axis=1))),
        num_comparisons,
    )


def _values(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    return {metric: estimate.value for metric, estimate in estimates.items()}


def resample_weights(num_units: int, num_resamples: int, seed: int) -> FloatArray:
    """Return how often each unit is drawn, (resamples, units), if as many as there are are drawn with replacement."""
    rng = np.random.default_rng(seed)
    even = np.full(num_units, 1.0 / max(num_units, 1))
    return rng.multinomial(num_units, even, size=num_resamples).astype(np.float64)


def _estimates(
    sums: FloatArray, weights: FloatArray, num_runs: Mapping[str, int], reference: str, num_comparisons: int
) -> dict[str, dict[str, Estimate]]:
    """Return the estimates of each network, by metric; see `compare`.

    Args:
        sums: (units, runs, terms) sums of `_TERMS`, the runs of all networks one after another.
        weights: (resamples, units) as `resample_weights`.
        num_runs: number of runs of each network.
        reference: as in `compare`.
        num_comparisons: for which the adjusted intervals make up.
    """
    resampled = (weights @ sums.reshape(len(sums), -1)).reshape(len(weights), *sums.shape[1:])
    whole = sums.sum(axis=0)
    ends = np.cumsum(list(num_runs.values()))
    places = {name: list(range(end - num_runs[name], end)) for name, end in zip(num_runs, ends.tolist(), strict=True)}
    estimates: dict[str, dict[str, Estimate]] = {name: {} for name in num_runs}
    for metric, (part, rows) in METRICS.items():
        k, n = _TERMS.index(part), _TERMS.index(rows)
        num_persons = np.count_nonzero(sums[:, :, n], axis=0)
        of_runs = {name: each for name, each in places.items() if num_persons[each].min() >= MIN_UNITS}
        with np.errstate(invalid="ignore", divide="ignore"):
            of_run = whole[:, k] / whole[:, n]
            resampled_of_run = resampled[:, :, k] / resampled[:, :, n]
        samples = {name: resampled_of_run[:, each].mean(axis=1) for name, each in of_runs.items()}
        spread = _spread([(of_run[each], resampled_of_run[:, each]) for each in of_runs.values()])
        highest = math.inf if metric == "age_mae_years" else 1.0
        for name, each in of_runs.items():
            value, persons_with_label = float(of_run[each].mean()), int(num_persons[each].min())
            half = spread.half_width(samples[name], persons_with_label, [len(each)])
            difference = difference_interval = adjusted_interval = None
            if reference in of_runs and name != reference:
                difference = value - float(of_run[of_runs[reference]].mean())
                apart, both = samples[name] - samples[reference], [len(each), len(of_runs[reference])]
                wide = spread.half_width(apart, persons_with_label, both)
                difference_interval = difference - wide, difference + wide
                wide = spread.half_width(apart, persons_with_label, both, _ERROR / num_comparisons)
                adjusted_interval = difference - wide, difference + wide
            estimates[name][metric] = Estimate(
                value=value,
                interval=(max(value - half, 0.0), min(value + half, highest)),
                difference=difference,
                difference_interval=difference_interval,
                adjusted_interval=adjusted_interval,
                includes_seeds=spread.degrees_of_freedom > 0,
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

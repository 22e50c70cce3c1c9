"""Compare networks on the same images: intervals over images and seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from agr_ray.evaluation.bootstrap import NUM_RESAMPLES, percentiles, resampled_sums
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


@dataclass(frozen=True)
class Estimate:
    """A metric of a network, averaged over its runs."""

    value: float
    interval: tuple[float, float]
    """95 %, over images (or persons) and seeds. With one run, over images only."""
    difference: float | None
    """From the reference; None: it is the reference, or the reference has no such metric."""
    difference_interval: tuple[float, float] | None
    """95 %, of the difference on the same resampled images."""

    @property
    def differs(self) -> bool:
        """Return whether the interval of the difference leaves out 0."""
        return self.difference_interval is not None and not (
            self.difference_interval[0] <= 0.0 <= self.difference_interval[1]
        )


def compare(
    runs: Mapping[str, Sequence[Predictions]],
    labels: Labels,
    clusters: IntArray,
    reference: str,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, dict[str, Estimate]]:
    """Return the estimates of each network, by metric; a metric that a network does not have is left out.

    Each resample draws persons with replacement and takes all images of each. All networks use the same draw. For each
    network, a resample also draws its runs with replacement, as many as it has.

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
        means: dict[str, tuple[float, FloatArray]] = {}
        for name, each in runs.items():
            of_runs = [names.index((name, number)) for number in range(len(each))]
            if not whole[of_runs, n].all():
                continue
            drawn = rng.choice(of_runs, size=(num_resamples, len(of_runs)))
            with np.errstate(invalid="ignore", divide="ignore"):
                shares = resampled[:, :, k] / resampled[:, :, n]
            centre = shares[:, of_runs].mean(axis=1)
            deviation = np.take_along_axis(shares, drawn, axis=1).mean(axis=1) - centre
            # Resampling m runs understates their variance by the factor (m - 1) / m.
            samples = centre + deviation * np.sqrt(len(of_runs) / max(len(of_runs) - 1, 1))
            means[name] = float((whole[of_runs, k] / whole[of_runs, n]).mean()), samples
        for name, (value, samples) in means.items():
            interval = percentiles(samples)
            if interval is None:
                continue
            difference = difference_interval = None
            if reference in means and name != reference:
                difference = value - means[reference][0]
                difference_interval = percentiles(samples - means[reference][1])
            estimates[name][metric] = Estimate(
                value,
                (interval[0], interval[1]),
                difference,
                None if difference_interval is None else (difference_interval[0], difference_interval[1]),
            )
    return estimates

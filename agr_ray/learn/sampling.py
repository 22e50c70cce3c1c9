"""Training rows drawn so that ages, genders, races or their cells come as often as each other.

labels of all training rows -> Sampler.fit -> weights of any rows, on any rank -> draw
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from agr_ray.learn.metrics import FloatArray, IntArray, Labels, age_group
from agr_ray.schema import AGE_GROUPS, GENDERS, RACES

Balance: TypeAlias = Literal["none", "age", "gender", "race", "cells"]

_SHAPE = (len(AGE_GROUPS) + 1, len(GENDERS) + 1, len(RACES) + 1)
"""Cells of age group, gender and race; the last index of each is for a missing label."""


@dataclass(frozen=True)
class Sampler:
    """How often rows are drawn, relative to each other, by their labels.

    A row's weight is (rows that have its label) ** -power. Rows that lack the label keep the share that they have
    without a sampler: they can't be evened out, and drawing them more often would only cost labelled rows their place.
    For `cells`, the same holds for each pattern of known labels: rows with age and gender but no race are evened out
    among each other, and are together as frequent as before.

    Weights come from the counts over all ranks, so that a label that is rare everywhere weighs the same on each; a
    rank draws from its own share as many rows as it has.
    """

    by: Balance
    table: FloatArray
    """(age groups + 1, genders + 1, races + 1) weight of a row of each cell; 0 where training has none."""

    @classmethod
    def fit(cls, labels: Labels, by: Balance, power: float) -> Self | None:
        """Count the labels.

        Args:
            labels: of all training rows, on all ranks.
            by: what is evened out: age by the paper's age groups; None is returned for `none`.
            power: 1 evens out wholly, 0 leaves the frequencies as they are, 0.5 is half-way, on a logarithmic scale.
        """
        if by == "none":
            return None
        cells = _cells(labels, by)
        counts = np.bincount(np.ravel_multi_index(cells, _SHAPE), minlength=int(np.prod(_SHAPE))).reshape(_SHAPE)
        weights = np.where(counts, np.maximum(counts, 1) ** -float(power), 0.0)
        known = np.stack(np.meshgrid(*(np.arange(size) < size - 1 for size in _SHAPE), indexing="ij"))
        for pattern in np.unique(known.reshape(3, -1), axis=1).T:
            alike = (known == pattern[:, None, None, None]).all(axis=0)
            if counts[alike].any():  # a mean weight of 1 keeps the pattern's share
                weights[alike] *= counts[alike].sum() / (counts[alike] * weights[alike]).sum()
        return cls(by, weights)

    def weights(self, labels: Labels) -> FloatArray:
        """Return the weights of some of the rows, (n,); their mean over all training rows is 1."""
        weights: FloatArray = self.table[_cells(labels, self.by)]
        return weights

    def draw(self, labels: Labels, rng: np.random.Generator) -> IntArray:
        """Draw as many rows as there are, with replacement, (n,) indices."""
        weights = self.weights(labels)
        num_rows = len(weights)
        if not num_rows:
            return np.arange(0)
        drawn: IntArray = rng.choice(num_rows, size=num_rows, p=weights / weights.sum())
        return drawn


def _cells(labels: Labels, by: Balance) -> tuple[NDArray[np.int64], ...]:
    """Return each row's indices in a table of `_SHAPE`; what is not evened out is as good as known and the same."""
    known = np.isfinite(labels.age)
    groups = np.where(known, age_group(np.where(known, labels.age, 0.0)), -1)
    named = {"age": groups, "gender": labels.gender, "race": labels.race}
    return tuple(
        np.where(codes >= 0, codes, size - 1) if by in (name, "cells") else np.zeros_like(groups)
        for (name, codes), size in zip(named.items(), _SHAPE, strict=True)
    )

"""Draw training rows so that age groups, genders, races or their cells are equally frequent, and sets as configured.

labels and sets of all training rows -> Sampler.fit -> weights of any rows, on any rank -> draw
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import numpy as np

from agr_ray.evaluation.terms import FloatArray
from agr_ray.labels import IntArray, Labels, LabelSpace

Balance: TypeAlias = Literal["none", "age", "gender", "race", "cells"]


@dataclass(frozen=True)
class Sampler:
    """Relative sampling weights of rows, by their labels and by their prepared set.

    A row's weight is (number of rows with its label) ** -power. Rows without the label keep the share that they have
    without a sampler: they can't be balanced, and drawing them more often would only displace labelled rows. For
    `cells`, the same holds for each pattern of known labels: rows with age and gender but no race are balanced among
    each other, and together are as frequent as before.

    If sets have shares, labels are balanced within each set, and then all weights of a set are scaled to its share.
    Otherwise scaling would unbalance the labels again, and a set with most rows of a label would give that label away
    by its cameras and crops. Without shares, all sets are balanced as one.

    Weights are computed from the counts over all ranks, so a label has the same weight on each. Each rank draws from
    its own rows, as many as it has. So sets have their shares only if each rank holds rows of all sets in proportion.
    """

    space: LabelSpace
    by: Balance
    table: FloatArray
    """(sets or 1, age groups + 1, genders + 1, races + 1) weight of a row of each cell; 0 if training has no such row.

    The first axis has length 1 if sets have no shares: a row's weight then does not depend on its set.
    """

    @classmethod
    def fit(
        cls,
        labels: Labels,
        by: Balance,
        power: float,
        set_index: IntArray | None = None,
        shares: Sequence[float] = (),
    ) -> Self | None:
        """Compute the weights from the labels; return None if nothing is balanced and there are no shares.

        Args:
            labels: of all n training rows of all ranks.
            by: attribute to balance; age is balanced by the label space's age groups.
            power: 1 balances fully, 0 keeps the frequencies, 0.5 is half-way on a logarithmic scale.
            set_index: (n,) number of each row's set; only needed with shares.
            shares: relative frequency of each set, above 0; each set must have a row. Empty: treat all sets as one.
        """
        if by == "none" and not shares:
            return None
        if not shares:
            set_index, shares = np.zeros(len(labels), np.int64), (1.0,)
        assert set_index is not None
        cells = _cells(labels, by)
        num_rows = np.bincount(set_index, minlength=len(shares))
        factors = np.asarray(shares) / sum(shares) * len(set_index) / num_rows
        shape = tuple(len(names) + 1 for names in _classes(labels))
        tables = [_table(tuple(each[set_index == k] for each in cells), shape, power) for k in range(len(shares))]
        return cls(labels.space, by, np.stack([factor * table for factor, table in zip(factors, tables, strict=True)]))

    def weights(self, labels: Labels, set_index: IntArray | None = None) -> FloatArray:
        """Return the weights of some of the rows, (n,); their mean over all training rows is 1.

        `set_index`, (n,) int64, is the number of each row's set; only needed if sets have shares.
        """
        cells = _cells(labels, self.by)
        if len(self.table) == 1:
            set_index = np.zeros(len(labels), np.int64)
        assert set_index is not None
        weights: FloatArray = self.table[set_index, *cells]
        return weights

    def draw(self, labels: Labels, rng: np.random.Generator, set_index: IntArray | None = None) -> IntArray:
        """Draw as many rows as there are, with replacement, (n,) indices; `set_index` as in `weights`."""
        weights = self.weights(labels, set_index)
        num_rows = len(weights)
        if not num_rows:
            return np.arange(0)
        drawn: IntArray = rng.choice(num_rows, size=num_rows, p=weights / weights.sum())
        return drawn


def _classes(labels: Labels) -> tuple[tuple[str, ...], ...]:
    return labels.space.age_groups, labels.space.genders, labels.space.races


def _table(cells: tuple[IntArray, ...], shape: tuple[int, ...], power: float) -> FloatArray:
    """Return the weights of the cells, whose mean over these rows is 1; `shape` is that of one set's table."""
    counts = np.bincount(np.ravel_multi_index(cells, shape), minlength=int(np.prod(shape))).reshape(shape)
    weights = np.where(counts, np.maximum(counts, 1) ** -float(power), 0.0)
    known = np.stack(np.meshgrid(*(np.arange(size) < size - 1 for size in shape), indexing="ij"))
    for pattern in np.unique(known.reshape(3, -1), axis=1).T:
        alike = (known == pattern[:, None, None, None]).all(axis=0)
        if counts[alike].any():  # a mean weight of 1 keeps the pattern's share
            weights[alike] *= counts[alike].sum() / (counts[alike] * weights[alike]).sum()
    return weights


def _cells(labels: Labels, by: Balance) -> tuple[IntArray, ...]:
    """Return each row's indices in a table; the last of each axis is a missing label.

    An attribute that is not balanced counts as known and equal in all rows.
    """
    codes = {"age": labels.age_group, "gender": labels.gender, "race": labels.race}
    return tuple(
        np.where(of >= 0, of, len(names)) if by in (name, "cells") else np.zeros_like(of)
        for (name, of), names in zip(codes.items(), _classes(labels), strict=True)
    )

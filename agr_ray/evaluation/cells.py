"""Cells: the combinations of true gender, race and age group, from which every group is a sum."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.terms import FloatArray
from agr_ray.labels import IntArray, Labels, LabelSpace

BREAKDOWNS: Final[Mapping[str, tuple[str, ...]]] = {
    "gender": ("gender",),
    "race": ("race",),
    "age_group": ("age_group",),
    "gender_race": ("gender", "race"),
    "gender_age_group": ("gender", "age_group"),
    "race_age_group": ("race", "age_group"),
}
"""The attributes whose classes make each breakdown's groups."""


class Group(NamedTuple):
    """A group of true labels."""

    breakdown: str
    """A key of `BREAKDOWNS`."""
    name: str
    """Its class, or its classes with a slash: `female/asian`."""


class Cells:
    """The cells of a label space. In each attribute, the first position stands for a missing label.

    A range of ages that spans several age groups counts as a missing age group.
    """

    def __init__(self, space: LabelSpace) -> None:
        self.classes: Mapping[str, tuple[str, ...]] = {
            "gender": space.genders,
            "race": space.races,
            "age_group": space.age_groups,
        }
        """Classes of each attribute, none without races."""
        self.shape = tuple(1 + len(names) for names in self.classes.values())
        self.num = int(np.prod(self.shape))
        """Number of cells."""

    def codes(self, labels: Labels) -> IntArray:
        """Return the cell of each row, (n,)."""
        of_attributes = (labels.gender, labels.race, labels.age_group)
        return np.asarray(np.ravel_multi_index([codes + 1 for codes in of_attributes], self.shape), np.int64)

    @cached_property
    def of_attribute(self) -> Mapping[str, IntArray]:
        """Return the class of each cell by attribute, (cells,) each; -1: the label is missing."""
        positions = np.unravel_index(np.arange(self.num), self.shape)
        return {name: each.astype(np.int64) - 1 for name, each in zip(self.classes, positions, strict=True)}

    @cached_property
    def groups(self) -> Mapping[str, list[Group]]:
        """Return the groups of each breakdown, in the order of their codes; without races, some have none."""
        return {
            breakdown: [
                Group(breakdown, "/".join(names))
                for names in itertools.product(*(self.classes[attribute] for attribute in attributes))
            ]
            for breakdown, attributes in BREAKDOWNS.items()
        }

    def group_codes(self, breakdown: str) -> IntArray:
        """Return the group of each cell, (cells,), as its place in `groups`; -1: none, because a label is missing.

        For the breakdown `all`, all are 0.
        """
        attributes = BREAKDOWNS.get(breakdown, ())
        codes = np.zeros(self.num, np.int64)
        known = np.ones(self.num, bool)
        for attribute in attributes:
            own = self.of_attribute[attribute]
            codes = codes * len(self.classes[attribute]) + own
            known &= own >= 0
        return np.where(known, codes, -1)

    def group_sums(self, values: NDArray[Any], breakdown: str, by: str | None = None) -> FloatArray:
        """Return the sums of the cells of each group, (m, groups), of m rows of values, (m, cells).

        Args:
            values: (m, cells).
            breakdown: a key of `BREAKDOWNS`, or `all` for one group of all cells.
            by: attribute that is not in the breakdown, by whose classes each group is divided, too: the result is
                (m, groups, classes), and cells without this label are left out.
        """
        names = list(self.classes)
        kept = [names.index(name) for name in BREAKDOWNS.get(breakdown, ())]
        divided = [] if by is None else [names.index(by)]
        grid = values.reshape(len(values), *self.shape)
        labelled = tuple(slice(1, None) if axis in kept + divided else slice(None) for axis in range(len(names)))
        others = tuple(1 + axis for axis in range(len(names)) if axis not in kept + divided)
        summed = grid[(slice(None), *labelled)].sum(axis=others)
        order = sorted(kept + divided)
        summed = summed.transpose(0, *(1 + order.index(axis) for axis in kept + divided))
        num_groups = len(self.groups[breakdown]) if kept else 1
        shape = (len(values), num_groups) if by is None else (len(values), num_groups, len(self.classes[by]))
        return np.asarray(summed.reshape(shape), np.float64)

    def members(self, breakdown: str) -> NDArray[np.bool_]:
        """Return the cells of each group, (groups, cells)."""
        places = np.arange(len(self.groups[breakdown]))
        return np.asarray(self.group_codes(breakdown)[None, :] == places[:, None], np.bool_)

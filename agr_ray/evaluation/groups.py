"""Metrics of each group of the true labels, as sums over cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.cells import BREAKDOWNS, Cells
from agr_ray.evaluation.metrics import MetricSums
from agr_ray.labels import IntArray, Labels, LabelSpace
from agr_ray.models.predictions import Predictions

MIN_GROUP_ROWS: Final = 10
"""Minimum rows of a group to be considered for the worst group."""
VALIDATED: Final = ("gender", "race", "age_group", "gender_race")
"""Breakdowns that validation reports."""
_LONG: Final = ("confusion", "cs", "distance_years")
"""Values that the short form leaves out."""


class GroupSums:
    """The sums of `MetricSums` for each cell, from which come those of every group and of all rows."""

    def __init__(self, space: LabelSpace) -> None:
        self.cells = Cells(space)
        self.sums = MetricSums(space, self.cells.num)

    def update(
        self,
        labels: Labels,
        predictions: Predictions,
        fallback: NDArray[np.bool_] | None = None,
        cells: IntArray | None = None,
    ) -> None:
        """Count n rows in the cells of their true labels; see `MetricSums.update`."""
        self.sums.update(labels, predictions, fallback, self.cells.codes(labels) if cells is None else cells)

    def to_json(self, breakdowns: Sequence[str] = VALIDATED, *, short: bool = True) -> dict[str, dict[str, Any]]:
        """Return the values of each group of some breakdowns, by breakdown and name, as `MetricSums.to_json` does.

        A row without the label, or with an age range that spans several age groups, is in no group.

        Args:
            breakdowns: keys of `cells.BREAKDOWNS`.
            short: leave out confusion matrices, CS@k and the mean distance. Groups of two attributes are always short.
        """
        report: dict[str, dict[str, Any]] = {}
        for breakdown in breakdowns:
            groups, members = self.cells.groups[breakdown], self.cells.members(breakdown)
            values = {group.name: self.sums.of(own).to_json() for group, own in zip(groups, members, strict=True)}
            if short or len(BREAKDOWNS[breakdown]) > 1:
                values = {name: _shortened(of_group) for name, of_group in values.items()}
            report[breakdown] = values
        return report


def _shortened(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {name: each for name, each in value.items() if name not in _LONG} if isinstance(value, dict) else value
        for key, value in values.items()
    }


def class_counts(labels: Labels) -> dict[str, dict[str, int]]:
    """Return the number of rows in each group of `VALIDATED`; a row without a label is in none of its groups."""
    cells = Cells(labels.space)
    rows = np.bincount(cells.codes(labels), minlength=cells.num)
    return {
        breakdown: {
            group.name: int(rows[own].sum())
            for group, own in zip(cells.groups[breakdown], cells.members(breakdown), strict=True)
        }
        for breakdown in VALIDATED
    }


def worst_group_age_mae(groups: Mapping[str, Any]) -> float | None:
    """Return the largest mean absolute error of age, years, over the groups by gender, race or both.

    Groups of fewer than `MIN_GROUP_ROWS` rows with an age are left out; None if all are. Age groups are not considered,
    because models tend towards the middle and err most at both ends.

    Args:
        groups: `GroupSums.to_json`.
    """
    ages = [of["age"] for attribute in ("gender", "race", "gender_race") for of in groups[attribute].values()]
    return max((age["mae_years"] for age in ages if age["n"] >= MIN_GROUP_ROWS), default=None)

"""Row counts and model errors for each group of the true labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.terms import FloatArray, ratio, row_terms
from agr_ray.labels import Labels, LabelSpace
from agr_ray.models.predictions import Predictions

MIN_GROUP_ROWS: Final = 10
"""Minimum rows of a group to be considered for the worst group."""
_TERMS: Final = (
    *("age", "age_absolute", "age_signed", "age_within", "age_known"),
    *("age_grouped", "age_exact_group", "age_one_off"),
    *("gender", "gender_right", "race", "race_right"),
)
"""Terms of `row_terms` that `GroupSums` adds up."""


class GroupSums:
    """Errors and correct predictions in every group of `groups`, as sums over rows.

    Cheap enough for every validation: a batch costs one product of two small matrices.
    """

    def __init__(self, space: LabelSpace) -> None:
        none = Labels(space, np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64))
        self._names = [(attribute, name) for attribute, members in groups(none).items() for name, _ in members]
        self._attributes = list(groups(none))
        self.vector: FloatArray = np.zeros(len(self._names) * (1 + len(_TERMS)))
        """All sums, for one all-reduce."""

    def update(self, labels: Labels, predictions: Predictions) -> None:
        """Count n rows in the groups of their true labels; otherwise as `MetricSums.update`."""
        columns = row_terms(labels, predictions)
        terms = np.stack([np.ones(len(labels)), *(columns[name] for name in _TERMS)], axis=1)
        members = np.stack([chosen for group in groups(labels).values() for _, chosen in group])
        self.vector += (members.astype(np.float64) @ terms).ravel()

    def to_json(self) -> dict[str, Any]:
        """Divide the sums; return the shape of `metrics_report`'s `groups` without confusion matrices and CS@k."""
        report: dict[str, Any] = {attribute: {} for attribute in self._attributes}
        rows = self.vector.reshape(len(self._names), -1)
        for (attribute, name), (num_rows, *sums) in zip(self._names, rows, strict=True):
            of = dict(zip(_TERMS, sums, strict=True))
            report[attribute][name] = {
                "n": int(num_rows),
                "age": {
                    "n": int(of["age"]),
                    "n_range": int(of["age_known"] - of["age"]),
                    "n_spanning": int(of["age_known"] - of["age_grouped"]),
                    "mae_years": ratio(of["age_absolute"], of["age"]),
                    "bias_years": ratio(of["age_signed"], of["age"]),
                    "within_5": ratio(of["age_within"], of["age"]),
                    "exact_group": ratio(of["age_exact_group"], of["age_grouped"]),
                    "one_off": ratio(of["age_one_off"], of["age_grouped"]),
                },
                **{
                    task: {"n": int(of[task]), "accuracy": ratio(of[f"{task}_right"], of[task])}
                    for task in ("gender", "race")
                },
            }
        return report


def class_counts(labels: Labels) -> dict[str, dict[str, int]]:
    """Return the number of rows in each group of `groups`; a row without a label is in none of its groups."""
    return {
        attribute: {name: int(chosen.sum()) for name, chosen in members}
        for attribute, members in groups(labels).items()
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


def groups(labels: Labels) -> dict[str, Iterator[tuple[str, NDArray[np.bool_]]]]:
    """Return the groups of true labels by gender, race, age_group and gender_race: each group's name and (n,) members.

    A row without the label, or with an age range that spans several age groups, is in no group. In a label space
    without races, there are no groups by race and gender_race.
    """
    space, ages = labels.space, labels.age_group
    return {
        "gender": ((name, labels.gender == k) for k, name in enumerate(space.genders)),
        "race": ((name, labels.race == k) for k, name in enumerate(space.races)),
        "age_group": ((name, ages == k) for k, name in enumerate(space.age_groups)),
        "gender_race": (
            (f"{gender}/{race}", (labels.gender == g) & (labels.race == r))
            for g, gender in enumerate(space.genders)
            for r, race in enumerate(space.races)
        ),
    }

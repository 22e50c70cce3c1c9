"""Images worth looking at: right and wrong predictions, and the worst of each group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.cells import Cells
from agr_ray.evaluation.terms import WITHIN_YEARS, FloatArray, predicted_gender
from agr_ray.labels import IntArray, Labels
from agr_ray.models.predictions import Predictions

FAR_YEARS: Final = 10.0
"""An age is wrong if its error is larger, and right up to `WITHIN_YEARS`; errors in between are neither."""


class Cases(NamedTuple):
    """Indices of rows."""

    right: IntArray
    """Drawn at random."""
    wrong: IntArray
    """Worst first."""


class GroupCases(NamedTuple):
    """The worst rows of a group of true labels."""

    group: str
    """Such as `female/black`."""
    n: int
    """Rows of the group with a label of the task."""
    wrong: IntArray
    """Indices, worst first; only wrong ones."""


def badness(labels: Labels, predictions: Predictions, task: str) -> FloatArray:
    """Return how wrong each row is, (n,): NaN without an exact label, 0 if right or nearly so, and larger for worse.

    For age, it is the error in years if it exceeds `FAR_YEARS`. For gender and race, it is the probability of the wrong
    class that is predicted.
    """
    predicted = predictions[task].astype(np.float64)
    if task == "age":
        error = np.abs(predicted - labels.age)
        return np.where(error > FAR_YEARS, error, np.where(np.isnan(error), np.nan, 0.0))
    truth = labels.gender if task == "gender" else labels.race
    classes = predicted_gender(predicted) if task == "gender" else predicted.argmax(axis=1)
    sure = np.maximum(predicted, 1.0 - predicted) if task == "gender" else predicted.max(axis=1)
    return np.where(truth < 0, np.nan, np.where(classes == truth, 0.0, sure))


def choose_cases(labels: Labels, predictions: Predictions, task: str, num_each: int, rng: np.random.Generator) -> Cases:
    """Choose at most `num_each` right predictions at random, and as many wrong ones, the worst first.

    Args:
        labels: the truth.
        predictions: of the same rows.
        task: age, gender or race.
        num_each: of right and of wrong ones.
        rng: chooses the right ones.
    """
    bad = badness(labels, predictions, task)
    is_right = bad == 0.0
    if task == "age":
        is_right &= np.abs(predictions["age"] - labels.age) <= WITHIN_YEARS
    right = rng.permutation(np.flatnonzero(is_right))[:num_each]
    return Cases(np.sort(right), _worst(bad, np.ones(len(bad), bool), num_each))


def worst_by_group(labels: Labels, predictions: Predictions, task: str, num_each: int) -> list[GroupCases]:
    """Return the worst predictions of each group by gender and race, or by gender if there are no race labels.

    Groups without a label of the task are left out.
    """
    bad = badness(labels, predictions, task)
    attribute = "gender_race" if (labels.race >= 0).any() else "gender"
    cells = Cells(labels.space)
    group_of = cells.group_codes(attribute)[cells.codes(labels)]
    cases = []
    for place, (_, name) in enumerate(cells.groups[attribute]):
        chosen = group_of == place
        num_rows = int((chosen & np.isfinite(bad)).sum())
        if num_rows:
            cases.append(GroupCases(name, num_rows, _worst(bad, chosen, num_each)))
    return cases


def _worst(bad: FloatArray, chosen: NDArray[np.bool_], number: int) -> IntArray:
    rows = np.flatnonzero(chosen & (bad > 0.0))
    return rows[np.argsort(-bad[rows], kind="stable")][:number]


def all_rows(groups_of_rows: Sequence[NDArray[Any]]) -> IntArray:
    """Return the distinct indices in all arrays, sorted."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *groups_of_rows])).astype(np.int64)

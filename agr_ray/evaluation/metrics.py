"""Metrics as sums and counts: add up over batches and ranks, divide once.

Every accuracy is derived from its confusion matrix, whose rows are the truth. Values are fractions, not per cent; None
if nothing is labelled. An age between two groups of the label space is in the nearer one, or halfway, in the upper one
(10.5 is in 11-20). Male is predicted if and only if p_male > 0.5.

An age range has no error in years. It counts for the accuracy of age groups if one group contains all of it. Otherwise
its true group is unknown, so it is counted separately.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.terms import WITHIN_YEARS, FloatArray, most_likely, ratio
from agr_ray.labels import IntArray, Labels, LabelSpace
from agr_ray.models.predictions import Predictions

CS_YEARS: Final = 16
"""CS@k, the share of ages predicted to within k years, is reported for k = 0 .. CS_YEARS - 1."""


@dataclass(frozen=True)
class Baseline:
    """The constant baseline: the median age and the most frequent classes of some labels."""

    space: LabelSpace
    age_years: float | None
    """Median of ages and of the midpoints of ranges; None: no label has an age."""
    gender: int | None
    """Index in `space.genders`; None: no label has one."""
    race: int | None
    """Index in `space.races`; None: no label has one."""
    fitted_on: str = "train"
    """Labels that it was fitted on: `train`, or `evaluated` if those are not available, which favours the baseline."""

    @classmethod
    def fit(cls, labels: Labels, fitted_on: str = "train") -> Self:
        """Fit the baseline; of equally frequent classes, take the first."""
        low, high = labels.age_range
        ages = ((low + high) / 2)[np.isfinite(low)]
        return cls(
            space=labels.space,
            age_years=float(np.median(ages)) if len(ages) else None,
            gender=_most_frequent(labels.gender, len(labels.space.genders)),
            race=_most_frequent(labels.race, len(labels.space.races)),
            fitted_on=fitted_on,
        )

    def predict(self, num_rows: int) -> Predictions:
        """Return the constant predictions for this many rows."""
        predictions: dict[str, NDArray[np.float32]] = {}
        if self.age_years is not None:
            predictions["age"] = np.full(num_rows, self.age_years, np.float32)
        if self.gender is not None:
            predictions["gender"] = np.full(num_rows, self.gender, np.float32)
        if self.race is not None:
            predictions["race"] = np.tile(np.eye(len(self.space.races), dtype=np.float32)[self.race], (num_rows, 1))
        return predictions

    def to_json(self) -> dict[str, Any]:
        """Return plain values, classes as words."""
        return {
            "fitted_on": self.fitted_on,
            "age_years": self.age_years,
            "gender": None if self.gender is None else self.space.genders[self.gender],
            "race": None if self.race is None else self.space.races[self.race],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], space: LabelSpace) -> Self:
        """Rebuild from the result of `to_json`."""
        gender, race = (
            None if values[task] is None else names.index(values[task])
            for task, names in (("gender", space.genders), ("race", space.races))
        )
        return cls(space, values["age_years"], gender, race, values["fitted_on"])


class MetricSums:
    """Sums over rows, for each of some cells; parts may be added in any order."""

    def __init__(self, space: LabelSpace, num_cells: int = 1) -> None:
        self.space = space
        sizes = {
            "rows": (2,),
            "age": (5,),
            "within": (CS_YEARS,),
            "age_group": (len(space.age_groups), len(space.age_groups)),
            "gender": (len(space.genders), len(space.genders)),
            "race": (len(space.races), len(space.races)),
        }
        self.table: FloatArray = np.zeros((num_cells, sum(math.prod(shape) for shape in sizes.values())))
        """All sums, (cells, sums). The other attributes are views of it, with the cells as their first dimension."""
        ends = np.cumsum([math.prod(shape) for shape in sizes.values()])
        parts = np.split(self.table, ends[:-1], axis=1)
        # A split of columns can be reshaped without a copy, because only its last dimension is divided.
        views = {
            name: part.reshape(num_cells, *shape) for (name, shape), part in zip(sizes.items(), parts, strict=True)
        }
        self.rows = views["rows"]
        """Number of rows, and of fallbacks (no face was found) among them."""
        self.age = views["age"]
        """Rows with an exact age; sums of |error| and of error (predicted - true), years; rows with an age or a range;
        sum of distances to it, years."""
        self.within = views["within"]
        """Rows with |error| <= k years, for k = 0 .. CS_YEARS - 1."""
        self.age_group = views["age_group"]
        """Confusion matrix of age groups, over rows that have one (`Labels.age_group`)."""
        self.gender = views["gender"]
        """Confusion matrix."""
        self.race = views["race"]
        """Confusion matrix."""

    @property
    def vector(self) -> FloatArray:
        """Return a view of all sums, for one all-reduce."""
        return self.table.reshape(-1)

    def update(
        self,
        labels: Labels,
        predictions: Predictions,
        fallback: NDArray[np.bool_] | None = None,
        cells: IntArray | None = None,
    ) -> None:
        """Count n rows. A row counts for the tasks for which it has a label and a prediction.

        Args:
            labels: the truth.
            predictions: of the same rows.
            fallback: (n,) whether no face was found; None: faces were found in all.
            cells: (n,) the cell of each row; None: all are in the first.
        """
        if cells is None:
            cells = np.zeros(len(labels), np.int64)
        self.rows[:, 0] += self._sum(cells)
        if fallback is not None:
            self.rows[:, 1] += self._sum(cells[fallback])
        if "age" in predictions:
            low, high = labels.age_range
            known = np.isfinite(low)
            low, high, predicted = low[known], high[known], predictions["age"][known].astype(np.float64)
            distance = np.maximum(np.maximum(low - predicted, predicted - high), 0.0)
            exact = np.isfinite(labels.age[known])
            error, own = predicted[exact] - low[exact], cells[known][exact]
            self.age[:, 0] += self._sum(own)
            self.age[:, 1] += self._sum(own, np.abs(error))
            self.age[:, 2] += self._sum(own, error)
            self.age[:, 3] += self._sum(cells[known])
            self.age[:, 4] += self._sum(cells[known], distance)
            first_within = np.minimum(np.ceil(np.abs(error)), CS_YEARS).astype(np.int64)
            by_years = np.bincount(own * (CS_YEARS + 1) + first_within, minlength=len(self.table) * (CS_YEARS + 1))
            self.within += by_years.reshape(-1, CS_YEARS + 1).cumsum(axis=1)[:, :CS_YEARS]
            truth, groups = labels.age_group[known], self.space.age_group(predicted)
            self._count(self.age_group, cells[known], truth, groups)
        for matrices, task, truth in ((self.gender, "gender", labels.gender), (self.race, "race", labels.race)):
            if task in predictions:
                self._count(matrices, cells, truth, most_likely(task, predictions[task])[0])

    def _sum(self, cells: IntArray, weights: NDArray[Any] | None = None) -> NDArray[Any]:
        return np.bincount(cells, weights, minlength=len(self.table))

    def _count(self, matrices: FloatArray, cells: IntArray, truth: IntArray, predicted: IntArray) -> None:
        """Add rows to the confusion matrices of their cells; those without truth are left out."""
        num = matrices.shape[1]
        known = truth >= 0
        codes = (cells[known] * num + truth[known]) * num + predicted[known]
        matrices += np.bincount(codes, minlength=matrices.size).reshape(matrices.shape)

    def of(self, cells: NDArray[np.bool_]) -> MetricSums:
        """Return the sums over some of the cells, which a mask selects, as one cell."""
        part = MetricSums(self.space)
        part.table[0] = self.table[cells].sum(axis=0)
        return part

    def to_json(self) -> dict[str, Any]:
        """Add up the cells and divide the sums; return n, n_fallback and the metrics of each task."""
        total = self if len(self.table) == 1 else self.of(np.ones(len(self.table), bool))
        num_age, absolute, signed, num_known, distance = total.age[0]
        within, age_group = total.within[0], total.age_group[0]
        num_grouped = age_group.sum()
        return {
            "n": int(total.rows[0, 0]),
            "n_fallback": int(total.rows[0, 1]),
            "age": {
                "n": int(num_age),
                "n_range": int(num_known - num_age),
                "n_spanning": int(num_known - num_grouped),
                "mae_years": ratio(absolute, num_age),
                "bias_years": ratio(signed, num_age),
                "within_5": ratio(within[WITHIN_YEARS], num_age),
                "cs": [ratio(count, num_age) for count in within],
                "distance_years": ratio(distance, num_known),
                "exact_group": ratio(np.trace(age_group), num_grouped),
                "one_off": ratio(sum(np.trace(age_group, offset) for offset in (-1, 0, 1)), num_grouped),
                "confusion": _counts(age_group),
            },
            "gender": _classes_json(total.gender[0]),
            "race": _classes_json(total.race[0]),
        }


def objective(
    values: Mapping[str, Any], baseline: Mapping[str, Any], tasks: tuple[str, ...], *, balanced: bool = False
) -> float | None:
    """Return the validation objective, lower is better: the mean over tasks of error / baseline's error.

    The error of age is the mean distance to the true age or range in years. That of gender and race is 1 - accuracy, or
    in sweeps 1 - balanced accuracy, which counts each class equally, however rare. 1 is as good as the baseline, 0 is
    perfect. If the baseline's error is 0, the error is divided by 1. Tasks without labels are left out; None if all
    are.

    Args:
        values: `MetricSums.to_json` of the model.
        baseline: the same for the baseline's predictions on the same rows.
        tasks: tasks of the model.
        balanced: whether accuracy is balanced.
    """
    accuracy = "balanced_accuracy" if balanced else "accuracy"
    ratios = []
    for task in tasks:
        key = "distance_years" if task == "age" else accuracy
        if values[task][key] is None or baseline[task][key] is None:
            continue
        own, constant = (table[task][key] if task == "age" else 1.0 - table[task][key] for table in (values, baseline))
        ratios.append(own / (constant if constant > 0.0 else 1.0))
    return sum(ratios) / len(ratios) if ratios else None


def _classes_json(confusion: FloatArray) -> dict[str, Any]:
    present = confusion.sum(axis=1)
    recalls = np.diag(confusion)[present > 0] / present[present > 0]
    return {
        "n": int(confusion.sum()),
        "accuracy": ratio(np.trace(confusion), confusion.sum()),
        "balanced_accuracy": float(recalls.mean()) if len(recalls) else None,  # over classes that occur
        "confusion": _counts(confusion),
    }


def _counts(matrix: FloatArray) -> list[list[int]]:
    return [[int(count) for count in row] for row in matrix]


def _most_frequent(classes: IntArray, num_classes: int) -> int | None:
    known = classes[classes >= 0]
    return int(np.bincount(known, minlength=num_classes).argmax()) if len(known) else None

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

from agr_ray.evaluation.bootstrap import intervals
from agr_ray.evaluation.groups import groups
from agr_ray.evaluation.terms import WITHIN_YEARS, FloatArray, predicted_gender, ratio
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
    """Sums over rows; parts may be added in any order."""

    def __init__(self, space: LabelSpace) -> None:
        self.space = space
        sizes = {
            "rows": (2,),
            "age": (5,),
            "within": (CS_YEARS,),
            "age_group": (len(space.age_groups), len(space.age_groups)),
            "gender": (len(space.genders), len(space.genders)),
            "race": (len(space.races), len(space.races)),
        }
        self.vector: FloatArray = np.zeros(sum(math.prod(shape) for shape in sizes.values()))
        """All sums, for one all-reduce. The other attributes are views of it."""
        ends = np.cumsum([math.prod(shape) for shape in sizes.values()])
        parts = np.split(self.vector, ends[:-1])
        views = {name: part.reshape(shape) for (name, shape), part in zip(sizes.items(), parts, strict=True)}
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

    def update(self, labels: Labels, predictions: Predictions, fallback: NDArray[np.bool_] | None = None) -> None:
        """Count n rows. A row counts for the tasks for which it has a label and a prediction.

        Args:
            labels: the truth.
            predictions: of the same rows.
            fallback: (n,) whether no face was found; None: faces were found in all.
        """
        self.rows += (len(labels), 0 if fallback is None else int(fallback.sum()))
        if "age" in predictions:
            low, high = labels.age_range
            known = np.isfinite(low)
            low, high, predicted = low[known], high[known], predictions["age"][known].astype(np.float64)
            distance = np.maximum(np.maximum(low - predicted, predicted - high), 0.0)
            exact = np.isfinite(labels.age[known])
            error = predicted[exact] - low[exact]
            self.age += (len(error), np.abs(error).sum(), error.sum(), len(predicted), distance.sum())
            self.within += (np.abs(error)[:, None] <= np.arange(CS_YEARS)).sum(axis=0)
            truth, groups = labels.age_group[known], self.space.age_group(predicted)
            self.age_group += _confusion(truth[truth >= 0], groups[truth >= 0], len(self.age_group))
        if "gender" in predictions:
            known = labels.gender >= 0
            genders = predicted_gender(predictions["gender"][known])
            self.gender += _confusion(labels.gender[known], genders, len(self.gender))
        if "race" in predictions:
            known = labels.race >= 0
            self.race += _confusion(labels.race[known], predictions["race"][known].argmax(axis=1), len(self.race))

    def to_json(self) -> dict[str, Any]:
        """Divide the sums; return n, n_fallback and the metrics of each task."""
        num_age, absolute, signed, num_known, distance = self.age
        num_grouped = self.age_group.sum()
        return {
            "n": int(self.rows[0]),
            "n_fallback": int(self.rows[1]),
            "age": {
                "n": int(num_age),
                "n_range": int(num_known - num_age),
                "n_spanning": int(num_known - num_grouped),
                "mae_years": ratio(absolute, num_age),
                "bias_years": ratio(signed, num_age),
                "within_5": ratio(self.within[WITHIN_YEARS], num_age),
                "cs": [ratio(count, num_age) for count in self.within],
                "distance_years": ratio(distance, num_known),
                "exact_group": ratio(np.trace(self.age_group), num_grouped),
                "one_off": ratio(sum(np.trace(self.age_group, offset) for offset in (-1, 0, 1)), num_grouped),
                "confusion": _counts(self.age_group),
            },
            "gender": _classes_json(self.gender),
            "race": _classes_json(self.race),
        }


def metrics_report(
    labels: Labels,
    predictions: Predictions,
    fallback: NDArray[np.bool_] | None = None,
    baseline: Baseline | None = None,
    clusters: IntArray | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return everything that metrics.json holds about n rows, as plain values.

    Keys: those of `MetricSums.to_json`; `labels`, the classes in the order of each matrix; `baseline`, of the same
    shape, with `guess`; `groups.{gender,race,age_group,gender_race}.NAME`, of the same shape, by the true label;
    `intervals.{age,gender,race}.METRIC` = [low, high], the 95 % bootstrap interval. `age.n` counts rows with an exact
    age, which errors in years use, and `age.n_range` rows with a range. Both count for `distance_years`, and for
    `exact_group`, `one_off` and `confusion`, except `age.n_spanning` ranges, which span several age groups.

    Args:
        labels: the truth.
        predictions: of the same rows.
        fallback: (n,) whether no face was found; None: faces were found in all.
        baseline: fitted on the training labels; None: it is fitted on these labels, and marked as such.
        clusters: (n,) number of each row's person; the images of a person are resampled together. None: images are
            independent.
        seed: of the bootstrap.
    """
    baseline = Baseline.fit(labels, fitted_on="evaluated") if baseline is None else baseline
    constant = {task: values for task, values in baseline.predict(len(labels)).items() if task in predictions}
    return {
        **_sums(labels, predictions, fallback).to_json(),
        "labels": {
            "age_group": list(labels.space.age_groups),
            "gender": list(labels.space.genders),
            "race": list(labels.space.races),
        },
        "baseline": {"guess": baseline.to_json(), **_sums(labels, constant, fallback).to_json()},
        "groups": {
            attribute: {
                name: _sums(*_take(labels, predictions, fallback, chosen)).to_json() for name, chosen in members
            }
            for attribute, members in groups(labels).items()
        },
        "intervals": intervals(labels, predictions, clusters, seed),
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


def _sums(labels: Labels, predictions: Predictions, fallback: NDArray[np.bool_] | None) -> MetricSums:
    sums = MetricSums(labels.space)
    sums.update(labels, predictions, fallback)
    return sums


def _take(
    labels: Labels, predictions: Predictions, fallback: NDArray[np.bool_] | None, chosen: NDArray[np.bool_]
) -> tuple[Labels, Predictions, NDArray[np.bool_] | None]:
    return (
        labels.take(chosen),
        {task: values[chosen] for task, values in predictions.items()},
        None if fallback is None else fallback[chosen],
    )


def _confusion(truth: IntArray, predicted: IntArray, num_classes: int) -> FloatArray:
    pairs = np.bincount(truth * num_classes + predicted, minlength=num_classes * num_classes)
    return pairs.reshape(num_classes, num_classes).astype(np.float64)


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

"""Metrics as sums and counts: add up over batches and ranks, divide once.

Every accuracy is derived from its confusion matrix, whose rows are the truth. Fractions, not per cent;
None where nothing is labelled. Ages are put into the paper's groups after rounding to whole years, half
upwards, so that 10.5 is in 11-20. Male is predicted if and only if p_male > 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from agr_ray.models.predictions import Predictions
from agr_ray.schema import AGE_GROUP_LAST_YEARS, AGE_GROUPS, GENDERS, RACES

CS_YEARS: Final = 16
"""CS@k, the share of ages predicted to within k years, is given for k = 0 .. CS_YEARS - 1."""

NUM_RESAMPLES: Final = 1000
MIN_GROUP_ROWS: Final = 10
"""Rows of a group from which it may be called the worst."""
_MIN_UNITS = 2
"""Minimum number of rows, or persons, for an interval."""
_WITHIN_YEARS = 5
_INTERVAL = 0.95
_CHUNK_WEIGHTS = 4_000_000
_GROUP_TERMS: Final = (
    "age",
    "age_absolute",
    "age_signed",
    "age_within",
    "gender",
    "gender_right",
    "race",
    "race_right",
)
"""Those of `_columns` that `GroupSums` adds up."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Labels(NamedTuple):
    """Truth of n images."""

    age: NDArray[np.float32]
    """(n,) years; NaN: missing."""
    gender: IntArray
    """(n,) index in `GENDERS`; -1: missing."""
    race: IntArray
    """(n,) index in `RACES`; -1: missing."""


@dataclass(frozen=True)
class Baseline:
    """The best guess that doesn't look: the median age and the most frequent classes of some labels."""

    age_years: float | None
    """None: no label has an age."""
    gender: int | None
    """Index in `GENDERS`; None: no label has one."""
    race: int | None
    """Index in `RACES`; None: no label has one."""
    fitted_on: str = "train"
    """Whose labels: `train`, or `evaluated` where training's aren't at hand, which flatters the guess."""

    @classmethod
    def fit(cls, labels: Labels, fitted_on: str = "train") -> Self:
        """Find the guesses. Of equally frequent classes the first is taken."""
        ages = labels.age[np.isfinite(labels.age)]
        return cls(
            age_years=float(np.median(ages)) if len(ages) else None,
            gender=_most_frequent(labels.gender, len(GENDERS)),
            race=_most_frequent(labels.race, len(RACES)),
            fitted_on=fitted_on,
        )

    def predict(self, num_rows: int) -> Predictions:
        """Guess so many times."""
        age = None if self.age_years is None else np.full(num_rows, self.age_years, np.float32)
        p_male = None if self.gender is None else np.full(num_rows, self.gender, np.float32)
        race_probs = (
            None if self.race is None else np.tile(np.eye(len(RACES), dtype=np.float32)[self.race], (num_rows, 1))
        )
        return Predictions(age, p_male, race_probs)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, classes as words."""
        return {
            "fitted_on": self.fitted_on,
            "age_years": self.age_years,
            "gender": None if self.gender is None else GENDERS[self.gender],
            "race": None if self.race is None else RACES[self.race],
        }


class MetricSums:
    """What has been counted so far; every entry is a sum over rows, so parts may be added in any order."""

    def __init__(self) -> None:
        sizes = {
            "rows": (2,),
            "age": (3,),
            "within": (CS_YEARS,),
            "age_group": (len(AGE_GROUPS), len(AGE_GROUPS)),
            "gender": (len(GENDERS), len(GENDERS)),
            "race": (len(RACES), len(RACES)),
        }
        self.vector: FloatArray = np.zeros(sum(math.prod(shape) for shape in sizes.values()))
        """All sums: what an all-reduce takes. The other attributes are views of it."""
        ends = np.cumsum([math.prod(shape) for shape in sizes.values()])
        parts = np.split(self.vector, ends[:-1])
        views = {name: part.reshape(shape) for (name, shape), part in zip(sizes.items(), parts, strict=True)}
        self.rows = views["rows"]
        """Rows, and those of them that are fallbacks (no face was found)."""
        self.age = views["age"]
        """Rows with an age, sum of |error|, sum of error (predicted - true), years."""
        self.within = views["within"]
        """Rows with |error| <= k years, for k = 0 .. CS_YEARS - 1."""
        self.age_group = views["age_group"]
        """Confusion matrix of age groups, as the two below."""
        self.gender = views["gender"]
        self.race = views["race"]

    def update(self, labels: Labels, predictions: Predictions, fallback: NDArray[np.bool_] | None = None) -> None:
        """Count n rows. A row counts for the tasks that it has a label and a prediction of.

        Args:
            labels: the truth.
            predictions: of the same rows.
            fallback: (n,) where no face was found; none: nowhere.
        """
        self.rows += (len(labels.age), 0 if fallback is None else int(fallback.sum()))
        if predictions.age is not None:
            known = np.isfinite(labels.age)
            truth, guess = labels.age[known].astype(np.float64), predictions.age[known].astype(np.float64)
            error = guess - truth
            self.age += (len(error), np.abs(error).sum(), error.sum())
            self.within += (np.abs(error)[:, None] <= np.arange(CS_YEARS)).sum(axis=0)
            self.age_group += _confusion(age_group(truth), age_group(guess), len(AGE_GROUPS))
        if predictions.p_male is not None:
            known = labels.gender >= 0
            self.gender += _confusion(labels.gender[known], predicted_gender(predictions.p_male[known]), len(GENDERS))
        if predictions.race_probs is not None:
            known = labels.race >= 0
            self.race += _confusion(labels.race[known], predictions.race_probs[known].argmax(axis=1), len(RACES))

    def to_json(self) -> dict[str, Any]:
        """Divide: n, n_fallback, and a table for each task."""
        num_age, absolute, signed = self.age
        return {
            "n": int(self.rows[0]),
            "n_fallback": int(self.rows[1]),
            "age": {
                "n": int(num_age),
                "mae_years": _ratio(absolute, num_age),
                "bias_years": _ratio(signed, num_age),
                "within_5": _ratio(self.within[_WITHIN_YEARS], num_age),
                "cs": [_ratio(count, num_age) for count in self.within],
                "exact_group": _ratio(np.trace(self.age_group), num_age),
                "one_off": _ratio(sum(np.trace(self.age_group, offset) for offset in (-1, 0, 1)), num_age),
                "confusion": _counts(self.age_group),
            },
            "gender": _classes_json(self.gender),
            "race": _classes_json(self.race),
        }


class GroupSums:
    """Errors and right answers of every group that `metrics_report` has, by the true label, as sums over rows.

    Cheap enough for every validation: a batch is one product of two small matrices.
    """

    def __init__(self) -> None:
        none = Labels(np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64))
        self._names = [(attribute, name) for attribute, members in _groups(none).items() for name, _ in members]
        self.vector: FloatArray = np.zeros(len(self._names) * (1 + len(_GROUP_TERMS)))
        """All sums: what an all-reduce takes."""

    def update(self, labels: Labels, predictions: Predictions) -> None:
        """Count n rows. A row counts for the groups that its labels name, and as in `MetricSums.update`."""
        columns = _columns(labels, predictions)
        terms = np.stack([np.ones(len(labels.age)), *(columns[name] for name in _GROUP_TERMS)], axis=1)
        members = np.stack([chosen for group in _groups(labels).values() for _, chosen in group])
        self.vector += (members.astype(np.float64) @ terms).ravel()

    def to_json(self) -> dict[str, Any]:
        """Divide: part of the shape of `metrics_report`'s `groups`; what is left out are matrices and CS@k."""
        report: dict[str, Any] = {}
        rows = self.vector.reshape(len(self._names), -1)
        for (attribute, name), (num_rows, *sums) in zip(self._names, rows, strict=True):
            of = dict(zip(_GROUP_TERMS, sums, strict=True))
            report.setdefault(attribute, {})[name] = {
                "n": int(num_rows),
                "age": {
                    "n": int(of["age"]),
                    "mae_years": _ratio(of["age_absolute"], of["age"]),
                    "bias_years": _ratio(of["age_signed"], of["age"]),
                    "within_5": _ratio(of["age_within"], of["age"]),
                },
                **{
                    task: {"n": int(of[task]), "accuracy": _ratio(of[f"{task}_right"], of[task])}
                    for task in ("gender", "race")
                },
            }
        return report


def class_counts(labels: Labels) -> dict[str, dict[str, int]]:
    """Return how many of n rows are in each group of `metrics_report`: gender, race, age_group, gender_race.

    A row whose label is missing is in no group of it.
    """
    return {
        attribute: {name: int(chosen.sum()) for name, chosen in members}
        for attribute, members in _groups(labels).items()
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

    Keys: those of `MetricSums.to_json`; `labels`, the order of each matrix; `baseline`, of the same shape,
    with `guess`; `groups.{gender,race,age_group,gender_race}.NAME`, of the same shape, by the true label;
    `intervals.{age,gender,race}.METRIC` = [low, high], the 95 % bootstrap interval.

    Args:
        labels: the truth.
        predictions: of the same rows.
        fallback: (n,) where no face was found; none: nowhere.
        baseline: fitted on training's labels; none: fitted on these, and marked so.
        clusters: (n,) a number for each person, whose images are resampled together; none: images are independent.
        seed: of the bootstrap.
    """
    baseline = Baseline.fit(labels, fitted_on="evaluated") if baseline is None else baseline
    headed = baseline.predict(len(labels.age))
    guesses = Predictions(*(g if p is not None else None for g, p in zip(headed, predictions, strict=True)))
    return {
        **_sums(labels, predictions, fallback).to_json(),
        "labels": {"age_group": list(AGE_GROUPS), "gender": list(GENDERS), "race": list(RACES)},
        "baseline": {"guess": baseline.to_json(), **_sums(labels, guesses, fallback).to_json()},
        "groups": {
            attribute: {
                name: _sums(*_take(labels, predictions, fallback, chosen)).to_json() for name, chosen in members
            }
            for attribute, members in _groups(labels).items()
        },
        "intervals": intervals(labels, predictions, clusters, seed),
    }


def intervals(
    labels: Labels,
    predictions: Predictions,
    clusters: IntArray | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, dict[str, list[float] | None]]:
    """Return 95 % percentile bootstrap intervals of the headline metrics.

    None where fewer than two rows (or persons) count: resampling a single one would give an interval of zero width.

    Arguments as `metrics_report`. Resampling draws a weight for every row (or person), so that all
    resamples of all metrics are one matrix product.
    """
    columns = _columns(labels, predictions)
    values = np.stack(list(columns.values()), axis=1)
    if clusters is not None:
        persons = np.unique(clusters, return_inverse=True)[1]
        summed = np.zeros((int(persons.max(initial=-1)) + 1, values.shape[1]))
        np.add.at(summed, persons, values)
        values = summed
    rng = np.random.default_rng(seed)
    sums = dict(zip(columns, _resampled_sums(values, num_resamples, rng).T, strict=True))

    num_units = dict(zip(columns, np.count_nonzero(values, axis=0), strict=True))

    def share(part: str, whole: str) -> FloatArray:
        if num_units[whole] < _MIN_UNITS:
            return np.full(num_resamples, np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(sums[part] / sums[whole], np.float64)

    def recall(task: str, k: int) -> FloatArray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(sums[f"{task}_right_{k}"] / sums[f"{task}_true_{k}"], np.float64)

    def balanced(task: str, num_classes: int) -> FloatArray:
        if num_units[task] < _MIN_UNITS:
            return np.full(num_resamples, np.nan)
        recalls = np.stack([recall(task, k) for k in range(num_classes)])
        present = np.isfinite(recalls)
        num_present = present.sum(axis=0)
        mean: FloatArray = np.where(present, recalls, 0.0).sum(axis=0) / np.where(num_present, num_present, np.nan)
        return mean

    return {
        "age": {
            "mae_years": _percentiles(share("age_absolute", "age")),
            "bias_years": _percentiles(share("age_signed", "age")),
            "within_5": _percentiles(share("age_within", "age")),
            "one_off": _percentiles(share("age_one_off", "age")),
        },
        "gender": {
            "accuracy": _percentiles(share("gender_right", "gender")),
            "balanced_accuracy": _percentiles(balanced("gender", len(GENDERS))),
        },
        "race": {
            "accuracy": _percentiles(share("race_right", "race")),
            "balanced_accuracy": _percentiles(balanced("race", len(RACES))),
        },
    }


def age_group(age_years: NDArray[np.floating[Any]]) -> IntArray:
    """Return the index in `AGE_GROUPS` of each age: of its whole years, halves rounded upwards. No NaN."""
    whole = np.floor(np.asarray(age_years, np.float64) + 0.5)
    groups: IntArray = np.searchsorted(np.asarray(AGE_GROUP_LAST_YEARS), whole, side="left").astype(np.int64)
    return groups


def predicted_gender(p_male: NDArray[np.floating[Any]]) -> IntArray:
    """Return the index in `GENDERS`: male if and only if p_male > 0.5."""
    return (p_male > 0.5).astype(np.int64)


def objective(
    values: Mapping[str, Any], baseline: Mapping[str, Any], tasks: tuple[str, ...], *, balanced: bool = False
) -> float | None:
    """Return what training minimises on validation: the mean over tasks of error / baseline's error.

    The error of age is the mean absolute error, that of gender and race 1 - accuracy, or 1 - balanced accuracy, which
    counts each class the same, however rare: sweeps go by that. 1 is as good as guessing, 0 is perfect. A baseline
    without error counts as 1 (a year, or all wrong). Tasks without a label are left out; None: all are.

    Args:
        values: `MetricSums.to_json` of the model.
        baseline: the same of the baseline's guesses on the same rows.
        tasks: those that the model has.
        balanced: whether accuracy is balanced.
    """
    accuracy = "balanced_accuracy" if balanced else "accuracy"
    ratios = []
    for task in tasks:
        if values[task]["n"] == 0 or baseline[task]["n"] == 0:
            continue
        own, guessed = (
            table["age"]["mae_years"] if task == "age" else 1.0 - table[task][accuracy] for table in (values, baseline)
        )
        ratios.append(own / (guessed if guessed > 0.0 else 1.0))
    return sum(ratios) / len(ratios) if ratios else None


def worst_group_age_mae(groups: Mapping[str, Any]) -> float | None:
    """Return the largest mean absolute error of age, years, of a group by gender, race or both.

    Groups of fewer than `MIN_GROUP_ROWS` rows with an age say too little and are left out; None: all are. Age groups
    are no groups here: whoever errs towards the middle errs most at the ends.

    Args:
        groups: `GroupSums.to_json`.
    """
    ages = [of["age"] for attribute in ("gender", "race", "gender_race") for of in groups[attribute].values()]
    return max((age["mae_years"] for age in ages if age["n"] >= MIN_GROUP_ROWS), default=None)


def _sums(labels: Labels, predictions: Predictions, fallback: NDArray[np.bool_] | None) -> MetricSums:
    sums = MetricSums()
    sums.update(labels, predictions, fallback)
    return sums


def _take(
    labels: Labels, predictions: Predictions, fallback: NDArray[np.bool_] | None, chosen: NDArray[np.bool_]
) -> tuple[Labels, Predictions, NDArray[np.bool_] | None]:
    return (
        Labels(labels.age[chosen], labels.gender[chosen], labels.race[chosen]),
        Predictions(*(None if values is None else values[chosen] for values in predictions)),
        None if fallback is None else fallback[chosen],
    )


def _groups(labels: Labels) -> dict[str, Iterator[tuple[str, NDArray[np.bool_]]]]:
    known = np.isfinite(labels.age)
    groups = np.where(known, age_group(np.where(known, labels.age, 0.0)), -1)
    return {
        "gender": ((name, labels.gender == k) for k, name in enumerate(GENDERS)),
        "race": ((name, labels.race == k) for k, name in enumerate(RACES)),
        "age_group": ((name, groups == k) for k, name in enumerate(AGE_GROUPS)),
        "gender_race": (
            (f"{gender}/{race}", (labels.gender == g) & (labels.race == r))
            for g, gender in enumerate(GENDERS)
            for r, race in enumerate(RACES)
        ),
    }


def _columns(labels: Labels, predictions: Predictions) -> dict[str, FloatArray]:
    """Return per-row terms, zero where there is no label or head, whose weighted sums give the headline metrics."""
    num_rows = len(labels.age)
    none = np.zeros(num_rows, bool)
    known = none if predictions.age is None else np.isfinite(labels.age)
    truth = np.where(known, labels.age, 0.0).astype(np.float64)
    guess = truth if predictions.age is None else np.where(known, predictions.age, 0.0).astype(np.float64)
    off = np.abs(age_group(guess) - age_group(truth))
    terms: dict[str, NDArray[Any]] = {
        "age": known,
        "age_absolute": np.abs(guess - truth),
        "age_signed": guess - truth,
        "age_within": known & (np.abs(guess - truth) <= _WITHIN_YEARS),
        "age_one_off": known & (off <= 1),
    }
    genders = None if predictions.p_male is None else predicted_gender(predictions.p_male)
    races = None if predictions.race_probs is None else predictions.race_probs.argmax(axis=1)
    for task, classes, predicted, names in (
        ("gender", labels.gender, genders, GENDERS),
        ("race", labels.race, races, RACES),
    ):
        known = none if predicted is None else classes >= 0
        right = none if predicted is None else known & (predicted == classes)
        terms |= {task: known, f"{task}_right": right}
        for k in range(len(names)):
            terms |= {f"{task}_true_{k}": known & (classes == k), f"{task}_right_{k}": right & (classes == k)}
    return {name: values.astype(np.float64) for name, values in terms.items()}


def _resampled_sums(values: FloatArray, num_resamples: int, rng: np.random.Generator) -> FloatArray:
    """Return (num_resamples, columns): sums over as many rows as there are, drawn with replacement."""
    num_rows = len(values)
    if num_rows == 0:
        return np.zeros((num_resamples, values.shape[1]))
    parts = []
    at_once = max(1, _CHUNK_WEIGHTS // num_rows)
    for first in range(0, num_resamples, at_once):
        num = min(at_once, num_resamples - first)
        drawn = rng.integers(0, num_rows, size=(num, num_rows))
        drawn += np.arange(num)[:, None] * num_rows
        weights = np.bincount(drawn.ravel(), minlength=num * num_rows).reshape(num, num_rows)
        parts.append(weights.astype(np.float64) @ values)
    return np.concatenate(parts)


def _percentiles(samples: FloatArray) -> list[float] | None:
    finite = samples[np.isfinite(samples)]
    if not len(finite):
        return None
    tail = 50.0 * (1.0 - _INTERVAL)
    low, high = np.percentile(finite, (tail, 100.0 - tail))
    return [float(low), float(high)]


def _confusion(truth: IntArray, guess: IntArray, num_classes: int) -> FloatArray:
    pairs = np.bincount(truth * num_classes + guess, minlength=num_classes * num_classes)
    return pairs.reshape(num_classes, num_classes).astype(np.float64)


def _classes_json(confusion: FloatArray) -> dict[str, Any]:
    present = confusion.sum(axis=1)
    recalls = np.diag(confusion)[present > 0] / present[present > 0]
    return {
        "n": int(confusion.sum()),
        "accuracy": _ratio(np.trace(confusion), confusion.sum()),
        "balanced_accuracy": float(recalls.mean()) if len(recalls) else None,  # over classes that occur
        "confusion": _counts(confusion),
    }


def _counts(matrix: FloatArray) -> list[list[int]]:
    return [[int(count) for count in row] for row in matrix]


def _ratio(part: float | np.floating[Any], whole: float | np.floating[Any]) -> float | None:
    return float(part) / float(whole) if whole else None


def _most_frequent(classes: IntArray, num_classes: int) -> int | None:
    known = classes[classes >= 0]
    return int(np.bincount(known, minlength=num_classes).argmax()) if len(known) else None

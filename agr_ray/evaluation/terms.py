"""Per-row terms whose sums over rows give the headline metrics."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.labels import IntArray, Labels
from agr_ray.models.predictions import Predictions

WITHIN_YEARS: Final = 5

FloatArray = NDArray[np.float64]


def predicted_gender(p_male: NDArray[np.floating[Any]]) -> IntArray:
    """Return the index in `labels.GENDERS`: male if and only if p_male > 0.5."""
    return (p_male > 0.5).astype(np.int64)


def row_terms(labels: Labels, predictions: Predictions) -> dict[str, FloatArray]:
    """Return the terms of n rows, (n,) each; they are zero if a row has no label or the network has no such head.

    `age` marks rows with an exact age, whose error is `age_absolute` and `age_signed` (years) and lies `age_within`
    5 years. `age_known` marks rows with an exact age or a range; `age_distance` is the distance to it in years.
    `age_grouped` marks those of them that have an age group (`Labels.age_group`): `age_exact_group` says whether it is
    right, and `age_one_off` whether it is right or the next. `TASK` marks rows with that class and `TASK_right` those
    predicted right; `TASK_true_K` and `TASK_right_K` mark the same for true class K.
    """
    none = np.zeros(len(labels), bool)
    low, high = labels.age_range
    known = np.isfinite(low) if "age" in predictions else none
    exact = known & np.isfinite(labels.age)
    low, high = np.where(known, low, 0.0), np.where(known, high, 0.0)
    guess = np.where(known, predictions.get("age", low), 0.0).astype(np.float64)
    group = labels.age_group
    grouped, off = known & (group >= 0), np.abs(labels.space.age_group(guess) - group)
    terms: dict[str, NDArray[Any]] = {
        "age": exact,
        "age_absolute": np.where(exact, np.abs(guess - low), 0.0),
        "age_signed": np.where(exact, guess - low, 0.0),
        "age_within": exact & (np.abs(guess - low) <= WITHIN_YEARS),
        "age_known": known,
        "age_distance": np.maximum(np.maximum(low - guess, guess - high), 0.0),
        "age_grouped": grouped,
        "age_exact_group": grouped & (off == 0),
        "age_one_off": grouped & (off <= 1),
    }
    genders = predicted_gender(predictions["gender"]) if "gender" in predictions else None
    races = predictions["race"].argmax(axis=1) if "race" in predictions else None
    for task, classes, predicted, names in (
        ("gender", labels.gender, genders, labels.space.genders),
        ("race", labels.race, races, labels.space.races),
    ):
        known = none if predicted is None else classes >= 0
        right = none if predicted is None else known & (predicted == classes)
        terms |= {task: known, f"{task}_right": right}
        for k in range(len(names)):
            terms |= {f"{task}_true_{k}": known & (classes == k), f"{task}_right_{k}": right & (classes == k)}
    return {name: values.astype(np.float64) for name, values in terms.items()}


def ratio(part: float | np.floating[Any], whole: float | np.floating[Any]) -> float | None:
    """Return part / whole; None if the whole is 0."""
    return float(part) / float(whole) if whole else None

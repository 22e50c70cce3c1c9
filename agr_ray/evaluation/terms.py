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
    """Return the terms of n rows, (n,) each; 0 for a row without the label, or if the network has no such head.

    All terms are 0 or 1, except those in years:

    - `age`: the row has an exact age; `age_absolute`, `age_signed`: its error (predicted - true), years; `age_within`:
      the error is at most 5 years;
    - `age_known`: the row has an exact age or a range; `age_distance`: distance to it, years;
    - `age_grouped`: the row has an age group (`Labels.age_group`); `age_exact_group`: it is predicted correctly;
      `age_one_off`: the predicted group is correct or next to it;
    - `TASK` (gender, race): the row has a class; `TASK_right`: it is predicted correctly; `TASK_true_K`,
      `TASK_right_K`: the same for rows whose true class is K.
    """
    none = np.zeros(len(labels), bool)
    low, high = labels.age_range
    known = np.isfinite(low) if "age" in predictions else none
    exact = known & np.isfinite(labels.age)
    low, high = np.where(known, low, 0.0), np.where(known, high, 0.0)
    age = np.where(known, predictions.get("age", low), 0.0).astype(np.float64)
    group = labels.age_group
    grouped, off = known & (group >= 0), np.abs(labels.space.age_group(age) - group)
    terms: dict[str, NDArray[Any]] = {
        "age": exact,
        "age_absolute": np.where(exact, np.abs(age - low), 0.0),
        "age_signed": np.where(exact, age - low, 0.0),
        "age_within": exact & (np.abs(age - low) <= WITHIN_YEARS),
        "age_known": known,
        "age_distance": np.maximum(np.maximum(low - age, age - high), 0.0),
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

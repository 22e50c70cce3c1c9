"""Per-row terms whose sums over rows give the headline metrics."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.labels import IntArray, Labels
from agr_ray.models.predictions import Predictions

WITHIN_YEARS: Final = 5

FloatArray = NDArray[np.float64]


TERMS: Final = (
    *("age", "age_absolute", "age_signed", "age_within", "age_grouped", "age_exact_group", "age_one_off"),
    *("gender", "gender_right", "gender_confidence", "race", "race_right", "race_confidence"),
)
"""Names of the terms of `row_terms`."""


def predicted_gender(p_male: NDArray[np.floating[Any]]) -> IntArray:
    """Return the index in `labels.GENDERS`: male if and only if p_male > 0.5."""
    return (p_male > 0.5).astype(np.int64)


def row_terms(labels: Labels, predictions: Predictions) -> dict[str, FloatArray]:
    """Return the terms of n rows, (n,) each; 0 for a row without the label, or if the network has no such head.

    All terms are 0 or 1, except those in years and the confidences:

    - `age`: the row has an exact age; `age_absolute`, `age_signed`: its error (predicted - true), years; `age_within`:
      the error is at most 5 years;
    - `age_grouped`: the row has an age group (`Labels.age_group`); `age_exact_group`: it is predicted correctly;
      `age_one_off`: the predicted group is correct or next to it;
    - `TASK` (gender, race): the row has a class; `TASK_right`: it is predicted correctly; `TASK_confidence`: the
      probability of the predicted class.
    """
    none = np.zeros(len(labels), bool)
    low, _ = labels.age_range
    known = np.isfinite(low) if "age" in predictions else none
    exact = known & np.isfinite(labels.age)
    low = np.where(known, low, 0.0)
    age = np.where(known, predictions.get("age", low), 0.0).astype(np.float64)
    error = np.where(exact, age - low, 0.0)
    group = labels.age_group
    grouped, off = known & (group >= 0), np.abs(labels.space.age_group(age) - group)
    terms: dict[str, NDArray[Any]] = {
        "age": exact,
        "age_absolute": np.abs(error),
        "age_signed": error,
        "age_within": exact & (np.abs(error) <= WITHIN_YEARS),
        "age_grouped": grouped,
        "age_exact_group": grouped & (off == 0),
        "age_one_off": grouped & (off <= 1),
    }
    for task, classes in (("gender", labels.gender), ("race", labels.race)):
        if task in predictions:
            known = classes >= 0
            predicted, confidence = most_likely(task, predictions[task])
            terms |= {
                task: known,
                f"{task}_right": known & (predicted == classes),
                f"{task}_confidence": np.where(known, confidence, 0.0),
            }
        else:
            terms |= {task: none, f"{task}_right": none, f"{task}_confidence": none}
    return {name: terms[name].astype(np.float64) for name in TERMS}


def most_likely(task: str, values: NDArray[np.float32]) -> tuple[IntArray, FloatArray]:
    """Return the predicted class of n rows, and its probability.

    Args:
        task: gender or race.
        values: its predictions, as `Predictions` holds them.
    """
    if task == "gender":
        return predicted_gender(values), np.maximum(values.astype(np.float64), 1.0 - values.astype(np.float64))
    classes = values.argmax(axis=1)
    return classes, np.take_along_axis(values, classes[:, None], axis=1)[:, 0].astype(np.float64)


def ratio(part: float | np.floating[Any], whole: float | np.floating[Any]) -> float | None:
    """Return part / whole; None if the whole is 0."""
    return float(part) / float(whole) if whole else None

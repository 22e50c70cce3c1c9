"""Predictions -> columns of tables. This module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from agr_ray.evaluation.calibration import CalibratedPredictions
from agr_ray.evaluation.terms import predicted_gender
from agr_ray.labels import LabelSpace
from agr_ray.models.predictions import Predictions, class_probs_column
from agr_ray.schema import ATTRIBUTES


def uncalibrated(predictions: Predictions) -> CalibratedPredictions:
    """Return predictions without calibration: there are no intervals and no abstentions."""
    return CalibratedPredictions(
        age=predictions.get("age"),
        age_low=None,
        age_high=None,
        p_male=predictions.get("gender"),
        race_probs=predictions.get("race"),
        abstain_gender=None,
        abstain_race=None,
    )


def attribute_columns(
    predicted: CalibratedPredictions, num_rows: int, space: LabelSpace, attributes: Sequence[str] = ATTRIBUTES
) -> dict[str, pa.Array]:
    """Return the columns of schema.FACE for the chosen attributes that were predicted.

    A NaN becomes null. If a class's probabilities are NaN, the class is null and counts as an abstention.
    """
    columns: dict[str, pa.Array] = {}
    abstained: dict[str, NDArray[np.bool_]] = {}
    if predicted.age is not None and "age" in attributes:
        columns["age"] = pa.array(predicted.age, pa.float32(), from_pandas=True)
        if predicted.age_low is not None:
            columns["age_low"] = pa.array(predicted.age_low, pa.float32(), from_pandas=True)
            columns["age_high"] = pa.array(predicted.age_high, pa.float32(), from_pandas=True)
    if predicted.p_male is not None and "gender" in attributes:
        is_nan = np.asarray(np.isnan(predicted.p_male))
        columns["p_male"] = pa.array(predicted.p_male, pa.float32(), from_pandas=True)
        columns["gender"] = pa.array(np.asarray(space.genders)[predicted_gender(predicted.p_male)], mask=is_nan)
        abstained["gender"] = is_nan if predicted.abstain_gender is None else is_nan | predicted.abstain_gender
    if predicted.race_probs is not None and "race" in attributes:
        columns["race_probs"] = class_probs_column(predicted.race_probs, space.races)
        is_nan = np.asarray(np.isnan(predicted.race_probs).any(axis=1))
        columns["race"] = pa.array(np.asarray(space.races)[predicted.race_probs.argmax(axis=1)], mask=is_nan)
        abstained["race"] = is_nan if predicted.abstain_race is None else is_nan | predicted.abstain_race
    names = [[name for name, chosen in abstained.items() if chosen[row]] for row in range(num_rows)]
    columns["abstain"] = pa.array(names, pa.list_(pa.string()))
    return columns

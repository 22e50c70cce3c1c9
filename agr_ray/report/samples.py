"""A picture of validation faces with their labels and predictions, to see what the model gets wrong."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from agr_ray.evaluation.terms import predicted_gender
from agr_ray.labels import Labels
from agr_ray.models.predictions import Predictions

COLUMNS: Final = 6
_INCHES: Final = 2.2
_FAR_YEARS: Final = 10.0


def samples_page(crops_nhwc: NDArray[np.uint8], labels: Labels, predictions: Predictions) -> NDArray[np.uint8]:
    """Draw a grid of crops, `COLUMNS` wide.

    Above each crop are its labels (`?` if missing) and, on a second line, its predictions. The text is red if the
    gender or the race is wrong, or the age more than 10 years off.

    Args:
        crops_nhwc: (n, s, s, 3) uint8, RGB; at least one.
        labels: of the same rows.
        predictions: of the same rows; a task without a head is left out.

    Returns:
        (height, width, 3) uint8, RGB.
    """
    num_rows = len(crops_nhwc)
    lines = math.ceil(num_rows / COLUMNS)
    figure = Figure(figsize=(COLUMNS * _INCHES, lines * _INCHES * 1.25), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for index, axes in enumerate(figure.subplots(lines, COLUMNS, squeeze=False).flat):
        axes.axis("off")
        if index < num_rows:
            truth, prediction, is_wrong = describe(labels, predictions, index)
            axes.imshow(crops_nhwc[index])
            axes.set_title(f"{truth}\n{prediction}", fontsize=8, color="red" if is_wrong else "black", parse_math=False)
    canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib does not annotate it, nor the next call
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def describe(labels: Labels, predictions: Predictions, index: int) -> tuple[str, str, bool]:
    """Return one row's labels and predictions as text, and whether any prediction is wrong."""
    truth, predicted, is_wrong = [], [], False
    if "age" in predictions:
        low, high = (float(ends[index]) for ends in labels.age_range)
        age = float(predictions["age"][index])
        truth.append("?" if math.isnan(low) else f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}")
        predicted.append(f"{age:.0f}")
        is_wrong |= max(low - age, age - high) > _FAR_YEARS  # False for a missing age, which is NaN
    classes: list[tuple[int, Any, tuple[str, ...]]] = []
    if "gender" in predictions:
        classes.append(
            (
                int(labels.gender[index]),
                predicted_gender(predictions["gender"][index : index + 1])[0],
                labels.space.genders,
            )
        )
    if "race" in predictions:
        classes.append((int(labels.race[index]), predictions["race"][index].argmax(), labels.space.races))
    for code, predicted_code, names in classes:
        truth.append("?" if code < 0 else names[code])
        predicted.append(names[int(predicted_code)])
        is_wrong |= 0 <= code != predicted_code
    return f"label: {', '.join(truth)}", f"model: {', '.join(predicted)}", bool(is_wrong)

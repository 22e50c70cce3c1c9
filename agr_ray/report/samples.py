"""A page of faces with what they are labelled and what the model says, for a look at what it gets wrong."""

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

    Above each: its labels, a `?` for a missing one, and below those the predictions. What is wrong in gender or race,
    or more than 10 years off, makes the text red.

    Args:
        crops_nhwc: (n, s, s, 3) uint8, RGB; n is 1 at least.
        labels: of the same rows.
        predictions: of the same rows; a task without head is left out.

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
            truth, said, is_wrong = describe(labels, predictions, index)
            axes.imshow(crops_nhwc[index])
            axes.set_title(f"{truth}\n{said}", fontsize=8, color="red" if is_wrong else "black")
    canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib leaves both bare
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def describe(labels: Labels, predictions: Predictions, index: int) -> tuple[str, str, bool]:
    """Return one row's labels and predictions in words, and whether any prediction is wrong."""
    truth, said, is_wrong = [], [], False
    if "age" in predictions:
        low, high = (float(ends[index]) for ends in labels.age_range)
        guess = float(predictions["age"][index])
        truth.append("?" if math.isnan(low) else f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}")
        said.append(f"{guess:.0f}")
        is_wrong |= max(low - guess, guess - high) > _FAR_YEARS  # never, of a missing one
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
    for code, guessed, names in classes:
        truth.append("?" if code < 0 else names[code])
        said.append(names[int(guessed)])
        is_wrong |= 0 <= code != guessed
    return f"label: {', '.join(truth)}", f"model: {', '.join(said)}", bool(is_wrong)

"""Sheets of faces that explain a model: Grad-CAM maps, the worst errors of each group, nearest training images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from agr_ray.evaluation.terms import predicted_gender
from agr_ray.labels import Labels
from agr_ray.models.predictions import Predictions

NOTE: Final = "These are faces of people. Do not publish them without their consent."
_INCHES: Final = 1.35
_TEXT_INCHES: Final = 0.34
_HEAT: Final = "inferno"
_MAX_OPACITY: Final = 0.6
_PAIRS_ACROSS: Final = 4


@dataclass(frozen=True)
class Face:
    """One image of a sheet."""

    rgb: NDArray[np.uint8]
    """(side, side, 3)."""
    text: str
    """Printed above it; at most two short lines."""
    heat: NDArray[np.float32] | None = None
    """(side, side), 0 to 1; drawn over a second copy of the image."""


@dataclass(frozen=True)
class Row:
    """Faces side by side under one heading."""

    title: str
    faces: Sequence[Face]


@dataclass(frozen=True)
class Pair:
    """A measured image and the training image that it is most like."""

    measured: Face
    nearest: Face


def faces_sheet(rows: Sequence[Row], title: str, columns: int) -> bytes:
    """Draw rows of faces as PNG, `columns` in a line; a long row is continued on more lines.

    A face with a heat map takes two places, one above the other.
    """
    lines = [
        (row.title if first == 0 else "", row.faces[first : first + columns])
        for row in rows
        for first in range(0, max(len(row.faces), 1), columns)
    ]
    tall = 1 + any(face.heat is not None for _, faces in lines for face in faces)
    height = tall * _INCHES + _TEXT_INCHES
    figure = _figure(title, columns * _INCHES + 1.1, len(lines) * height)
    grid = figure.subplots(tall * len(lines), columns, squeeze=False)
    for axes in grid.flat:
        _hide(axes)
    for number, (heading, faces) in enumerate(lines):
        first_line = grid[tall * number]
        first_line[0].set_ylabel(heading, fontsize=8, rotation=0, ha="right", va="center", labelpad=6, parse_math=False)
        if not faces:
            first_line[0].text(0.5, 0.5, "none", transform=first_line[0].transAxes, ha="center", color="0.5")
        for axes, below, face in zip(first_line, grid[tall * number + tall - 1], faces, strict=False):
            _draw(axes, face)
            if face.heat is not None:
                below.imshow(overlaid(face.rgb, face.heat))
    return _png(figure)


def case_face(
    rgb: NDArray[np.uint8],
    labels: Labels,
    predictions: Predictions,
    task: str,
    row: int,
    heat: NDArray[np.float32] | None = None,
) -> Face:
    """Return one image with its label and its prediction for a task; for gender and race also the probability."""
    value = predictions[task][row]
    if task == "age":
        return Face(rgb, f"label {labels.age[row]:.0f}\nmodel {value:.0f}", heat)
    names = labels.space.genders if task == "gender" else labels.space.races
    truth = int(labels.gender[row] if task == "gender" else labels.race[row])
    if task == "gender":
        code = int(predicted_gender(predictions[task][row : row + 1])[0])
        sure = max(float(value), 1.0 - float(value))
    else:
        code, sure = int(value.argmax()), float(value.max())
    return Face(rgb, f"label {names[truth]}\nmodel {names[code]}, {sure:.0%}", heat)


def pairs_sheet(pairs: Sequence[Pair], title: str) -> bytes:
    """Draw pairs as PNG, the measured image on the left of each."""
    lines = max(1, math.ceil(len(pairs) / _PAIRS_ACROSS))
    figure = _figure(title, _PAIRS_ACROSS * (2 * _INCHES + 0.25), lines * (_INCHES + _TEXT_INCHES + 0.1))
    widths = [1.0, 1.0, 0.15] * _PAIRS_ACROSS
    grid = figure.subplots(lines, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    for axes in grid.flat:
        _hide(axes)
    for number, pair in enumerate(pairs):
        line, place = divmod(number, _PAIRS_ACROSS)
        _draw(grid[line][3 * place], pair.measured)
        _draw(grid[line][3 * place + 1], pair.nearest)
    return _png(figure)


def overlaid(rgb: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the image in grey with its heat map over it, more opaque where it is hotter."""
    colour = np.asarray(colormaps[_HEAT](heat))[..., :3] * 255.0
    grey = rgb.mean(axis=2, keepdims=True)
    opacity = _MAX_OPACITY * heat[..., None]
    return np.asarray(np.rint(grey * (1.0 - opacity) + colour * opacity), np.uint8)


def _figure(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height + 0.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{NOTE}", fontsize=10, parse_math=False)
    return figure


def _draw(axes: Axes, face: Face) -> None:
    axes.imshow(face.rgb)
    axes.set_title(face.text, fontsize=6.5, pad=2, parse_math=False)


def _hide(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _png(figure: Figure) -> bytes:
    body = BytesIO()
    figure.savefig(body, format="png")
    return body.getvalue()

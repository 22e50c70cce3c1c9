"""The learning curves of a training run, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agr_ray.learn.history import best_row

_PANELS: Final = (
    ("Loss", "weighted sum of the tasks", (("train_loss", "training"), ("val_loss", "validation")), 1.0),
    ("Age error on validation", "years from the true age or range", (("val_age_distance_years", "age"),), 1.0),
    (
        "Accuracy on validation",
        "correct, %",
        (("val_gender_accuracy", "gender"), ("val_race_accuracy", "race")),
        100.0,
    ),
    ("Learning rate", "at the end of the epoch", (("lr", "learning rate"),), 1.0),
    ("Training throughput", "samples/s", (("samples_per_s", "all workers"),), 1.0),
    ("Waiting for data", "of the training time, %", (("data_wait_share", "waiting"),), 100.0),
)
"""Title, label of the y axis, columns of schema.HISTORY with their legend labels, and factor of the values."""

_FROM_ZERO: Final = ("lr", "samples_per_s", "data_wait_share")
"""Panels that begin at zero, so that noise does not look like a cliff."""


def curves_png(history: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Draw a run's learning curves.

    Args:
        history: rows of schema.HISTORY, one for each epoch, at least one. A null is a gap in its curve; a panel with
            only nulls says so.
        title: of the picture, such as the run's name.

    Returns:
        A PNG of 1500 x 800 pixels. A dotted line marks the epoch with the best objective, whose checkpoint is kept.
    """
    figure = Figure(figsize=(15, 8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)  # Matplotlib would parse text between dollar signs in a path as math
    epochs = [row["epoch"] for row in history]
    best = best_row(history)
    for axes, (name, unit, columns, factor) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        axes.set(title=name, xlabel="epoch", ylabel=unit)
        drawn = [_draw(axes, epochs, [row[column] for row in history], factor, label) for column, label in columns]
        if any(drawn):
            if best is not None:
                axes.axvline(best["epoch"], color="0.5", linestyle=":", label="best epoch")
            axes.legend()
            if columns[0][0] in _FROM_ZERO:
                axes.set_ylim(bottom=0.0)
        else:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axes: Axes, epochs: Sequence[int], values: Sequence[float | None], factor: float, label: str) -> bool:
    """Draw one curve, with a dot for each epoch unless they are many; return False if it has no values."""
    if all(value is None for value in values):
        return False
    scaled = [float("nan") if value is None else value * factor for value in values]
    axes.plot(epochs, scaled, marker="o" if len(epochs) <= 60 else None, markersize=3, label=label)
    return True

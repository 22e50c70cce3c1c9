"""The axes of a figure: scales, ticks, limits and the legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from agr_ray.report.panel import COLOURS

_LONG_LABEL: Final = 16
_MAX_CATEGORIES: Final = 12
_FAR_ABOVE: Final = 4.0
"""An outlier is this many times farther above the median than the minimum is below it."""


def scale_categories(axes: Axes, ticks: list[str] | None, is_logarithmic: bool) -> None:
    """Scale the x axis of one parameter.

    Args:
        axes: of the figure.
        ticks: names of the categories; None: the parameter is a number.
        is_logarithmic: whether numbers are on a logarithmic scale.
    """
    if ticks is None:
        scale_numbers(axes, axes.xaxis, is_logarithmic)
        return
    shown = range(len(ticks)) if len(ticks) <= _MAX_CATEGORIES else range(0, len(ticks), len(ticks) // _MAX_CATEGORIES)
    is_slanted = sum(len(ticks[place]) + 1 for place in shown) > 30
    axes.set_xticks(
        list(shown),
        [ticks[place] for place in shown],
        rotation=30 if is_slanted else 0,
        ha="right" if is_slanted else "center",
    )
    axes.set_xlim(-0.6, len(ticks) - 0.4)


def scale_numbers(axes: Axes, axis: Any, is_logarithmic: bool) -> None:
    """Put a few plain-text ticks on an axis of numbers."""
    if not is_logarithmic:
        axis.set_major_locator(MaxNLocator(nbins=5))
        return
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0.0 else 1.0
    axis.set_major_locator(
        LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0))
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}".replace("e-0", "e-")))


def data_x_panel_y(axes: Axes) -> Any:
    """Return the transform in which x is in data units and y is a fraction of the panel's height."""
    return axes.get_xaxis_transform()


def fence(values: Sequence[float]) -> float:
    """Return the largest value that is not an outlier, so that one diverged trial does not flatten the others."""
    if not values:
        return math.inf
    low, middle = min(values), float(np.median(values))
    limit = middle + max(_FAR_ABOVE * (middle - low), 0.05 * abs(middle))
    return max(value for value in values if value <= limit)


def note_beyond(axes: Axes, text: str) -> None:
    """Write in the corner how many trials are outside the panel."""
    axes.annotate(text, (1.0, 0.93), xycoords="axes fraction", ha="right", color=COLOURS["ink"], fontsize=8)


def span(low: float, high: float) -> tuple[float, float]:
    """Return limits with a margin on both sides."""
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def add_legend(axes: Axes) -> None:
    """Put the legend above the panel, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderpad=0.2, columnspacing=1.0
        )
        for line in legend.get_lines():
            line.set_alpha(1.0)


def short(text: str, length: int = _LONG_LABEL) -> str:
    """Return text as one line, shortened in the middle if it is long, without characters that XML forbids."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= length else f"{line[: length // 2]}…{line[len(line) - length // 2 + 1 :]}"

"""The charts of all pages: lines with bands, and dots with intervals. Each brings its numbers as a table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from agr_ray.report.figure import COLOURS, SERIES, new_figure
from agr_ray.report.page import Drawing, Table

INTERVAL: Final = "95 % interval"
_WIDTH_INCHES: Final = 4.4
_HEIGHT_INCHES: Final = 2.9
_DOT_INCHES: Final = 0.24
_MAX_NAME: Final = 34
_MAX_TICKS: Final = 12
_MAX_MARKERS: Final = 20
_DASHES: Final = ("-", "--", "-.")
"""Of the first round of colours, and of the next ones."""
_MAX_TICK_NAME: Final = 16
_LABEL_GAP: Final = 0.055
"""Distance between labels of points, as a part of the range of the y axis."""
_SAME_COLUMN: Final = 2.0
"""Points whose x differ by less than this ratio have their labels in one column."""


@dataclass(frozen=True)
class Line:
    """A line of a chart: y over x, with an interval for each point if both ends are given. None is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    is_reference: bool = False
    """Drawn as a thin dotted line, such as a constant baseline."""
    is_points: bool = False
    """Drawn as points only: their order on the x axis has no meaning."""


@dataclass(frozen=True)
class Dot:
    """A row of a chart of dots."""

    name: str
    value: float | None = None
    """None: hidden, or a heading."""
    interval: Sequence[float] | None = None
    note: str = ""
    """Beside its name, such as a number of images."""
    is_heading: bool = False


@dataclass(frozen=True)
class Scale:
    """What an axis shows."""

    label: str
    factor: float = 1.0
    """By which the values are multiplied, such as 100 for per cent."""
    digits: int = 2
    """Decimals of the numbers in the table."""
    from_zero: bool = False
    is_integer: bool = False
    """Ticks are whole numbers."""
    names: Sequence[str] = ()
    """Of the values 0, 1, ... on the axis, in place of numbers."""
    interval_title: str = ""
    """What the intervals of the values are, such as INTERVAL; empty: there are none."""

    def text(self, value: float | None) -> str:
        """Return a value as text; empty if there is none."""
        if value is None:
            return ""
        return self.names[int(value)] if self.names else f"{value * self.factor:.{self.digits}f}"

    def interval_text(self, interval: Sequence[float | None] | None) -> str:
        """Return an interval as text; empty if there is none."""
        if interval is None or None in interval:
            return ""
        return " to ".join(self.text(end) for end in interval)


def line_drawing(
    name: str,
    caption: str,
    lines: Sequence[Line],
    x: Scale,
    y: Scale,
    *,
    marks: Sequence[float] = (),
    width_inches: float = _WIDTH_INCHES,
) -> Drawing:
    """Return a chart of lines.

    Args:
        name: of the drawing.
        caption: below it.
        lines: to draw; a reference line has no marker.
        x: scale.
        y: scale.
        marks: values of x at which there is a thin vertical line.
        width_inches: of the figure.
    """

    def draw() -> Figure:
        figure, axes = new_figure(width_inches, _HEIGHT_INCHES)
        numbers = itertools.count()
        for line in lines:
            _draw_line(axes, line, x, y, None if line.is_reference else next(numbers))
        for mark in marks:
            axes.axvline(mark * x.factor, color=COLOURS["faint"], linewidth=1)
        axes.set(xlabel=x.label, ylabel=y.label)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=y.is_integer))
        if x.names:
            _name_ticks(axes, x.names)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x.is_integer))
        if y.from_zero:
            axes.set_ylim(bottom=0.0)
        add_legend(axes, len(lines))
        return figure

    return Drawing(name, caption, draw, _line_numbers(lines, x, y))


def dot_drawing(
    name: str,
    caption: str,
    dots: Sequence[Dot],
    scale: Scale,
    *,
    reference: float | None = None,
    width_inches: float = _WIDTH_INCHES,
) -> Drawing:
    """Return a chart of one value a row, with intervals.

    Args:
        name: of the drawing.
        caption: below it.
        dots: the rows, the first above.
        scale: of the values.
        reference: at which there is a dotted line, such as the value of all rows together.
        width_inches: of the figure.
    """

    def draw() -> Figure:
        figure, axes = new_figure(width_inches, 0.8 + _DOT_INCHES * max(len(dots), 2))
        axes.grid(visible=False, axis="y")
        names = []
        for place, dot in enumerate(dots):
            names.append(shortened(f"{dot.name}  {dot.note}" if dot.note else dot.name))
            if dot.value is None:
                continue
            if dot.interval is not None:
                ends = [end * scale.factor for end in dot.interval]
                axes.plot(ends, [place, place], color=COLOURS["blue"], linewidth=2, solid_capstyle="butt")
            axes.plot([dot.value * scale.factor], [place], "o", color=COLOURS["blue"])
        if reference is not None:
            axes.axvline(reference * scale.factor, color=COLOURS["quiet"], linestyle=":", linewidth=1.2)
        axes.set_yticks(range(len(dots)), names)
        axes.set_ylim(len(dots) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        for label, dot in zip(axes.get_yticklabels(), dots, strict=True):
            label.set_fontweight("bold" if dot.is_heading else "normal")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(scale.label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        if scale.from_zero:
            axes.set_xlim(left=0.0)
        return figure

    has_intervals = any(dot.interval is not None for dot in dots)
    assert scale.interval_title or not has_intervals
    columns = ("", "", scale.label, *([scale.interval_title] if has_intervals else []))
    rows = [
        (dot.name, dot.note, scale.text(dot.value), *([scale.interval_text(dot.interval)] if has_intervals else []))
        for dot in dots
    ]
    return Drawing(name, caption, draw, Table(columns, rows, num_text_columns=2))


def add_legend(axes: Axes, num_series: int) -> None:
    """Put the legend above the panel, where it covers no data; one series needs none."""
    handles, labels = axes.get_legend_handles_labels()
    if num_series > 1 and handles:
        columns = 1 if max(map(len, labels)) > 28 else 2 if max(map(len, labels)) > 14 else 3
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderpad=0.2)


def scale_logarithmically(axes: Axes, *, is_x: bool) -> None:
    """Give the axis of x, or of y, a logarithmic scale, with a few ticks in plain text. Its values are positive."""
    (axes.set_xscale if is_x else axes.set_yscale)("log")
    axis = axes.xaxis if is_x else axes.yaxis
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 100.0 else f"{value:.3g}".replace("e-0", "e-"))
    )


def label_heights(points: Sequence[tuple[float, float]]) -> list[float]:
    """Return the y of the label beside each point (x, y), so that labels beside nearly the same x do not overlap.

    x is positive, and its axis logarithmic.
    """
    ys = [y for _, y in points]
    gap = _LABEL_GAP * ((max(ys) - min(ys)) or 1.0)
    heights = list(ys)
    by_x = sorted(range(len(points)), key=lambda place: points[place][0])
    columns: list[list[int]] = []
    for before, place in zip([None, *by_x], by_x, strict=False):
        if before is None or points[place][0] > _SAME_COLUMN * points[before][0]:
            columns.append([])
        columns[-1].append(place)
    for column in columns:
        column.sort(key=lambda place: ys[place])
        lowest = -math.inf
        for place in column:
            heights[place] = lowest = max(ys[place], lowest + gap)
        too_high = (heights[column[-1]] - ys[column[-1]]) / 2.0
        for place in column:
            heights[place] -= too_high
    return heights


def shortened(text: str, length: int = _MAX_NAME) -> str:
    """Return text as one line, shortened in the middle if it is long, without characters that XML forbids."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= length else f"{line[: length // 2]}…{line[len(line) - length // 2 + 1 :]}"


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Name some of the values 0, 1, ... of the x axis, as many as fit."""
    step = -(-len(names) // _MAX_TICKS)
    places = range(0, len(names), step)
    shown = [shortened(names[place], _MAX_TICK_NAME) for place in places]
    is_slanted = sum(len(name) + 2 for name in shown) > 60
    axes.set_xticks(list(places), shown, rotation=30 if is_slanted else 0, ha="right" if is_slanted else "center")


def _draw_line(axes: Axes, line: Line, x: Scale, y: Scale, number: int | None) -> None:
    """Draw a line; `number` gives its colour, marker and dashes. None: it is a reference."""
    places = [value * x.factor for value in line.x]
    values, low, high = (
        [float("nan") if value is None else value * y.factor for value in column]
        for column in (line.y, line.low, line.high)
    )
    if number is None:
        axes.plot(places, values, color=COLOURS["quiet"], linestyle=":", linewidth=1.2, label=shortened(line.name))
        return
    again, place = divmod(number, len(SERIES))
    name, marker = SERIES[place]
    colour, dashes = COLOURS[name], _DASHES[min(again, len(_DASHES) - 1)]
    every = max(1, len(places) // _MAX_MARKERS)
    if line.is_points:
        dashes, every = "none", 1
    label = shortened(line.name)
    axes.plot(places, values, linestyle=dashes, color=colour, marker=marker, markevery=every, label=label)
    if low and high:
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)


def _line_numbers(lines: Sequence[Line], x: Scale, y: Scale) -> Table:
    """Return a row for each x, with the columns of every line."""
    columns, cells = [x.label], {value: [x.text(value)] for line in lines for value in line.x}
    for line in lines:
        has_interval = bool(line.low and line.high)
        assert y.interval_title or not has_interval
        columns += [line.name, *([y.interval_title] if has_interval else [])]
        of_x = {value: place for place, value in enumerate(line.x)}
        for value, row in cells.items():
            place = of_x.get(value)
            row.append("" if place is None else y.text(line.y[place]))
            if has_interval:
                row.append("" if place is None else y.interval_text((line.low[place], line.high[place])))
    return Table(columns, [cells[value] for value in sorted(cells)], note=f"Values: {y.label}.")

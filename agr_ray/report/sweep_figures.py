"""The figures of a sweep's page: SVG that takes its colours from the page, so that it suits light, dark and paper."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any, Final, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from agr_ray.report.importance import Importances
from agr_ray.report.trials import (
    ParamValue,
    TrialRow,
    best_so_far,
    finite,
    is_known,
    is_number,
    judged,
    values_of,
)

_Group: TypeAlias = tuple[str, Callable[[TrialRow], bool], dict[str, Any]]
"""Label, which trials it has, and how they are drawn."""

MIN_NEAR: Final = 3.0
"""Trials, weighted by nearness, that a place of the contour must have about it to be filled."""

_COLOURS: Final = {
    "ink": "#010203",
    "faint": "#010204",
    "complete": "#010205",
    "pruned": "#010206",
    "failed": "#010207",
    "unfinished": "#01020b",
    "best": "#010208",
    "reference": "#010209",
    "page": "#01020a",
}
"""Stand-ins, each of which becomes `var(--NAME)` of the page's style sheet."""

_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["ink"],
    "axes.edgecolor": _COLOURS["faint"],
    "xtick.color": _COLOURS["faint"],
    "ytick.color": _COLOURS["faint"],
    "xtick.labelcolor": _COLOURS["ink"],
    "ytick.labelcolor": _COLOURS["ink"],
    "grid.color": _COLOURS["faint"],
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
}
_STATE_WORDS: Final = {"best": "chosen", "pruned": "stopped early", "unfinished": "not finished"}
_WIDTH_INCHES = 3.7
_HEIGHT_INCHES = 2.7
_MAP = "viridis"
_LONG_LABEL = 16
_ABOVE_PANEL = 1.03
_MAX_CATEGORIES = 12
_FEW_NUMBERS = 4
_FAR_ABOVE = 4.0
_START_ABOVE = 3.0


def history_svg(trials: Sequence[TrialRow], name: str) -> str:
    """Draw every trial's objective in the order of trials, and the best so far.

    Args:
        trials: of any state.
        name: of the figure on its page, which makes the ids in it unique.
    """
    with _panel(name) as (axes, done):
        complete, top = judged(trials), _top(judged(trials))
        _dots(axes, [(row.number, row.objective, row) for row in complete])
        pruned = [(row.number, row.objective) for row in trials if row.state == "pruned" and _is_below(row, top)]
        if pruned:
            axes.plot(*zip(*pruned, strict=True), "x", ms=4, mew=1, color=_COLOURS["pruned"], label="stopped early")
        lost = [row.number for row in trials if row.state == "failed"]
        if lost:
            axes.plot(
                lost, [0.02] * len(lost), "|", color=_COLOURS["failed"], transform=_edge(axes), label="failed", ms=7
            )
        steps = best_so_far(trials)
        if steps:
            at = [*(number for number, _ in steps), max(row.number for row in trials)]
            axes.step(
                at,
                [*(value for _, value in steps), steps[-1][1]],
                where="post",
                color=_COLOURS["best"],
                label="best so far",
                lw=1.6,
            )
        _limit(axes, complete, top)
        numbers = [row.number for row in trials]
        axes.set(xlabel="trial", ylabel="objective", xlim=(min(numbers) - 1, max(numbers) + 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _legend(axes)
    return done[0]


def curves_svg(trials: Sequence[TrialRow], best_number: int | None, name: str) -> str:
    """Draw the objective after each epoch of every trial, and where trials were stopped."""
    with _panel(name) as (axes, done):
        begun = [row for row in trials if any(finite(value) is not None for value in row.curve)]
        opacity = float(np.clip(12.0 / max(len(begun), 1), 0.15, 0.7))
        labelled: set[str] = set()
        for row in sorted(begun, key=lambda row: row.number == best_number):
            is_best = row.number == best_number
            kind = "best" if is_best else row.state
            values = [math.nan if value is None or not math.isfinite(value) else value for value in row.curve]
            epochs = range(1, len(values) + 1)
            label = "_" if kind in labelled else _STATE_WORDS.get(kind, kind)
            labelled.add(kind)
            axes.plot(
                epochs,
                values,
                color=_COLOURS[kind],
                alpha=1.0 if is_best else opacity,
                lw=2.0 if is_best else 1.0,
                marker="." if len(values) == 1 else None,
                label=label,
            )
            if row.state in ("pruned", "failed"):
                ends = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
                axes.plot(*ends[-1], "x", ms=4, mew=1, color=_COLOURS[row.state])
        every = [value for row in begun for value in map(finite, row.curve) if value is not None]
        last = [row.objective for row in judged(begun) if row.objective is not None]
        if last:
            axes.set_ylim(*_span(min(every), min(max(every), _START_ABOVE * abs(_fence(last)))))
        axes.set(xlabel="epoch", ylabel="objective")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _legend(axes)
    return done[0]


def importances_svg(found: Importances, name: str) -> str:
    """Draw the shares as bars, with the line that chance reaches."""
    shares = list(found.shares.items())[::-1]
    with _panel(name, height_inches=0.9 + 0.26 * len(shares)) as (axes, done):
        for place, (_, share) in enumerate(shares):
            is_told = share > found.chance
            axes.barh(place, share, height=0.6, color=_COLOURS["complete"] if is_told else _COLOURS["faint"])
            if is_told:
                axes.annotate(f"{share:.2f}", (share, place), (3, 0), textcoords="offset points", va="center")
        axes.axvline(found.chance, color=_COLOURS["ink"], linestyle=":", lw=1)
        axes.annotate("chance", (found.chance, 1.0), (2, 1), xycoords=_edge(axes), textcoords="offset points")
        axes.set_yticks(range(len(shares)), [_short(param, 24) for param, _ in shares])
        axes.set(xlabel="share of the variance of the trials' ranks", xlim=(0.0, 1.08))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    return done[0]


def slice_svg(trials: Sequence[TrialRow], param: str, is_logarithmic: bool, best_number: int | None, name: str) -> str:
    """Draw the objective over the values of one parameter."""
    with _panel(name, width_inches=3.2, height_inches=2.4) as (axes, done):
        having = [row for row in trials if is_known(row, param)]
        complete, top = judged(having), _top(judged(having))
        at, ticks = _axis(having, param)
        _dots(axes, [(at(row), row.objective, row) for row in complete], best_number)
        for state in ("pruned", "failed"):
            lost = [at(row) for row in having if row.state == state]
            if lost:
                axes.plot(
                    lost,
                    [_ABOVE_PANEL] * len(lost),
                    "|",
                    color=_COLOURS[state],
                    transform=_edge(axes),
                    ms=7,
                    clip_on=False,
                )
        _limit(axes, complete, top)
        axes.set_ylabel("objective")
        _scale_x(axes, ticks, is_logarithmic)
        numbers = values_of(having, param)
        if ticks is None and len(numbers) <= _FEW_NUMBERS and len(numbers) < len(having):  # tried again and again
            axes.set_xticks([float(number) for number in numbers], [value_text(number) for number in numbers])
    return done[0]


def contour_svg(
    trials: Sequence[TrialRow],
    pair: tuple[str, str],
    logarithmic: frozenset[str],
    best_number: int | None,
    name: str,
) -> str:
    """Draw the objective over two parameters that are numbers: a dot a trial; filled where trials are near enough."""
    rows = [row for row in judged(trials) if all(is_known(row, param) for param in pair)]
    with _panel(name, height_inches=2.9) as (axes, done):
        points = np.array([[float(row.params[param]) for param in pair] for row in rows]).reshape(-1, 2)
        values = np.array([row.objective for row in rows], np.float64)
        top = _top(rows)
        scale = Normalize(float(values.min()), max(top, float(values.min()) + 1e-9))
        is_log = [param in logarithmic and bool((points[:, axis] > 0).all()) for axis, param in enumerate(pair)]
        filled = smoothed(points, np.minimum(values, top), is_log)
        if filled is not None:
            axes.contourf(*filled, levels=8, cmap=_MAP, norm=scale, alpha=0.55)
        shown = axes.scatter(
            points[:, 0],
            points[:, 1],
            c=values,
            cmap=_MAP,
            norm=scale,
            s=22,
            edgecolors=_COLOURS["ink"],
            linewidths=0.6,
        )
        best = [row.number == best_number for row in rows]
        if any(best):
            axes.scatter(
                points[best, 0], points[best, 1], s=130, facecolors="none", edgecolors=_COLOURS["ink"], linewidths=1.8
            )
        bar = axes.figure.colorbar(shown, ax=axes, label="objective", extend="max" if values.max() > top else "neither")
        bar.outline.set_visible(False)
        axes.set_xlabel(_short(pair[0], 40))
        axes.set_ylabel(_short(pair[1], 28))
        for place, log in enumerate(is_log):
            low, high = float(points[:, place].min()), float(points[:, place].max())
            ends = np.exp(_span(math.log(low), math.log(high))) if log else _span(low, high)
            (axes.set_ylim if place else axes.set_xlim)(*ends)
            _scale(axes, axes.yaxis if place else axes.xaxis, log)
    return done[0]


def smoothed(
    points: NDArray[np.float64], values: NDArray[np.float64], is_log: Sequence[bool], side: int = 72
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Return a grid's x, y and the weighted mean of the values about each place; masked where too few are near.

    The weight falls with distance as a Gaussian whose width is Scott's, of the points scaled to the unit square.

    Args:
        points: (n, 2).
        values: (n,) finite.
        is_log: of x and of y, whether distance is that of logarithms.
        side: places along each axis.

    Returns:
        None where no place has `MIN_NEAR` trials about it, or an axis has one value only.
    """
    scaled = np.stack([np.log(x) if log else x for x, log in zip(points.T, is_log, strict=True)], axis=1)
    low, span = scaled.min(axis=0), np.ptp(scaled, axis=0)
    if (span <= 0.0).any():
        return None
    unit = (scaled - low) / span
    width = max(float(unit.std(axis=0).mean()) * len(unit) ** (-1.0 / 6.0), 0.02)
    places = np.linspace(0.0, 1.0, side)
    grid = np.stack(np.meshgrid(places, places), axis=-1)
    weights = np.exp(-0.5 * ((grid[:, :, None, :] - unit) ** 2).sum(axis=-1) / width**2)
    total = weights.sum(axis=-1)
    if (total >= MIN_NEAR).sum() < 4:
        return None
    mean = np.ma.masked_where(total < MIN_NEAR, (weights @ values) / np.maximum(total, 1e-12))
    axes = [np.exp(low[k] + places * span[k]) if is_log[k] else low[k] + places * span[k] for k in range(2)]
    return axes[0], axes[1], mean


def front_svg(
    trials: Sequence[TrialRow],
    pair: tuple[str, str],
    labels: tuple[str, str],
    best_number: int | None,
    name: str,
) -> str:
    """Draw two errors of the complete trials, with those of the front in the foreground.

    Trials that are far off are beyond the panel, but for the chosen one and the front.
    """
    with _panel(name, width_inches=3.4, height_inches=2.8) as (axes, done):
        rows = [
            row
            for row in trials
            if row.state == "complete" and all(finite(getattr(row, error)) is not None for error in pair)
        ]
        groups: tuple[_Group, ...] = (
            ("dominated", lambda row: row.is_feasible and not row.is_on_front, {"c": _COLOURS["faint"]}),
            (
                "breaks a constraint",
                lambda row: not row.is_feasible,
                {"facecolors": "none", "edgecolors": _COLOURS["failed"]},
            ),
            ("front", lambda row: row.is_on_front, {"c": _COLOURS["complete"], "s": 26}),
            *_ringed(best_number),
        )
        for label, belongs, look in groups:
            points = [[getattr(row, error) for error in pair] for row in rows if belongs(row)]
            if points:
                x, y = np.array(points, np.float64).T
                axes.scatter(x, y, label=label, **{"s": 14, **look})
        points = [[float(getattr(row, error)) for error in pair] for row in rows]
        wanted = [row for row in rows if row.is_on_front or row.number == best_number]
        tops = [
            max([_fence([getattr(row, error) for row in rows]), *(getattr(row, error) for row in wanted)])
            for error in pair
        ]
        if points:
            axes.set_xlim(*_span(min(x for x, _ in points), tops[0]))
            axes.set_ylim(*_span(min(y for _, y in points), tops[1]))
        num_beyond = sum(x > tops[0] or y > tops[1] for x, y in points)
        if num_beyond:
            _say_beyond(axes, f"{num_beyond} beyond")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    return done[0]


@contextmanager
def _panel(
    name: str, width_inches: float = _WIDTH_INCHES, height_inches: float = _HEIGHT_INCHES
) -> Iterator[tuple[Axes, list[str]]]:
    """Give axes to draw on, and a list that holds the SVG afterwards."""
    done: list[str] = []
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        axes.grid(True)
        axes.set_axisbelow(True)
        yield axes, done
        file = StringIO()
        canvas.print_svg(file, metadata={"Date": None})  # type: ignore[no-untyped-call]  # matplotlib leaves it bare
        done.append(_inline(file.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """Make a file into an element of a page: no header or namespaces, ids of its own, colours of the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"\s+xmlns(:\w+)?=\"[^\"]*\"", "", body)
    body = re.sub(r"xlink:href=", "href=", body)
    body = re.sub(r"(<svg[^>]*?)\s+width=\"[^\"]*\"", r"\1", body, count=1)
    body = re.sub(r"(<svg[^>]*?)\s+height=\"[^\"]*\"", r'\1 aria-hidden="true"', body, count=1)
    body = re.sub(r"\bid=\"", f'id="{name}-', body)
    body = re.sub(r"href=\"#", f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    for colour, stand_in in _COLOURS.items():
        body = body.replace(stand_in, f"var(--{colour})")
    return body


def _ringed(best_number: int | None) -> tuple[_Group, ...]:
    """Return the groups that are drawn around other marks."""
    return (
        (
            "paper's weights",
            lambda row: row.is_reference,
            {"facecolors": "none", "edgecolors": _COLOURS["reference"], "marker": "D", "s": 60, "linewidths": 1.6},
        ),
        (
            "chosen",
            lambda row: row.number == best_number,
            {"facecolors": "none", "edgecolors": _COLOURS["best"], "s": 130, "linewidths": 1.8},
        ),
    )


def _dots(axes: Axes, points: Sequence[tuple[float, float | None, TrialRow]], best_number: int | None = None) -> None:
    """Draw complete trials: filled, hollow where a constraint is broken, a diamond for the paper's weights."""
    groups: tuple[_Group, ...] = (
        ("complete", lambda row: row.is_feasible, {"c": _COLOURS["complete"], "s": 14}),
        (
            "breaks a constraint",
            lambda row: not row.is_feasible,
            {"facecolors": "none", "edgecolors": _COLOURS["failed"], "s": 16},
        ),
        *_ringed(best_number),
    )
    for label, belongs, look in groups:
        chosen = [(x, y) for x, y, row in points if belongs(row)]
        if chosen:
            x, y = np.array(chosen, np.float64).T
            axes.scatter(x, y, label=label, **look)


def _axis(rows: Sequence[TrialRow], param: str) -> tuple[Callable[[TrialRow], float], list[str] | None]:
    """Return where a trial is on a parameter's axis, and the names of its places where they are categories."""
    values = values_of(rows, param)
    if is_number(values):
        return lambda row: float(row.params[param]), None
    places = {repr(value): place for place, value in enumerate(values)}

    def at(row: TrialRow) -> float:
        aside = 0.18 * math.sin(2.4 * row.number)  # so that trials of one value do not hide each other
        return places[repr(row.params[param])] + aside

    return at, [_short(value_text(value)) for value in values]


def value_text(value: ParamValue) -> str:
    """Return a parameter's value as the page shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _scale_x(axes: Axes, ticks: list[str] | None, is_logarithmic: bool) -> None:
    if ticks is None:
        _scale(axes, axes.xaxis, is_logarithmic)
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


def _scale(axes: Axes, axis: Any, is_logarithmic: bool) -> None:
    """Put few ticks on an axis of numbers, in words that need no mathematics."""
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


def _edge(axes: Axes) -> Any:
    """Return the transform whose x is the data's and whose y is the share of the panel's height."""
    return axes.get_xaxis_transform()


def _top(rows: Sequence[TrialRow]) -> float:
    """Return how high the axis of objectives goes."""
    return _fence([row.objective for row in rows if row.objective is not None])


def _fence(values: Sequence[float]) -> float:
    """Return the largest value that is not far off, so that one trial that diverged does not flatten the others."""
    if not values:
        return math.inf
    low, middle = min(values), float(np.median(values))
    fence = middle + max(_FAR_ABOVE * (middle - low), 0.05 * abs(middle))
    return max(value for value in values if value <= fence)


def _is_below(row: TrialRow, top: float) -> bool:
    value = finite(row.objective)
    return value is not None and value <= top


def _limit(axes: Axes, rows: Sequence[TrialRow], top: float) -> None:
    """Set the limits of the axis of objectives, and say how many trials are beyond."""
    if not rows:
        return
    values = [row.objective for row in rows if row.objective is not None]
    axes.set_ylim(*_span(min(values), top))
    num_above = sum(value > top for value in values)
    if num_above:
        _say_beyond(axes, f"{num_above} above")


def _say_beyond(axes: Axes, text: str) -> None:
    axes.annotate(text, (1.0, 0.93), xycoords="axes fraction", ha="right", color=_COLOURS["ink"], fontsize=8)


def _span(low: float, high: float) -> tuple[float, float]:
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _legend(axes: Axes) -> None:
    """Put the legend above the panel, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderpad=0.2, columnspacing=1.0
        )
        for line in legend.get_lines():
            line.set_alpha(1.0)


def _short(text: str, length: int = _LONG_LABEL) -> str:
    """Return text on one line, cut in the middle where it is long; without what no XML can hold."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= length else f"{line[: length // 2]}…{line[len(line) - length // 2 + 1 :]}"

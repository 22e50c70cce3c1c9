"""The figures of a sweep's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from agr_ray.report.axis import (
    add_legend,
    data_x_panel_y,
    fence,
    note_beyond,
    scale_categories,
    short,
    span,
)
from agr_ray.report.importance import Importances
from agr_ray.report.panel import COLOURS, panel
from agr_ray.report.trial_rows import (
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
"""Label, a predicate for its trials, and how they are drawn."""

_STATE_WORDS: Final = {"best": "chosen", "pruned": "stopped early", "unfinished": "not finished"}
_ABOVE_PANEL = 1.03
_FEW_NUMBERS = 4
_START_ABOVE = 3.0


def history_svg(trials: Sequence[TrialRow], name: str) -> str:
    """Draw every trial's objective in trial order, and the best so far.

    Args:
        trials: of any state.
        name: of the figure on its page; makes the ids in it unique.
    """
    with panel(name) as (axes, done):
        complete, top = judged(trials), _top(judged(trials))
        _dots(axes, [(row.number, row.objective, row) for row in complete])
        pruned = [(row.number, row.objective) for row in trials if row.state == "pruned" and _is_below(row, top)]
        if pruned:
            axes.plot(*zip(*pruned, strict=True), "x", ms=4, mew=1, color=COLOURS["pruned"], label="stopped early")
        lost = [row.number for row in trials if row.state == "failed"]
        if lost:
            axes.plot(
                lost,
                [0.02] * len(lost),
                "|",
                color=COLOURS["failed"],
                transform=data_x_panel_y(axes),
                label="failed",
                ms=7,
            )
        steps = best_so_far(trials)
        if steps:
            at = [*(number for number, _ in steps), max(row.number for row in trials)]
            axes.step(
                at,
                [*(value for _, value in steps), steps[-1][1]],
                where="post",
                color=COLOURS["best"],
                label="best so far",
                lw=1.6,
            )
        _limit(axes, complete, top)
        numbers = [row.number for row in trials]
        axes.set(xlabel="trial", ylabel="objective", xlim=(min(numbers) - 1, max(numbers) + 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        add_legend(axes)
    return done[0]


def curves_svg(trials: Sequence[TrialRow], best_number: int | None, name: str) -> str:
    """Draw every trial's objective after each epoch, and mark where trials were stopped."""
    with panel(name) as (axes, done):
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
                color=COLOURS[kind],
                alpha=1.0 if is_best else opacity,
                lw=2.0 if is_best else 1.0,
                marker="." if len(values) == 1 else None,
                label=label,
            )
            if row.state in ("pruned", "failed"):
                ends = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
                axes.plot(*ends[-1], "x", ms=4, mew=1, color=COLOURS[row.state])
        every = [value for row in begun for value in map(finite, row.curve) if value is not None]
        last = [row.objective for row in judged(begun) if row.objective is not None]
        if last:
            axes.set_ylim(*span(min(every), min(max(every), _START_ABOVE * abs(fence(last)))))
        axes.set(xlabel="epoch", ylabel="objective")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        add_legend(axes)
    return done[0]


def importances_svg(found: Importances, name: str) -> str:
    """Draw each parameter's share as a bar, with a dotted line at `found.chance`."""
    shares = list(found.shares.items())[::-1]
    with panel(name, height_inches=0.9 + 0.26 * len(shares)) as (axes, done):
        for place, (_, share) in enumerate(shares):
            is_significant = share > found.chance
            axes.barh(place, share, height=0.6, color=COLOURS["complete"] if is_significant else COLOURS["faint"])
            if is_significant:
                axes.annotate(f"{share:.2f}", (share, place), (3, 0), textcoords="offset points", va="center")
        axes.axvline(found.chance, color=COLOURS["ink"], linestyle=":", lw=1)
        axes.annotate("chance", (found.chance, 1.0), (2, 1), xycoords=data_x_panel_y(axes), textcoords="offset points")
        axes.set_yticks(range(len(shares)), [short(param, 24) for param, _ in shares])
        axes.set(xlabel="share of the variance of the trials' ranks", xlim=(0.0, 1.08))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    return done[0]


def slice_svg(trials: Sequence[TrialRow], param: str, is_logarithmic: bool, best_number: int | None, name: str) -> str:
    """Draw the objective over the values of one parameter."""
    with panel(name, width_inches=3.2, height_inches=2.4) as (axes, done):
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
                    color=COLOURS[state],
                    transform=data_x_panel_y(axes),
                    ms=7,
                    clip_on=False,
                )
        _limit(axes, complete, top)
        axes.set_ylabel("objective")
        scale_categories(axes, ticks, is_logarithmic)
        numbers = values_of(having, param)
        if ticks is None and len(numbers) <= _FEW_NUMBERS and len(numbers) < len(having):
            axes.set_xticks([float(number) for number in numbers], [value_text(number) for number in numbers])
    return done[0]


def front_svg(
    trials: Sequence[TrialRow],
    pair: tuple[str, str],
    labels: tuple[str, str],
    best_number: int | None,
    name: str,
) -> str:
    """Draw two errors of the complete trials, with the Pareto front in the foreground.

    Outliers are outside the panel, except the chosen trial and the front.
    """
    with panel(name, width_inches=3.4, height_inches=2.8) as (axes, done):
        rows = [
            row
            for row in trials
            if row.state == "complete" and all(finite(getattr(row, error)) is not None for error in pair)
        ]
        groups: tuple[_Group, ...] = (
            ("dominated", lambda row: row.is_feasible and not row.is_on_front, {"c": COLOURS["faint"]}),
            (
                "violates a constraint",
                lambda row: not row.is_feasible,
                {"facecolors": "none", "edgecolors": COLOURS["failed"]},
            ),
            ("front", lambda row: row.is_on_front, {"c": COLOURS["complete"], "s": 26}),
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
            max([fence([getattr(row, error) for row in rows]), *(getattr(row, error) for row in wanted)])
            for error in pair
        ]
        if points:
            axes.set_xlim(*span(min(x for x, _ in points), tops[0]))
            axes.set_ylim(*span(min(y for _, y in points), tops[1]))
        num_beyond = sum(x > tops[0] or y > tops[1] for x, y in points)
        if num_beyond:
            note_beyond(axes, f"{num_beyond} beyond")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    return done[0]


def _ringed(best_number: int | None) -> tuple[_Group, ...]:
    """Return the groups that are drawn as rings around other marks."""
    return (
        (
            "paper's weights",
            lambda row: row.is_reference,
            {"facecolors": "none", "edgecolors": COLOURS["reference"], "marker": "D", "s": 60, "linewidths": 1.6},
        ),
        (
            "chosen",
            lambda row: row.number == best_number,
            {"facecolors": "none", "edgecolors": COLOURS["best"], "s": 130, "linewidths": 1.8},
        ),
    )


def _dots(axes: Axes, points: Sequence[tuple[float, float | None, TrialRow]], best_number: int | None = None) -> None:
    """Draw complete trials: filled, hollow if they violate a constraint, with a diamond for the paper's weights."""
    groups: tuple[_Group, ...] = (
        ("complete", lambda row: row.is_feasible, {"c": COLOURS["complete"], "s": 14}),
        (
            "violates a constraint",
            lambda row: not row.is_feasible,
            {"facecolors": "none", "edgecolors": COLOURS["failed"], "s": 16},
        ),
        *_ringed(best_number),
    )
    for label, belongs, look in groups:
        chosen = [(x, y) for x, y, row in points if belongs(row)]
        if chosen:
            x, y = np.array(chosen, np.float64).T
            axes.scatter(x, y, label=label, **look)


def _axis(rows: Sequence[TrialRow], param: str) -> tuple[Callable[[TrialRow], float], list[str] | None]:
    """Return a function from trial to position on a parameter's axis, and the names of its categories, if any."""
    values = values_of(rows, param)
    if is_number(values):
        return lambda row: float(row.params[param]), None
    places = {repr(value): place for place, value in enumerate(values)}

    def at(row: TrialRow) -> float:
        jitter = 0.18 * math.sin(2.4 * row.number)  # so that trials with the same value do not cover each other
        return places[repr(row.params[param])] + jitter

    return at, [short(value_text(value)) for value in values]


def value_text(value: ParamValue) -> str:
    """Return a parameter's value as the page shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _top(rows: Sequence[TrialRow]) -> float:
    """Return the upper limit of the axis of objectives."""
    return fence([row.objective for row in rows if row.objective is not None])


def _is_below(row: TrialRow, top: float) -> bool:
    value = finite(row.objective)
    return value is not None and value <= top


def _limit(axes: Axes, rows: Sequence[TrialRow], top: float) -> None:
    """Set the limits of the axis of objectives, and note how many trials are outside."""
    if not rows:
        return
    values = [row.objective for row in rows if row.objective is not None]
    axes.set_ylim(*span(min(values), top))
    num_above = sum(value > top for value in values)
    if num_above:
        note_beyond(axes, f"{num_above} above")

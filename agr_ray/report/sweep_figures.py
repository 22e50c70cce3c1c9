"""The figures of a sweep's page: Optuna's, in the style of all pages, with axes that outliers do not stretch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.style import library
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from optuna.visualization.matplotlib import (
    plot_contour,
    plot_intermediate_values,
    plot_optimization_history,
    plot_pareto_front,
    plot_slice,
)

from agr_ray.config import Scalar
from agr_ray.report.charts import add_legend, scale_logarithmically, shortened
from agr_ray.report.figure import COLOURS
from agr_ray.report.page import Drawing
from agr_ray.report.trial_rows import TrialRow, finite, judged
from agr_ray.report.trial_study import quiet, trial_study

_COLOURS: Final = {"#1f77b4": COLOURS["blue"], "#d62728": COLOURS["red"], "#cccccc": COLOURS["faint"]}
"""Optuna's colours, and ours."""
_LABELS: Final = {
    "objective": "complete",
    "Best Value": "best so far",
    "Best Trial": "on the front",
    "Trial": "dominated",
    "Feasible Trial": "dominated",
    "Infeasible Trial": "violates a constraint",
}
"""Optuna's words in legends, and ours."""
_OF_STATES: Final = {
    "complete": ("blue", "complete"),
    "pruned": ("amber", "stopped early"),
    "unfinished": ("quiet", "not finished"),
}
_SIZE: Final = (4.4, 2.9)
_SMALL: Final = (3.2, 2.4)
_FAR_ABOVE: Final = 4.0
"""An outlier is this many times farther above the median than the minimum is below it."""
_CHOSEN: Final[dict[str, Any]] = {
    "label": "chosen",
    "edgecolors": COLOURS["red"],
    "facecolors": "none",
    "linewidths": 1.8,
    "s": 110,
}
_PAPERS: Final[dict[str, Any]] = {
    "label": "paper's weights",
    "edgecolors": COLOURS["purple"],
    "facecolors": "none",
    "linewidths": 1.6,
    "s": 55,
    "marker": "D",
}
_MAX_CATEGORY: Final = 16


class SweepFigures:
    """The figures of a sweep's trials.

    Args:
        trials: of any state.
        space: of all their parameters.
        best_number: number of the chosen trial; None: there is none.
    """

    def __init__(
        self, trials: Sequence[TrialRow], space: Mapping[str, BaseDistribution], best_number: int | None
    ) -> None:
        self._trials = trials
        self._space = space
        self._best = next((row for row in trials if row.number == best_number), None)
        self._marked = [(row, _CHOSEN) for row in trials if row is self._best]
        self._marked += [(row, _PAPERS) for row in trials if row.is_reference]
        self._study = trial_study(trials, space)
        self.has_curves = any(each.intermediate_values and each.state != TrialState.FAIL for each in self._study.trials)
        """Whether there is anything for `curves` to draw."""
        self._objectives = [row.objective for row in judged(trials) if row.objective is not None]

    def history(self, caption: str) -> Drawing:
        """Return the objective of each complete trial, in trial order, and the best so far."""

        def draw() -> Figure:
            axes = _drawn(lambda: plot_optimization_history(self._study, target_name="objective"), _SIZE)
            _limit(axes, self._objectives)
            axes.set(xlabel="trial", ylabel="objective")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            return _with_legend(axes)

        return Drawing("history", caption, draw)

    def curves(self, caption: str) -> Drawing:
        """Return the objective after each epoch: a line for each trial that did not fail, coloured by its state."""
        rows = {f"Trial{row.number}": row for row in self._trials}  # the labels of Optuna's lines

        def draw() -> Figure:
            axes = _drawn(lambda: plot_intermediate_values(self._study), _SIZE)
            labelled: set[str] = set()
            opacity = float(np.clip(12.0 / len(axes.lines), 0.2, 0.7))
            for line in axes.lines:
                row = rows[str(line.get_label())]
                is_best = row is self._best
                colour, label = ("red", "chosen") if is_best else _OF_STATES[row.state]
                line.set(color=COLOURS[colour], alpha=1.0 if is_best else opacity, linewidth=2.0 if is_best else 1.0)
                line.set(label="_" if label in labelled else label, zorder=3.0 if is_best else 2.0)
                labelled.add(label)
            every = [float(value) for line in axes.lines for value in np.asarray(line.get_ydata())]
            axes.set_ylim(*_span(min(every), _fence(every)))
            axes.set(xlabel="epoch", ylabel="objective")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            return _with_legend(axes)

        return Drawing("curves", caption, draw)

    def slice(self, param: str, name: str, caption: str) -> Drawing:
        """Return the objective of the complete trials over the values of one parameter."""

        def draw() -> Figure:
            axes = _drawn(lambda: plot_slice(self._study, params=[param], target_name="objective"), _SMALL)
            dots = axes.collections[0]
            assert dots.colorbar is not None
            dots.colorbar.remove()  # its colours tell the number of a trial, which the history shows
            dots.set_array(None)
            dots.set(facecolor=COLOURS["blue"], edgecolor="none")
            _limit(axes, self._objectives)
            self._scale(axes, param, is_x=True)
            self._mark(axes, (param,))
            axes.set_ylabel("objective")
            return _figure(axes)

        return Drawing(name, caption, draw)

    def contour(self, pair: tuple[str, str], name: str, caption: str) -> Drawing:
        """Return the objective over two parameters, interpolated between the complete trials."""
        first, second = sorted(pair)  # as Optuna does
        top = _fence(self._objectives)

        def draw() -> Figure:
            axes = _drawn(
                lambda: plot_contour(
                    self._study, params=[first, second], target=lambda t: min(t.values[0], top), target_name="objective"
                ),
                (_SIZE[0], 3.1),
            )
            axes.grid(visible=False)
            for dots in axes.collections:
                if isinstance(dots, PathCollection):
                    dots.set(linewidth=0.6, sizes=[14.0])
            self._scale(axes, first, is_x=True)
            self._scale(axes, second, is_x=False)
            self._mark(axes, (first, second))
            return _figure(axes)

        return Drawing(name, caption, draw)

    def front(self, pair: tuple[str, str], labels: Mapping[str, str], errors: Sequence[str], caption: str) -> Drawing:
        """Return two of the errors of the complete trials, and which are on the Pareto front of all errors."""
        rows = [
            row for row in self._trials if row.state == "complete" and all(_is_finite(getattr(row, e)) for e in errors)
        ]
        places = [errors.index(error) for error in pair]
        names = [labels[error] for error in pair]
        wanted = [row for row in rows if row.is_on_front or row is self._best]

        def draw() -> Figure:
            study = trial_study(self._trials, self._space, errors)
            axes = _drawn(
                lambda: plot_pareto_front(study, target_names=names, targets=lambda t: [t.values[k] for k in places]),
                _SIZE,
            )
            for axis, error in zip("xy", pair, strict=True):
                values = [float(getattr(row, error)) for row in rows]
                top = max([_fence(values), *(getattr(row, error) for row in wanted)])
                axes.set(**{f"{axis}lim": _span(min(values), top)})
            for row, look in self._marked:
                if row in rows:
                    axes.scatter(*([getattr(row, error)] for error in pair), **look)
            return _with_legend(axes)

        return Drawing("front-" + "-".join(pair).replace("_", "-"), caption, draw)

    def _scale(self, axes: Axes, param: str, *, is_x: bool) -> None:
        """Label the axis of a parameter, and give it plain ticks."""
        distribution = self._space[param]
        axis = axes.xaxis if is_x else axes.yaxis
        axis.set_label_text(shortened(param))
        if isinstance(distribution, CategoricalDistribution):
            ticks = [shortened(label.get_text().strip("'\""), _MAX_CATEGORY) for label in axis.get_ticklabels()]
            axis.set_ticks(axis.get_ticklocs(), ticks)
            if is_x and sum(map(len, ticks)) > 24:
                for label in axis.get_ticklabels():
                    label.set(rotation=30, ha="right")
        elif isinstance(distribution, FloatDistribution) and distribution.log:
            scale_logarithmically(axes, is_x=is_x)
        else:
            axis.set_major_locator(MaxNLocator(nbins=5))

    def _mark(self, axes: Axes, params: Sequence[str]) -> None:
        """Ring the chosen trial and those with the paper's weights, over one parameter or two."""
        for row, look in self._marked:
            if row.state != "complete" or finite(row.objective) is None or any(p not in row.params for p in params):
                continue
            places: list[Any] = [
                repr(row.params[p]) if isinstance(self._space[p], CategoricalDistribution) else row.params[p]
                for p in params
            ]
            x, y = places if len(places) == 2 else [*places, row.objective]
            axes.scatter([x], [y], **look)


def value_text(value: Scalar) -> str:
    """Return a parameter's value as the page shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _drawn(plot: Callable[[], Any], size_inches: tuple[float, float]) -> Axes:
    """Return what Optuna draws, in our style and colours, and without its title and legend.

    Optuna sets Matplotlib's style `ggplot` for the whole process, so that style is empty meanwhile. It also leaves its
    figures open in pyplot.
    """
    ggplot, open_figures = library["ggplot"], plt.get_fignums()
    library["ggplot"] = matplotlib.RcParams()
    style: dict[Any, Any] = {"figure.figsize": size_inches, "figure.constrained_layout.use": True, "axes.grid": True}
    try:
        with matplotlib.rc_context(style), quiet():
            axes: Axes = plot()
    finally:
        library["ggplot"] = ggplot
        for number in set(plt.get_fignums()) - set(open_figures):
            plt.close(number)
    axes.set_title("")
    if axes.legend_ is not None:
        axes.legend_.remove()
    for line in axes.lines:
        colour = cast("Any", line.get_color())
        line.set(color=_COLOURS.get(to_hex(colour), colour), alpha=1.0)
    for dots in axes.collections:
        colours = {to_hex(each) for each in np.asarray(dots.get_facecolor())}
        if len(colours) == 1 and colours <= _COLOURS.keys():
            dots.set_color(_COLOURS[colours.pop()])
    for artist in (*axes.lines, *axes.collections):
        artist.set_label(_LABELS.get(str(artist.get_label()), artist.get_label()))
    return axes


def _figure(axes: Axes) -> Figure:
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.set_layout_engine("constrained")
    return figure


def _with_legend(axes: Axes) -> Figure:
    add_legend(axes, 2)
    for handle in axes.legend_.legend_handles if axes.legend_ is not None else []:
        assert handle is not None
        handle.set_alpha(1.0)
    return _figure(axes)


def _limit(axes: Axes, values: Sequence[float]) -> None:
    """Set the limits of the axis of objectives, and note how many trials are outside."""
    top = _fence(values)
    axes.set_ylim(*_span(min(values), top))
    num_above = sum(value > top for value in values)
    if num_above:
        axes.annotate(f"{num_above} above", (1.0, 0.93), xycoords="axes fraction", ha="right", fontsize=8)


def _fence(values: Sequence[float]) -> float:
    """Return the largest value that is not an outlier, so that one diverged trial does not flatten the others."""
    low, middle = min(values), float(np.median(values))
    limit = middle + max(_FAR_ABOVE * (middle - low), 0.05 * abs(middle))
    return max(value for value in values if value <= limit)


def _span(low: float, high: float) -> tuple[float, float]:
    """Return limits with a margin on both sides."""
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _is_finite(value: float | None) -> bool:
    return finite(value) is not None

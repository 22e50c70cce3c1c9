"""The report of a hyperparameter sweep: one self-contained HTML file.

`sweep.html.jinja` is its template; this module decides its text and figures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Final, Literal, get_args

from jinja2 import Environment
from markupsafe import Markup, escape

from agr_ray.report.contour import contour_svg
from agr_ray.report.importance import NUM_SHUFFLES, Importances, importances
from agr_ray.report.page import page_environment
from agr_ray.report.sweep_figures import (
    curves_svg,
    front_svg,
    history_svg,
    importances_svg,
    slice_svg,
    value_text,
)
from agr_ray.report.trial_rows import (
    BaselineErrors,
    ParamValue,
    TrialRow,
    best_so_far,
    finite,
    is_known,
    is_number,
    judged,
    looks_logarithmic,
    measured_errors,
    param_names,
    values_of,
)
from agr_ray.schema import TrialState

__all__ = ["BaselineErrors", "ParamValue", "SweepReport", "TrialRow", "sweep_page"]

_MISSING = "\N{EN DASH}"
_MIN_CONTOUR_TRIALS = 3
_MAX_CONTOURS = 6
_ERROR_LABELS: Final = {
    "age_mae_years": "age MAE, years",
    "gender_error": "gender error",
    "race_error": "race error",
}


@dataclass(frozen=True)
class SweepReport:
    """Everything that the page shows."""

    title: str
    objective_formula: str
    """In words, a sentence or two."""
    mode: Literal["scalar", "pareto"]
    """`scalar`: one objective was minimised; `pareto`: the three errors at once."""
    trials: Sequence[TrialRow]
    best_number: int | None
    """Number of the chosen trial; None: no trial was chosen."""
    recipe_toml: str
    """Contents of best.toml; empty: there is none."""
    constraints: Sequence[str]
    """In words, one string for each constraint."""
    provenance: Mapping[str, str]
    """Names and values, in display order: data, hash of the split, seed, commit, wall time."""
    baseline: BaselineErrors = field(default_factory=BaselineErrors)
    logarithmic: frozenset[str] = frozenset()
    """Parameters that were sampled on a logarithmic scale. Others whose values look logarithmic are drawn so too."""
    loss_weights: tuple[str, ...] = ()
    """Parameters that are loss weights, of which pairs are drawn; empty: those whose names end in `_weight`."""


def sweep_page(report: SweepReport) -> str:
    """Return the page as HTML that loads no other file and needs no network.

    Args:
        report: of any number of trials, including none.

    Raises:
        ValueError: two trials have the same number, or no trial has the number best_number.
    """
    by_number = {row.number: row for row in report.trials}
    if len(by_number) < len(report.trials):
        numbers = [row.number for row in report.trials]
        raise ValueError(f"two trials are number {next(n for n in numbers if numbers.count(n) > 1)}")
    if report.best_number is not None and report.best_number not in by_number:
        raise ValueError(f"best_number is {report.best_number}, but none of the {len(by_number)} trials has it")
    trials = sorted(report.trials, key=lambda row: row.number)
    best = None if report.best_number is None else by_number[report.best_number]
    varied = [name for name in param_names(trials) if len(values_of(trials, name)) > 1]
    logarithmic = frozenset(
        name for name in varied if name in report.logarithmic or looks_logarithmic(values_of(trials, name))
    )
    found = importances(trials, logarithmic)
    page = _environment().get_template("sweep.html.jinja")
    html = page.render(
        report=report,
        counts=_counts(trials),
        verdict=_verdict(trials, best),
        comparison=_comparison(trials, best, report.baseline),
        history=Markup(history_svg(trials, "history")) if judged(trials) else None,
        curves=_curves(trials, report.best_number),
        stopped=_stopped(trials),
        found=found,
        num_shuffles=NUM_SHUFFLES,
        importance=Markup(importances_svg(found, "importance")) if found.shares else None,
        slices=_slices(trials, varied, found, logarithmic, report.best_number),
        held=[(name, values_of(trials, name)[0]) for name in _held(trials)],
        contours=_contours(trials, report, varied, logarithmic),
        trade_offs=_trade_offs(trials, report.best_number),
        front=_front(trials),
        failures=_failures(trials),
        unjudged=[row.number for row in trials if row.state == "complete" and finite(row.objective) is None],
        trials=trials,
        names=param_names(trials),
    )
    return html.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written to a file


def _environment() -> Environment:
    return page_environment(
        {
            "number": _number,
            "percent": _percent,
            "duration": _duration,
            "breakable": _breakable,
            "value": value_text,
            "sort_key": _sort_key,
        }
    )


def _counts(trials: Sequence[TrialRow]) -> dict[str, int]:
    return {state: sum(row.state == state for row in trials) for state in get_args(TrialState)}


def _verdict(trials: Sequence[TrialRow], best: TrialRow | None) -> str:
    """Return the result of the sweep in one or two sentences."""
    if not trials:
        return "No trial was started."
    complete = [row for row in trials if row.state == "complete"]
    if best is None:
        if not complete:
            return "No trial was completed, so none could be chosen."
        if not any(row.is_feasible for row in complete):
            return f"None of the {len(complete)} complete trials satisfies all constraints, so none was chosen."
        return "No trial was chosen."
    value = finite(best.objective)
    verdict = f"Trial {best.number} was chosen" + (f", with an objective of {value:.4f}." if value is not None else ".")
    if not best.is_feasible:
        verdict += " It violates a constraint."
    reference = _reference(trials)
    if reference is None:
        return f"{verdict} The paper's own weights were not among the trials."
    if best.is_reference:
        steps = best_so_far(trials)
        is_best = value is not None and bool(steps) and value <= steps[-1][1]
        return f"{verdict} These are the paper's own weights{': no other trial was better' if is_best else ''}."
    theirs = finite(reference.objective)
    if reference.state != "complete" or theirs is None:
        return f"{verdict} The trial with the paper's own weights was not completed, so they cannot be compared."
    if value is None or theirs <= 0.0:
        return verdict
    share = 100.0 * (value - theirs) / theirs
    word = "lower" if share < 0 else "higher"
    return f"{verdict} That is {abs(share):.1f} % {word} than the {theirs:.4f} of the paper's own weights."


def _reference(trials: Sequence[TrialRow]) -> TrialRow | None:
    """Return the trial with the paper's weights: the best complete one, else any."""
    rows = [row for row in trials if row.is_reference]
    complete = judged(rows)
    if complete:
        return min(complete, key=lambda row: row.objective or 0.0)
    return rows[0] if rows else None


def _comparison(trials: Sequence[TrialRow], best: TrialRow | None, baseline: BaselineErrors) -> list[dict[str, Any]]:
    """Return the rows of the first table: name, trial and figures."""
    names = ("objective", *_ERROR_LABELS, "worst_group_mae_years")
    reference = _reference(trials)
    chosen = [("Chosen", best), ("Paper's own weights", reference if reference is not best else None)]
    rows: list[dict[str, Any]] = [
        {"name": name, "trial": row, **{key: finite(getattr(row, key)) for key in names}}
        for name, row in chosen
        if row is not None
    ]
    if len(rows) == 2 and rows[1]["trial"].state == "complete":
        pairs = {key: (rows[0][key], rows[1][key]) for key in names}
        changes = {key: 100.0 * (a - b) / b if a is not None and b else None for key, (a, b) in pairs.items()}
        rows.append({"name": "Change", "trial": None, **{key: _change(value) for key, value in changes.items()}})
    baselines = {key: finite(getattr(baseline, key, None)) for key in names}
    if any(value is not None for value in baselines.values()):
        rows.append({"name": "Median age, most frequent classes", "trial": None, **baselines})
    return rows


def _change(percent: float | None) -> str:
    return _MISSING if percent is None else f"{percent:+.1f} %"


def _curves(trials: Sequence[TrialRow], best_number: int | None) -> Markup | None:
    if not any(finite(value) is not None for row in trials for value in row.curve):
        return None
    return Markup(curves_svg(trials, best_number, "curves"))


def _stopped(trials: Sequence[TrialRow]) -> dict[str, int] | None:
    """Return how many trials were stopped early, the epochs that they ran, and the epochs of as many full trials."""
    pruned = [row for row in trials if row.state == "pruned"]
    whole = max((row.epochs for row in trials if row.state == "complete"), default=0)
    if not pruned or not whole:
        return None
    return {"num": len(pruned), "ran": sum(row.epochs for row in pruned), "whole": whole * len(pruned)}


def _slices(
    trials: Sequence[TrialRow],
    varied: Sequence[str],
    found: Importances,
    logarithmic: frozenset[str],
    best_number: int | None,
) -> list[dict[str, Any]]:
    """Return a figure for each parameter that varies between complete trials, the most important first."""
    complete = judged(trials)
    order = sorted(varied, key=lambda name: -found.shares.get(name, 0.0))
    slices: list[dict[str, Any]] = []
    for name in order:
        having = [row for row in complete if is_known(row, name)]
        if having:
            svg = slice_svg(trials, name, name in logarithmic, best_number, f"slice-{len(slices)}")
            lacking = len(complete) - len(having)
            slices.append(
                {"name": name, "svg": Markup(svg), "lacking": lacking, "all": len(complete), "log": name in logarithmic}
            )
    return slices


def _held(trials: Sequence[TrialRow]) -> list[str]:
    return [name for name in param_names(trials) if len(values_of(trials, name)) == 1]


def _contours(
    trials: Sequence[TrialRow], report: SweepReport, varied: Sequence[str], logarithmic: frozenset[str]
) -> list[Markup]:
    """Return a figure for each pair of loss weights."""
    weights = report.loss_weights or tuple(name for name in varied if name.endswith("_weight"))
    usable = [name for name in weights if name in varied and is_number(values_of(trials, name))]
    figures: list[Markup] = []
    for pair in combinations(usable, 2):
        having = [row for row in judged(trials) if all(is_known(row, name) for name in pair)]
        if len(having) >= _MIN_CONTOUR_TRIALS:
            name = f"contour-{len(figures)}"
            figures.append(Markup(contour_svg(trials, pair, logarithmic, report.best_number, name)))
    return figures[:_MAX_CONTOURS]


def _trade_offs(trials: Sequence[TrialRow], best_number: int | None) -> list[Markup]:
    """Return a figure for each pair of measured errors."""
    pairs = combinations(measured_errors(trials), 2)
    return [
        Markup(front_svg(trials, pair, (_ERROR_LABELS[pair[0]], _ERROR_LABELS[pair[1]]), best_number, f"front-{place}"))
        for place, pair in enumerate(pairs)
    ]


def _front(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials on the Pareto front, sorted by the first measured error."""
    names = measured_errors(trials)
    rows = [row for row in trials if row.is_on_front]
    return sorted(rows, key=lambda row: [finite(getattr(row, name)) or 0.0 for name in names])


def _failures(trials: Sequence[TrialRow]) -> list[dict[str, Any]]:
    """Return each reason for failure, with the trials that failed for it."""
    reasons: dict[str, list[int]] = {}
    for row in trials:
        if row.state == "failed":
            reasons.setdefault(row.why.strip() or "no reason was recorded", []).append(row.number)
    return [{"why": why, "numbers": numbers} for why, numbers in reasons.items()]


def _number(value: float | str | None, digits: int = 2) -> str:
    if isinstance(value, str):
        return value
    shown = finite(value)
    return _MISSING if shown is None else f"{shown:.{digits}f}"


def _percent(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    shown = finite(value)
    return _MISSING if shown is None else f"{100.0 * shown:.1f} %"


def _duration(seconds: float | None) -> str:
    shown = finite(seconds)
    if shown is None:
        return _MISSING
    if shown < 60.0:
        return f"{shown:.0f} s"
    minutes = round(shown / 60.0)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _breakable(name: str) -> Markup:
    """Allow line breaks after the dots and underscores of a long name."""
    return Markup(re.sub(r"([._/])", r"\1<wbr>", str(escape(name))))


def _sort_key(value: ParamValue | None) -> str:
    """Return a column's sort key, numeric for numbers; empty sorts last."""
    if isinstance(value, bool | str):
        return str(value)
    shown = finite(value)
    return "" if shown is None else repr(shown)

"""The page of a hyperparameter sweep: which trial was chosen, how it compares, and what the search shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final, Literal, get_args

from optuna.distributions import BaseDistribution

from agr_ray.report.charts import Dot, Scale, dot_drawing
from agr_ray.report.importance import NUM_SHUFFLES, importances
from agr_ray.report.page import Block, Cell, Code, Drawing, Drawings, Fold, Page, Paragraph, Section, Table, Values
from agr_ray.report.sweep_figures import SweepFigures, value_text
from agr_ray.report.terms import MEASURED, TRAINED
from agr_ray.report.trial_rows import TrialRow, finite, judged, measured_errors, param_names, values_of
from agr_ray.schema import TrialState

_MISSING: Final = "\N{EN DASH}"
_MIN_CONTOUR_TRIALS: Final = 3
_MAX_CONTOURS: Final = 6
_ERRORS: Final = {
    "age_mae_years": "age MAE, years",
    "gender_error": "gender error",
    "race_error": "race error",
}
_COLUMNS: Final = {"objective": "objective", **_ERRORS, "worst_group_mae_years": "worst group's age MAE, years"}
_STATES: Final = {"complete": "complete", "pruned": "stopped early", "failed": "failed", "unfinished": "not finished"}
_OBJECTIVE: Final = (
    "Objective, lower is better: the error on validation divided by the error of a constant baseline, averaged over "
    "age, gender and race. The error is the mean distance to the true age or age range for age, and 1 - balanced "
    "accuracy for gender and race. The baseline is the median age or the most frequent class of the training images. 1 "
    "is no better than the baseline, 0 is perfect. The objective of a trial is that of its best epoch, whose "
    "checkpoint is kept."
)
_TERMS: Final = {
    "trial": "A training with one combination of values.",
    "stopped early": "After some epochs, the trial was not among the best, so it got no more.",
    "MAE": MEASURED["MAE"],
    "balanced accuracy": MEASURED["balanced accuracy"],
    "epoch": TRAINED["epoch"],
    "Pareto front": "The trials of which no other is better in one error without being worse in another.",
    "fANOVA": "Functional analysis of variance: how much of the variance of the results each parameter explains.",
}


@dataclass(frozen=True)
class SweepReport:
    """Everything that the page shows."""

    title: str
    mode: Literal["scalar", "pareto"]
    """`scalar`: one objective was minimised; `pareto`: the three errors at once."""
    trials: Sequence[TrialRow]
    space: Mapping[str, BaseDistribution]
    """Of all parameters of the trials."""
    best_number: int | None
    """Number of the chosen trial; None: no trial was chosen."""
    recipe_toml: str
    """Contents of best.toml; empty: there is none."""
    constraints: Sequence[str]
    """In words, one string for each constraint."""
    provenance: Mapping[str, str]
    """Names and values, in display order: data, hash of the split, seed, commit, wall time."""
    baseline: Mapping[str, float | None] = field(default_factory=dict)
    """Errors of the constant baseline, by field of a row."""


def sweep_page(report: SweepReport) -> Page:
    """Return the page of any number of trials, including none."""
    trials = sorted(report.trials, key=lambda row: row.number)
    figures = SweepFigures(trials, report.space, report.best_number)
    sections = [
        Section("course", "History of the search", _course(trials, figures)),
        Section("parameters", "Parameters", _parameters(trials, report, figures)),
        Section("weights", "Loss weights", _weights(trials, figures)),
        Section("trade-off", "Trade-off between the tasks", _trade_off(trials, report, figures)),
        Section("failures", "Failures", _failures(trials)),
        Section("trials", "All trials", _all_trials(trials, report.best_number)),
        Section("recipe", "Recipe and provenance", _recipe(report)),
    ]
    return Page(report.title, _lead(trials, report), sections, _TERMS)


def _lead(trials: Sequence[TrialRow], report: SweepReport) -> list[Block]:
    counts = {state: sum(row.state == state for row in trials) for state in get_args(TrialState)}
    best = next((row for row in trials if row.number == report.best_number), None)
    num_trials = "1 trial" if len(trials) == 1 else f"{len(trials)} trials"
    unfinished = f", {counts['unfinished']} not finished" if counts["unfinished"] else ""
    blocks: list[Block] = [
        Paragraph(_verdict(trials, best), "verdict"),
        Paragraph(
            f"{num_trials}: {counts['complete']} complete, {counts['pruned']} stopped early, {counts['failed']} "
            f"failed{unfinished}."
        ),
    ]
    rows = _comparison(trials, best, report.baseline)
    if rows:
        blocks.append(Table(("on validation", *_COLUMNS.values()), rows, is_headline=True))
    blocks.append(Paragraph(_OBJECTIVE))
    if report.mode == "pareto":
        text = "The search minimised the errors in age, gender and race at once; the Pareto front below is its result."
        blocks.append(Paragraph(text))
    if report.constraints:
        blocks.append(Paragraph(f"Constraints: {'; '.join(report.constraints)}."))
    if counts["complete"] > 1 and best is not None:
        text = (
            f"Gender and race errors are 1 - balanced accuracy. The chosen trial is the best of {counts['complete']} "
            "on the same validation photographs, so its figures are optimistic. Evaluate it on the test split."
        )
        blocks.append(Paragraph(text, "note"))
    return blocks


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
        others = [row.objective or 0.0 for row in judged(trials) if row.is_feasible]
        is_best = value is not None and bool(others) and value <= min(others)
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


def _comparison(
    trials: Sequence[TrialRow], best: TrialRow | None, baseline: Mapping[str, float | None]
) -> list[list[str]]:
    """Return the rows of the first table: the chosen trial, the paper's weights, the change, the baseline."""
    reference = _reference(trials)
    chosen = [("Chosen", best), ("Paper's own weights", reference if reference is not best else None)]
    shown = [(name, row) for name, row in chosen if row is not None]
    rows = []
    for name, row in shown:
        state = "" if row.state == "complete" else f" ({_STATES[row.state]})"
        rows.append([f"{name}, trial {row.number}{state}", *(_shown(key, getattr(row, key)) for key in _COLUMNS)])
    if len(shown) == 2 and shown[1][1].state == "complete":
        pairs = [[finite(getattr(row, key)) for _, row in shown] for key in _COLUMNS]
        changes = [100.0 * (own - theirs) / theirs if own is not None and theirs else None for own, theirs in pairs]
        rows.append(["Change", *(_MISSING if change is None else f"{change:+.1f} %" for change in changes)])
    if any(finite(value) is not None for value in baseline.values()):
        rows.append(["Median age, most frequent classes", *(_shown(key, baseline.get(key)) for key in _COLUMNS)])
    return rows


def _course(trials: Sequence[TrialRow], figures: SweepFigures) -> list[Block]:
    drawings: list[Drawing] = []
    blocks: list[Block] = []
    if judged(trials):
        drawings.append(
            figures.history(
                "The objective of each complete trial, in the order in which they were started; grey: it violates a "
                "constraint. “n above” counts trials outside the panel."
            )
        )
    else:
        blocks.append(Paragraph("No complete trial has an objective: there is no history to draw."))
    if figures.has_curves:
        drawings.append(
            figures.curves(f"The objective after each epoch, of trials that did not fail.{_stopped(trials)}")
        )
    else:
        blocks.append(Paragraph("No trial finished an epoch: there are no learning curves."))
    return [*([Drawings(drawings)] if drawings else []), *blocks]


def _stopped(trials: Sequence[TrialRow]) -> str:
    """Return how many epochs early stopping has saved, in words."""
    pruned = [row for row in trials if row.state == "pruned"]
    whole = max((row.epochs for row in trials if row.state == "complete"), default=0) * len(pruned)
    return (
        f" Stopped early: {len(pruned)}, which ran {sum(row.epochs for row in pruned)} of {whole} epochs."
        if whole
        else ""
    )


def _parameters(trials: Sequence[TrialRow], report: SweepReport, figures: SweepFigures) -> list[Block]:
    found = importances(trials, report.space)
    blocks: list[Block] = []
    if found.shares:
        left_out = (
            f" Left out, because not all of these trials have it: {', '.join(found.left_out)}."
            if found.left_out
            else ""
        )
        caption = (
            f"Importance by fANOVA, from {found.compared}: the share of the variance of the trials' ranks that each "
            f"parameter explains by itself. The dotted line is chance: the largest share that any parameter had in "
            f"{NUM_SHUFFLES} shuffles of the objectives among the trials. Shares below it are not significant."
            f"{left_out}"
        )
        dots = [Dot(name, share) for name, share in found.shares.items()]
        scale = Scale("share of the variance", from_zero=True)
        blocks.append(Drawings([dot_drawing("importance", caption, dots, scale, reference=found.chance)]))
    else:
        blocks.append(Paragraph(f"No importances are shown. {found.why_not}"))
    slices = _slices(trials, figures, found.shares)
    if slices:
        text = "The objective over each parameter. A dot is a complete trial; grey: it violates a constraint; ringed:"
        blocks += [Paragraph(f"{text} chosen; diamond: the paper's weights."), Drawings(slices, is_small=True)]
    elif trials:
        blocks.append(Paragraph("No parameter was varied in trials that can be compared."))
    held = {name: values_of(trials, name) for name in param_names(trials)}
    texts = [f"{name} = {value_text(values[0])}" for name, values in held.items() if len(values) == 1]
    return [*blocks, Paragraph(f"Held at one value: {'; '.join(texts)}.", "note")] if texts else blocks


def _slices(trials: Sequence[TrialRow], figures: SweepFigures, shares: Mapping[str, float]) -> list[Drawing]:
    """Return a figure for each parameter that varies between complete trials, the most important first."""
    complete = judged(trials)
    varied = [name for name in param_names(complete) if len(values_of(complete, name)) > 1]
    drawings: list[Drawing] = []
    for name in sorted(varied, key=lambda name: -shares.get(name, 0.0)):
        num_having = sum(name in row.params for row in complete)
        lacking = f": {num_having} of {len(complete)} complete trials have it" if num_having < len(complete) else ""
        drawings.append(figures.slice(name, f"slice-{len(drawings)}", f"{name}{lacking}."))
    return drawings


def _weights(trials: Sequence[TrialRow], figures: SweepFigures) -> list[Block]:
    """Return a figure for each pair of loss weights."""
    complete = judged(trials)
    names = [name for name in param_names(complete) if name.startswith("loss.") and name.endswith("_weight")]
    drawings: list[Drawing] = []
    for pair in combinations(names, 2):
        both = [row for row in complete if all(name in row.params for name in pair)]
        if len(both) >= _MIN_CONTOUR_TRIALS and all(len(values_of(both, name)) > 1 for name in pair):
            drawings.append(figures.contour(pair, f"contour-{len(drawings)}", f"{pair[0]} and {pair[1]}."))
    if not drawings:
        return [Paragraph("Fewer than three complete trials vary two loss weights.")]
    text = (
        "A dot is a complete trial; grey: it violates a constraint; ringed: chosen; diamond: the paper's weights. The "
        "colour is the objective, interpolated between the trials, whatever their other parameters: where there are no "
        "dots, it is a guess."
    )
    return [Drawings(drawings[:_MAX_CONTOURS]), Paragraph(text, "note")]


def _trade_off(trials: Sequence[TrialRow], report: SweepReport, figures: SweepFigures) -> list[Block]:
    names = measured_errors(trials)
    rows = [row for row in trials if row.is_on_front]
    if not rows:
        text = "No complete trial both satisfies all constraints and has measured errors, so there is no front."
        return [Paragraph(text)]
    satisfy = "1 complete trial satisfies" if len(rows) == 1 else f"{len(rows)} complete trials satisfy"
    blocks: list[Block] = [
        Paragraph(
            f"{satisfy} all constraints, and no other trial is better in one error without being worse in another."
        )
    ]
    drawings = [
        figures.front(pair, _ERRORS, names, f"The trials' {_ERRORS[pair[0]]}, and their {_ERRORS[pair[1]]}.")
        for pair in combinations(names, 2)
    ]
    if drawings:
        blocks.append(Drawings(drawings))
    columns = ["objective", *_ERRORS]
    ranked = sorted(rows, key=lambda row: [finite(getattr(row, name)) or 0.0 for name in names])
    table: list[list[str | Cell]] = [
        [str(row.number), _marks(row, report.best_number), *(_cell(key, row) for key in columns)] for row in ranked
    ]
    return [*blocks, Table(("trial", "", *(_COLUMNS[key] for key in columns)), table, num_text_columns=2)]


def _failures(trials: Sequence[TrialRow]) -> list[Block]:
    """Return each reason for failure, with the trials that failed for it."""
    reasons: dict[str, list[int]] = {}
    for row in trials:
        if row.state == "failed":
            reasons.setdefault(row.why.strip() or "no reason was recorded", []).append(row.number)
    blocks: list[Block] = []
    for why, numbers in reasons.items():
        blocks += [Paragraph(f"{'Trial' if len(numbers) == 1 else 'Trials'} {_listed(numbers)}:"), Code(why)]
    unjudged = [row.number for row in trials if row.state == "complete" and finite(row.objective) is None]
    if unjudged:
        text = f"Complete but without a finite objective, and so in no figure: {_listed(unjudged)}."
        blocks.append(Paragraph(text))
    return blocks if reasons else [Paragraph("No trial failed."), *blocks]


def _all_trials(trials: Sequence[TrialRow], best_number: int | None) -> list[Block]:
    if not trials:
        return [Paragraph("There are no trials.")]
    names = param_names(trials)
    columns = ["trial", "state", *_COLUMNS.values(), "constraints", "epochs", "time", *names, "why"]
    rows: list[list[str | Cell]] = []
    for row in trials:
        marks = _marks(row, best_number)
        params = [
            Cell(value_text(row.params[name]), key=_key(row.params[name]))
            if name in row.params
            else Cell(_MISSING, key="")
            for name in names
        ]
        rows.append(
            [
                Cell(str(row.number), key=row.number, is_strong=row.number == best_number),
                _STATES[row.state] + (f", {marks}" if marks else ""),
                *(_cell(key, row) for key in _COLUMNS),
                "satisfied" if row.is_feasible else "violated",
                Cell(str(row.epochs), key=row.epochs),
                Cell(_duration(row.duration_s), key=_key(row.duration_s)),
                *params,
                Cell(row.why if len(row.why) <= 160 else f"{row.why[:157]}...", key=row.why),
            ]
        )
    return [Table(columns, rows, num_text_columns=2, is_sortable=True, last_is_text=True)]


def _recipe(report: SweepReport) -> list[Block]:
    recipe: Block = Paragraph("No trial was chosen, so there is no best.toml.")
    if report.recipe_toml:
        recipe = Fold("best.toml: the chosen trial's recipe, to train it again", [Code(report.recipe_toml)])
    return [recipe, Values(report.provenance)]


def _marks(row: TrialRow, best_number: int | None) -> str:
    marks = {"chosen": row.number == best_number, "paper's weights": row.is_reference}
    return ", ".join(mark for mark, applies in marks.items() if applies)


def _cell(key: str, row: TrialRow) -> Cell:
    value = getattr(row, key)
    return Cell(_shown(key, value), key=_key(value))


def _shown(key: str, value: float | None) -> str:
    """Return a figure of a trial as text: a share in percent, years or an objective."""
    number = finite(value)
    if number is None:
        return _MISSING
    if key in ("gender_error", "race_error"):
        return f"{100.0 * number:.1f} %"
    return f"{number:.4f}" if key == "objective" else f"{number:.2f}"


def _key(value: float | str | bool | None) -> float | str:
    """Return a sort key, numeric for numbers; empty sorts last."""
    if isinstance(value, bool | str):
        return str(value)
    number = finite(value)
    return "" if number is None else number


def _duration(seconds: float | None) -> str:
    shown = finite(seconds)
    if shown is None:
        return _MISSING
    if shown < 60.0:
        return f"{shown:.0f} s"
    minutes = round(shown / 60.0)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))

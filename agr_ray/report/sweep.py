"""The page that a hyper-parameter sweep ends with: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

ParamValue = float | int | str | bool


@dataclass(frozen=True)
class TrialRow:
    """One trial: what was tried and what came of it. What is None or not finite was not measured."""

    number: int
    """Of the trial, in the order in which trials were begun. Unique."""
    state: Literal["complete", "pruned", "failed"]
    why: str
    """Why it was stopped or failed; empty for a complete one."""
    params: Mapping[str, ParamValue]
    """By name. One that this trial did not have, because it depends on another's value, is left out."""
    objective: float | None
    """Lower is better. A pruned trial's is its last, which is not compared with those of complete ones."""
    age_mae_years: float | None
    gender_error: float | None
    """1 - balanced accuracy, a fraction."""
    race_error: float | None
    """1 - balanced accuracy, a fraction."""
    worst_group_mae_years: float | None
    """The mean absolute error of age in the group in which it is largest."""
    epochs: int
    """Finished."""
    duration_s: float
    is_feasible: bool
    """Whether it holds all constraints."""
    curve: Sequence[float | None]
    """The objective after each epoch, from the first on."""
    is_reference: bool = False
    """Whether it has the paper's own weights."""


@dataclass(frozen=True)
class GuessErrors:
    """The errors of the guess that does not look: the median age and the most frequent classes. None: not known."""

    objective: float | None = None
    """What the objective gives for the guess: 1 where it is a mean of ratios to the guess's own errors."""
    age_mae_years: float | None = None
    gender_error: float | None = None
    """1 - balanced accuracy, a fraction: 1/2 for any constant guess between two classes."""
    race_error: float | None = None


@dataclass(frozen=True)
class SweepReport:
    """All that the page shows."""

    title: str
    objective_formula: str
    """In words, a sentence or two."""
    mode: Literal["scalar", "pareto"]
    """Whether one objective was minimised, or the three errors at once."""
    trials: Sequence[TrialRow]
    best_number: int | None
    """Number of the trial that was chosen; None: there is none."""
    recipe_toml: str
    """What best.toml holds; empty: there is none."""
    constraints: Sequence[str]
    """In words, one each."""
    provenance: Mapping[str, str]
    """Name and value, in the order in which they are shown: data, hash of the split, seed, commit, wall time."""
    baseline: GuessErrors = field(default_factory=GuessErrors)
    logarithmic: frozenset[str] = frozenset()
    """Names of the parameters that were sampled on a logarithmic scale."""
    loss_weights: tuple[str, ...] = ()
    """Names of the parameters that are weights of losses, pairs of which are drawn; empty: those called so."""


def sweep_page(report: SweepReport) -> str:
    """Return the page as HTML that loads nothing: no network, no other file.

    Args:
        report: of any number of trials, none included.

    Raises:
        ValueError: two trials have the same number, or best_number is none of theirs.
    """
    raise NotImplementedError(report.title)

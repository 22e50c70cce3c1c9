"""Trials of a hyper-parameter sweep: what a row holds, and what follows from rows alone. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.schema import TrialState

ParamValue = float | int | str | bool

ERRORS: Final = ("age_mae_years", "gender_error", "race_error")
"""The axes of the Pareto front."""

_LOGARITHMIC_SPAN = 20.0
_LOGARITHMIC_MEDIAN = 0.2


@dataclass(frozen=True)
class TrialRow:
    """One trial: what was tried and what came of it. What is None or not finite was not measured."""

    number: int
    """Of the trial, in the order in which trials were begun. Unique."""
    state: TrialState
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
    is_on_front: bool = False
    """Whether no other complete, feasible trial beats it in all errors: learn.trials.front."""


@dataclass(frozen=True)
class GuessErrors:
    """The errors of the guess that does not look: the median age and the most frequent classes. None: not known."""

    objective: float | None = None
    """What the objective gives for the guess: 1 where it is a mean of ratios to the guess's own errors."""
    age_mae_years: float | None = None
    gender_error: float | None = None
    """1 - balanced accuracy, a fraction: 1/2 for any constant guess between two classes."""
    race_error: float | None = None


def finite(value: float | None) -> float | None:
    """Return a value that can be shown, or None for one that is missing, infinite or not a number."""
    return value if value is not None and math.isfinite(value) else None


def objectives(trials: Sequence[TrialRow]) -> NDArray[np.float64]:
    """Return (n,) objectives of trials; NaN: none."""
    return np.array([math.nan if finite(row.objective) is None else row.objective for row in trials], np.float64)


def judged(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials whose objectives may be compared: complete ones that have one."""
    return [row for row in trials if row.state == "complete" and finite(row.objective) is not None]


def best_so_far(trials: Sequence[TrialRow]) -> list[tuple[int, float]]:
    """Return number and objective of every trial that was better than all before it: complete and feasible ones."""
    steps: list[tuple[int, float]] = []
    for row in sorted(judged(trials), key=lambda row: row.number):
        if row.is_feasible and row.objective is not None and (not steps or row.objective < steps[-1][1]):
            steps.append((row.number, row.objective))
    return steps


def measured_errors(trials: Sequence[TrialRow]) -> list[str]:
    """Return those of `ERRORS` that any complete trial has: a model without a head has none of its task's."""
    complete = [row for row in trials if row.state == "complete"]
    return [name for name in ERRORS if any(finite(getattr(row, name)) is not None for row in complete)]


def param_names(trials: Sequence[TrialRow]) -> list[str]:
    """Return the names of all parameters, in the order in which they first occur."""
    return list(dict.fromkeys(name for row in trials for name in row.params))


def values_of(trials: Sequence[TrialRow], name: str) -> list[ParamValue]:
    """Return the distinct values of a parameter that can be shown, numbers in their order."""
    seen = {(type(row.params[name]), row.params[name]) for row in trials if is_known(row, name)}
    values = [value for _, value in seen]
    return sorted(values, key=_order) if is_number(values) else sorted(values, key=str)


def is_known(row: TrialRow, name: str) -> bool:
    """Say whether a trial has a parameter, and its value is not an infinite or undefined number."""
    value = row.params.get(name)
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def is_number(values: Sequence[ParamValue]) -> bool:
    """Say whether values lie on an axis of numbers; bools and words are categories."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def looks_logarithmic(values: Sequence[ParamValue]) -> bool:
    """Guess from distinct values whether they were sampled on a logarithmic scale: wide, and crowded at the low end."""
    if not is_number(values) or len(values) < 3:
        return False
    numbers = np.array(values, np.float64)
    if numbers.min() <= 0.0 or numbers.max() / numbers.min() < _LOGARITHMIC_SPAN:
        return False
    share = (float(np.median(numbers)) - float(numbers.min())) / float(np.ptp(numbers))
    return share < _LOGARITHMIC_MEDIAN


def _order(value: Any) -> float:
    return float(value)

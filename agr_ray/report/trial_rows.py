"""Trials of a hyperparameter sweep as rows, and values derived from rows alone. Pure."""

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
    """One trial: its parameters and results. A value that is None or non-finite was not measured."""

    number: int
    """Number of the trial, in the order in which trials were started. Unique."""
    state: TrialState
    why: str
    """Why it was stopped or failed; empty for a complete one."""
    params: Mapping[str, ParamValue]
    """Values by name. A conditional parameter that this trial did not have is left out."""
    objective: float | None
    """Lower is better. A pruned trial has its last objective, which is not compared with those of complete trials."""
    age_mae_years: float | None
    gender_error: float | None
    """1 - balanced accuracy, a fraction."""
    race_error: float | None
    """1 - balanced accuracy, a fraction."""
    worst_group_mae_years: float | None
    """Mean absolute error of age in the group where it is largest."""
    epochs: int
    """Number of finished epochs."""
    duration_s: float
    is_feasible: bool
    """Whether it satisfies all constraints."""
    curve: Sequence[float | None]
    """The objective after each epoch, from the first on."""
    is_reference: bool = False
    """Whether it has the paper's own weights."""
    is_on_front: bool = False
    """Whether it is on the Pareto front of complete, feasible trials (`tuning.trials.front`)."""


@dataclass(frozen=True)
class BaselineErrors:
    """Errors of the constant baseline: the median age and the most frequent classes. None: unknown."""

    objective: float | None = None
    """The baseline's objective: 1 if the objective is a mean of ratios to the baseline's errors."""
    age_mae_years: float | None = None
    gender_error: float | None = None
    """1 - balanced accuracy, a fraction: 1/2 for any constant prediction of two classes."""
    race_error: float | None = None


def finite(value: float | None) -> float | None:
    """Return the value, or None if it is missing or non-finite."""
    return value if value is not None and math.isfinite(value) else None


def objectives(trials: Sequence[TrialRow]) -> NDArray[np.float64]:
    """Return (n,) objectives; NaN: missing."""
    return np.array([math.nan if finite(row.objective) is None else row.objective for row in trials], np.float64)


def judged(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials whose objectives can be compared: complete ones with a finite objective."""
    return [row for row in trials if row.state == "complete" and finite(row.objective) is not None]


def best_so_far(trials: Sequence[TrialRow]) -> list[tuple[int, float]]:
    """Return the number and objective of each complete, feasible trial that was better than all before it."""
    steps: list[tuple[int, float]] = []
    for row in sorted(judged(trials), key=lambda row: row.number):
        if row.is_feasible and row.objective is not None and (not steps or row.objective < steps[-1][1]):
            steps.append((row.number, row.objective))
    return steps


def measured_errors(trials: Sequence[TrialRow]) -> list[str]:
    """Return those of `ERRORS` that any complete trial has. A model without a head lacks its error."""
    complete = [row for row in trials if row.state == "complete"]
    return [name for name in ERRORS if any(finite(getattr(row, name)) is not None for row in complete)]


def param_names(trials: Sequence[TrialRow]) -> list[str]:
    """Return the names of all parameters, in order of first occurrence."""
    return list(dict.fromkeys(name for row in trials for name in row.params))


def values_of(trials: Sequence[TrialRow], name: str) -> list[ParamValue]:
    """Return the distinct finite values of a parameter, sorted."""
    seen = {(type(row.params[name]), row.params[name]) for row in trials if is_known(row, name)}
    values = [value for _, value in seen]
    return sorted(values, key=_order) if is_number(values) else sorted(values, key=str)


def is_known(row: TrialRow, name: str) -> bool:
    """Return whether a trial has a parameter with a finite value."""
    value = row.params.get(name)
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def is_number(values: Sequence[ParamValue]) -> bool:
    """Return whether all values are numbers; booleans and strings are categories."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def looks_logarithmic(values: Sequence[ParamValue]) -> bool:
    """Guess whether distinct values were sampled on a logarithmic scale: a wide range, crowded at the low end."""
    if not is_number(values) or len(values) < 3:
        return False
    numbers = np.array(values, np.float64)
    if numbers.min() <= 0.0 or numbers.max() / numbers.min() < _LOGARITHMIC_SPAN:
        return False
    share = (float(np.median(numbers)) - float(numbers.min())) / float(np.ptp(numbers))
    return share < _LOGARITHMIC_MEDIAN


def _order(value: Any) -> float:
    return float(value)

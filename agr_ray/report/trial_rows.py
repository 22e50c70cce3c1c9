"""Trials of a hyperparameter sweep as rows, and values derived from rows alone. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agr_ray.config import Scalar
from agr_ray.schema import TrialState

ERRORS: Final = ("age_mae_years", "gender_error", "race_error")
"""The axes of the Pareto front."""


@dataclass(frozen=True)
class TrialRow:
    """One trial: its parameters and results. A value that is None or non-finite was not measured."""

    number: int
    """Number of the trial, in the order in which trials were started. Unique."""
    state: TrialState
    why: str
    """Why it was stopped or failed; empty for a complete one."""
    params: Mapping[str, Scalar]
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


def finite(value: float | None) -> float | None:
    """Return the value, or None if it is missing or non-finite."""
    return value if value is not None and math.isfinite(value) else None


def judged(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials whose objectives can be compared: complete ones with a finite objective."""
    return [row for row in trials if row.state == "complete" and finite(row.objective) is not None]


def measured_errors(trials: Sequence[TrialRow]) -> list[str]:
    """Return those of `ERRORS` that any complete trial has. A model without a head lacks its error."""
    complete = [row for row in trials if row.state == "complete"]
    return [name for name in ERRORS if any(finite(getattr(row, name)) is not None for row in complete)]


def param_names(trials: Sequence[TrialRow]) -> list[str]:
    """Return the names of all parameters, in order of first occurrence."""
    return list(dict.fromkeys(name for row in trials for name in row.params))


def values_of(trials: Sequence[TrialRow], name: str) -> list[Scalar]:
    """Return the distinct values of a parameter."""
    return list(dict.fromkeys(row.params[name] for row in trials if name in row.params))

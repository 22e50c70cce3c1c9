"""Results of a sweep's trials: their records, the best trial, and the table of all.

A trial is judged by the checkpoint that it leaves: by the epoch with the lowest val_objective.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Self

import pyarrow as pa

from agr_ray.config import ParameterConfig, Scalar, TrialError
from agr_ray.schema import TRIALS, TrialState
from agr_ray.storage import Storage

EPOCH_COLUMNS: Final = (
    "epoch",
    "val_objective",
    "val_balanced_objective",
    "val_age_mae_years",
    "val_gender_balanced_accuracy",
    "val_race_balanced_accuracy",
    "val_worst_group_age_mae_years",
    "epoch_s",
)
"""Columns of schema.HISTORY that a record stores for each epoch."""
JUDGED_BY: Final = "val_balanced_objective"
ERROR_TASKS: Final[Mapping[TrialError, str]] = {
    "age_mae_years": "age",
    "gender_error": "gender",
    "race_error": "race",
    "worst_group_age_mae_years": "age",
}
"""Task of each error."""
DIVERGED: Final = "diverged: "
REFUSED: Final = "refused: "
"""Prefixes of `why` for failures that are not retried: a non-finite loss; values that the configuration rejects."""


@dataclass(frozen=True)
class Trial:
    """The record of one trial."""

    number: int
    params: Mapping[str, Scalar]
    """Values by dotted key; a key whose condition does not hold is left out."""
    state: TrialState = "unfinished"
    why: str = ""
    """Reason why it was pruned or failed."""
    epochs: tuple[Mapping[str, Any], ...] = ()
    """`EPOCH_COLUMNS` of each epoch, in order."""
    failures: tuple[str, ...] = ()
    """Reason of each failure: those before retries, and the last."""
    wall_s: float = 0.0
    """Seconds from start to end, summed over retries, including the wait for workers."""

    @property
    def was_refused(self) -> bool:
        """Whether the configuration rejected its values, so it never started."""
        return self.state == "failed" and self.why.startswith(REFUSED)

    @property
    def never_learnt(self) -> bool:
        """Whether it failed before its first epoch, perhaps for an external reason: it may be retried."""
        return self.state == "failed" and not self.epochs and not self.why.startswith((DIVERGED, REFUSED))

    @property
    def kept(self) -> Mapping[str, Any] | None:
        """The epoch whose checkpoint is kept; None: no epoch yet."""
        judged = [row for row in self.epochs if row["val_objective"] is not None]
        return min(judged, key=lambda row: float(row["val_objective"])) if judged else None

    @property
    def objective(self) -> float | None:
        """The sweep's objective at the epoch that is kept."""
        return None if self.kept is None else _finite(self.kept[JUDGED_BY])

    @property
    def curve(self) -> list[float | None]:
        """The sweep's objective after each epoch."""
        return [_finite(row[JUDGED_BY]) for row in self.epochs]

    def error(self, name: TrialError) -> float | None:
        """Return an error at the epoch that is kept: years, or a fraction; None: it was not measured."""
        if self.kept is None:
            return None
        if name == "age_mae_years":
            return _finite(self.kept["val_age_mae_years"])
        if name == "worst_group_age_mae_years":
            return _finite(self.kept["val_worst_group_age_mae_years"])
        accuracy = _finite(self.kept[f"val_{name.removesuffix('_error')}_balanced_accuracy"])
        return None if accuracy is None else 1.0 - accuracy

    def with_epochs(self, rows: Sequence[Mapping[str, Any]]) -> Self:
        """Return the record with further epochs of schema.HISTORY; a repeated epoch replaces the earlier one."""
        by_epoch = {int(row["epoch"]): dict(row) for row in self.epochs}
        by_epoch |= {int(row["epoch"]): {name: row.get(name) for name in EPOCH_COLUMNS} for row in rows}
        return replace(self, epochs=tuple(by_epoch[epoch] for epoch in sorted(by_epoch)))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from the result of `to_json`."""
        return cls(**{**values, "epochs": tuple(values["epochs"]), "failures": tuple(values["failures"])})


def read_trials(storage: Storage, uri: str) -> list[Trial]:
    """Return the records of the trials of the sweep in a folder, by number."""
    records = storage.join(uri, "records")
    files = storage.list(records, (".json",)) if storage.exists(records) else ()
    trials = [Trial.from_json(json.loads(storage.read(info.uri))) for info in files]
    return sorted(trials, key=lambda trial: trial.number)


def excesses(trial: Trial, constraints: Mapping[TrialError, float]) -> dict[str, float]:
    """Return the excess over each limit; 0 or less: satisfied; infinite: the error was not measured."""
    errors = {name: trial.error(name) for name in constraints}
    return {name: math.inf if value is None else value - constraints[name] for name, value in errors.items()}


def is_feasible(trial: Trial, constraints: Mapping[TrialError, float]) -> bool:
    """Return whether the trial satisfies all constraints."""
    return all(excess <= 0.0 for excess in excesses(trial, constraints).values())


def best_trial(trials: Sequence[Trial], constraints: Mapping[TrialError, float]) -> Trial | None:
    """Return the complete trial with the lowest objective, among feasible trials if there are any.

    If none is feasible, return one with the least excess. Ties go to the first. None: no trial is complete.
    """

    def rank(trial: Trial) -> tuple[float, float, int]:
        beyond = sum(max(excess, 0.0) for excess in excesses(trial, constraints).values())
        return beyond, math.inf if trial.objective is None else trial.objective, trial.number

    complete = [trial for trial in trials if trial.state == "complete" and trial.objective is not None]
    return min(complete, key=rank, default=None)


def error_names(tasks: Sequence[str]) -> list[TrialError]:
    """Return the errors that `pareto` minimises: those of the model's tasks."""
    return [name for name, task in ERROR_TASKS.items() if task in tasks and name != "worst_group_age_mae_years"]


def front(trials: Sequence[Trial], constraints: Mapping[TrialError, float], tasks: Sequence[str]) -> list[Trial]:
    """Return the Pareto front of the complete, feasible trials.

    Trials with an error that was not measured are left out.
    """
    names = error_names(tasks)
    candidates: list[tuple[Trial, list[float]]] = []
    for trial in trials:
        errors = [error for error in (trial.error(name) for name in names) if error is not None]
        if trial.state == "complete" and is_feasible(trial, constraints) and len(errors) == len(names):
            candidates.append((trial, errors))
    return [
        trial
        for trial, errors in candidates
        if not any(
            other != errors and all(theirs <= own for theirs, own in zip(other, errors, strict=True))
            for _, other in candidates
        )
    ]


def trials_table(
    trials: Sequence[Trial],
    space: Mapping[str, ParameterConfig],
    constraints: Mapping[TrialError, float],
    tasks: Sequence[str],
) -> pa.Table:
    """Return schema.TRIALS sorted by number, with a column for each searched key."""
    best = best_trial(trials, constraints)
    on_front = {trial.number for trial in front(trials, constraints, tasks)}
    rows = [
        {
            "number": trial.number,
            "state": trial.state,
            "why": trial.why,
            "epochs": len(trial.epochs),
            "best_epoch": None if trial.kept is None else trial.kept["epoch"],
            "objective": trial.objective,
            "age_mae_years": trial.error("age_mae_years"),
            "gender_error": trial.error("gender_error"),
            "race_error": trial.error("race_error"),
            "worst_group_age_mae_years": trial.error("worst_group_age_mae_years"),
            "is_feasible": is_feasible(trial, constraints),
            "is_best": best is not None and trial.number == best.number,
            "is_on_front": trial.number in on_front,
            "num_failures": len(trial.failures),
            "wall_s": trial.wall_s,
        }
        for trial in sorted(trials, key=lambda each: each.number)
    ]
    table = pa.Table.from_pylist(rows, schema=TRIALS)
    for key, parameter in space.items():
        values = [trial.params.get(key) for trial in sorted(trials, key=lambda each: each.number)]
        kind = _column_type(parameter)
        if pa.types.is_string(kind):
            values = [None if value is None else str(value) for value in values]
        table = table.append_column(key, pa.array(values, kind))
    return table


def _column_type(parameter: ParameterConfig) -> pa.DataType:
    """Return the type of a searched key's column; a choice of several types is stored as text."""
    if parameter.choice is None:
        return pa.float64() if parameter.integer is None else pa.int64()
    types = {type(value) for value in parameter.choice}
    arrow = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    if types == {int, float}:
        return pa.float64()
    return arrow.get(next(iter(types)), pa.string()) if len(types) == 1 else pa.string()


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)

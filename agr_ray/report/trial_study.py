"""The trials of a sweep as an Optuna study in memory, for Optuna's figures and importances."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from agr_ray.report.trial_rows import TrialRow, finite

_STATES: Final = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "unfinished": TrialState.RUNNING,
}


def trial_study(
    trials: Sequence[TrialRow], space: Mapping[str, BaseDistribution], errors: Sequence[str] = ("objective",)
) -> optuna.Study:
    """Return a study of which the trials have the same numbers as the rows.

    Args:
        trials: of any state. A complete one that lacks an error becomes a failed one.
        space: of all their parameters.
        errors: fields of a row that are minimised.
    """
    by_number = {row.number: row for row in trials}
    with quiet():
        study = optuna.create_study(directions=["minimize"] * len(errors))
        for number in range(max(by_number, default=-1) + 1):
            row = by_number.get(number)
            study.add_trial(create_trial(state=TrialState.FAIL) if row is None else _frozen(row, space, errors))
    return study


def _frozen(row: TrialRow, space: Mapping[str, BaseDistribution], errors: Sequence[str]) -> FrozenTrial:
    values = [value for value in (finite(getattr(row, name)) for name in errors) if value is not None]
    is_measured = row.state == "complete" and len(values) == len(errors)
    return create_trial(
        state=TrialState.FAIL if row.state == "complete" and not is_measured else _STATES[row.state],
        values=values if is_measured else None,
        params=dict(row.params),
        distributions={name: space[name] for name in row.params},
        intermediate_values={
            epoch: value for epoch, value in enumerate(map(finite, row.curve), 1) if value is not None
        },
        constraints={"constraints": 0.0 if row.is_feasible else 1.0},
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's messages about a study in memory, and its warnings of experimental functions."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)

"""How much each parameter of a sweep mattered, where the trials are enough to tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator
from scipy.stats import rankdata

from agr_ray.report.trials import TrialRow, finite, is_known, is_number, judged, objectives, param_names, values_of

MIN_TRIALS: Final = 20
"""Fewer say nothing about importance."""

NUM_SHUFFLES: Final = 19
"""Of the objectives among the trials. What is larger than in all of them would be so by chance 1 time in 20."""

_NUM_TREES = 16
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Importances:
    """What can be said of the parameters' importances."""

    shares: Mapping[str, float]
    """Share of the variance of the trials' ranks that a parameter alone explains (fANOVA), largest first; empty:
    `why_not`. Ranks, as the objective of one trial that diverged would be most of the variance of all."""
    chance: float
    """The largest share that any parameter has when the objectives are shuffled among the trials."""
    compared: str
    """What was compared, in words."""
    why_not: str
    """Why there are no shares; empty if there are."""
    left_out: tuple[str, ...] = ()
    """Parameters that vary and that some of the compared trials do not have."""


def importances(trials: Sequence[TrialRow], logarithmic: frozenset[str] = frozenset(), seed: int = 0) -> Importances:
    """Return the share of variance of each parameter, with what shuffled objectives give beside it.

    Complete trials are compared by their objectives. Where early stopping leaves too few, all that were not failed are
    compared after the last epoch that each of them reached.

    Args:
        trials: of any state.
        logarithmic: names of the parameters on a logarithmic scale.
        seed: of the forest and of the shuffles.
    """
    rows, values, compared = _comparable(trials)
    if len(rows) < MIN_TRIALS:
        return _none(f"Too few trials: {len(rows)} can be compared, and {MIN_TRIALS} are the least that says anything.")
    if np.ptp(values) == 0.0:
        return _none("All trials have the same objective.")
    varied = [name for name in param_names(rows) if len(values_of(rows, name)) > 1]
    spaces = {
        name: _distribution(rows, name, name in logarithmic)
        for name in varied
        if all(is_known(row, name) for row in rows)
    }
    left_out = tuple(name for name in varied if name not in spaces)
    if len(spaces) < 2:
        return _none("Fewer than two parameters were varied in all trials, so that there is nothing to share out.")
    ranks = rankdata(values)
    shares = _shares(rows, ranks, spaces, seed)
    rng = np.random.default_rng(seed)
    chance = max(max(_shares(rows, rng.permutation(ranks), spaces, seed).values()) for _ in range(NUM_SHUFFLES))
    if max(shares.values()) <= chance:
        return _none(
            f"From {compared}, no parameter can be told from chance: shuffling the objectives among the trials gives "
            f"some parameter as large a share."
        )
    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    return Importances(ordered, chance, compared, "", left_out)


def _none(why_not: str) -> Importances:
    return Importances({}, 0.0, "", why_not)


def _comparable(trials: Sequence[TrialRow]) -> tuple[list[TrialRow], NDArray[np.float64], str]:
    """Return trials, a value of each, and what that is in words."""
    rows = judged(trials)
    begun = [row for row in trials if row.state in ("complete", "pruned") and len(row.curve)]
    if len(rows) < MIN_TRIALS <= len(begun):
        epoch = min(len(row.curve) for row in begun)
        pairs = [(row, finite(row.curve[epoch - 1])) for row in begun]
        early = [(row, value) for row, value in pairs if value is not None]
        if len(early) >= MIN_TRIALS:
            told = f"the objectives of {len(early)} trials after epoch {epoch}, the last that all of them reached"
            return [row for row, _ in early], np.array([value for _, value in early], np.float64), told
    picked = ", which early stopping had picked out" if any(row.state == "pruned" for row in trials) else ""
    return rows, objectives(rows), f"the final objectives of {len(rows)} complete trials{picked}"


def _distribution(rows: Sequence[TrialRow], name: str, is_logarithmic: bool) -> BaseDistribution:
    """Return the smallest space that holds all values."""
    values = values_of(rows, name)
    if not is_number(values):
        return CategoricalDistribution([repr(value) for value in values])
    numbers: list[Any] = list(values)
    log = is_logarithmic and min(numbers) > 0
    if all(isinstance(value, int) for value in values):
        return IntDistribution(min(numbers), max(numbers), log=log)
    return FloatDistribution(min(numbers), max(numbers), log=log)


def _shares(
    rows: Sequence[TrialRow], values: NDArray[np.float64], spaces: dict[str, BaseDistribution], seed: int
) -> dict[str, float]:
    """Rebuild the study in memory and ask Optuna."""
    with _quiet():
        study = optuna.create_study()
        study.add_trials(
            [
                optuna.create_trial(
                    params={name: _cast(row.params[name], space) for name, space in spaces.items()},
                    distributions=spaces,
                    value=float(value),
                )
                for row, value in zip(rows, values, strict=True)
            ]
        )
        forest = FanovaImportanceEvaluator(n_trees=_NUM_TREES, max_depth=_MAX_DEPTH, seed=seed)
        found = forest.evaluate(study, params=list(spaces))
    return {name: float(share) for name, share in found.items()}


def _cast(value: Any, space: BaseDistribution) -> Any:
    if isinstance(space, CategoricalDistribution):
        return repr(value)  # so that 1 and True are two
    return float(value) if isinstance(space, FloatDistribution) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from announcing studies that nobody asked for."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)

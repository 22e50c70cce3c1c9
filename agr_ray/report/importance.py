"""Importance of each parameter of a sweep, if there are enough trials to tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.importance import FanovaImportanceEvaluator
from scipy.stats import rankdata

from agr_ray.report.trial_rows import TrialRow, finite, judged, param_names, values_of
from agr_ray.report.trial_study import quiet, trial_study

MIN_TRIALS: Final = 20
"""Fewer trials say nothing about importance."""

NUM_SHUFFLES: Final = 19
"""Times that the objectives are shuffled among the trials. A share above all shuffled ones has p = 1/20."""

_NUM_TREES = 16
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Importances:
    """Importance of the parameters, or why it is unknown."""

    shares: Mapping[str, float]
    """Share of the variance of the trials' ranks that each parameter explains by itself (fANOVA), largest first; empty:
    see `why_not`. Ranks, because one diverged trial would otherwise dominate the variance."""
    chance: float
    """The largest share of any parameter when the objectives are shuffled among the trials."""
    compared: str
    """Which objectives were compared, in words."""
    why_not: str
    """Why there are no shares; empty if there are."""
    left_out: tuple[str, ...] = ()
    """Parameters that vary but are missing from some of the compared trials."""


def importances(trials: Sequence[TrialRow], space: Mapping[str, BaseDistribution], seed: int = 0) -> Importances:
    """Return each parameter's share of the variance, and the largest share that chance gives.

    Complete trials are compared by their final objectives. If early stopping leaves too few, complete and pruned trials
    are compared after the last epoch that all of them reached.

    Args:
        trials: of any state.
        space: of all their parameters.
        seed: of the random forest and the shuffles.
    """
    rows, values, compared = _comparable(trials)
    if len(rows) < MIN_TRIALS:
        return _none(f"Too few trials: {len(rows)} can be compared, but at least {MIN_TRIALS} are needed.")
    if np.ptp(values) == 0.0:
        return _none("All trials have the same objective.")
    varied = [name for name in param_names(rows) if len(values_of(rows, name)) > 1]
    names = [name for name in varied if all(name in row.params for row in rows)]
    left_out = tuple(name for name in varied if name not in names)
    if len(names) < 2:
        return _none("Fewer than two parameters were varied in all trials.")
    ranks = rankdata(values)
    shares = _shares(rows, ranks, space, names, seed)
    rng = np.random.default_rng(seed)
    chance = max(max(_shares(rows, rng.permutation(ranks), space, names, seed).values()) for _ in range(NUM_SHUFFLES))
    if max(shares.values()) <= chance:
        return _none(
            f"From {compared}, no parameter stands out from chance: shuffling the objectives among the trials gives "
            f"some parameter as large a share."
        )
    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    return Importances(ordered, chance, compared, "", left_out)


def _none(why_not: str) -> Importances:
    return Importances({}, 0.0, "", why_not)


def _comparable(trials: Sequence[TrialRow]) -> tuple[list[TrialRow], NDArray[np.float64], str]:
    """Return the trials to compare, a value for each, and a description of the values."""
    rows = judged(trials)
    begun = [row for row in trials if row.state in ("complete", "pruned") and len(row.curve)]
    if len(rows) < MIN_TRIALS <= len(begun):
        epoch = min(len(row.curve) for row in begun)
        pairs = [(row, finite(row.curve[epoch - 1])) for row in begun]
        early = [(row, value) for row, value in pairs if value is not None]
        if len(early) >= MIN_TRIALS:
            described = f"the objectives of {len(early)} trials after epoch {epoch}, the last that all of them reached"
            return [row for row, _ in early], np.array([value for _, value in early], np.float64), described
    selected = ", which early stopping had selected" if any(row.state == "pruned" for row in trials) else ""
    values = np.array([row.objective for row in rows], np.float64)
    return rows, values, f"the final objectives of {len(rows)} complete trials{selected}"


def _shares(
    rows: Sequence[TrialRow],
    values: NDArray[np.float64],
    space: Mapping[str, BaseDistribution],
    names: Sequence[str],
    seed: int,
) -> dict[str, float]:
    compared = [
        replace(row, number=place, state="complete", objective=value, curve=())
        for place, (row, value) in enumerate(zip(rows, values.tolist(), strict=True))
    ]
    with quiet():
        forest = FanovaImportanceEvaluator(n_trees=_NUM_TREES, max_depth=_MAX_DEPTH, seed=seed)
        found = forest.evaluate(trial_study(compared, space), params=list(names))
    return {name: float(share) for name, share in found.items()}

"""Faces with the predictions of a network whose errors are like those of `utkface_lite` on UTKFace (docs/results.md).

What the network sees of a face depends only on the true age, gender or race, with one exception: gender is harder to
tell of children. Its outputs follow from that by Bayes' rule, with the shares of its training images, and its logits
are 1.5 times too large.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax

from agr_ray.labels import AGE_MAX_YEARS, UTKFACE, Labels
from agr_ray.models.predictions import Predictions

AGE_GROUP_SHARES: Final = np.array([0.137, 0.068, 0.330, 0.183, 0.086, 0.096, 0.050, 0.027, 0.023])
"""Of UTKFace's development part, as of the races."""
RACE_SHARES: Final = np.array([0.426, 0.189, 0.145, 0.167, 0.073])

_LAST_YEAR: Final = 96
_RACE_DISTANCES: Final = np.array([2.2, 2.5, 2.8, 2.2, 1.3])
_OVERCONFIDENCE: Final = 1.5
_YEARS: Final = np.arange(AGE_MAX_YEARS + 1)


def simulated_faces(num: int, seed: int) -> tuple[Labels, Predictions]:
    """Draw labels and uncalibrated predictions, `age_spread` included, of so many faces."""
    rng = np.random.default_rng(seed)
    spans = np.array(UTKFACE.age_ranges_years, np.float64)
    spans[-1, 1] = _LAST_YEAR
    group = rng.choice(len(spans), num, p=AGE_GROUP_SHARES)
    age = np.floor(rng.uniform(spans[group, 0], spans[group, 1] + 1))
    gender, race = rng.integers(0, 2, num), rng.choice(len(RACE_SHARES), num, p=RACE_SHARES)
    labels = Labels(UTKFACE, age.astype(np.float32), gender, race)
    distribution = _age_distribution(age, rng, spans)
    mean = distribution @ _YEARS
    spread = np.sqrt((distribution * (_YEARS - mean[:, None]) ** 2).sum(axis=1))
    seen = rng.normal(np.where(gender == 1, 1.0, -1.0), np.where(age < 15, 1.1, 0.62))
    evidence = rng.normal(0.0, 1.0, (num, len(RACE_SHARES)))
    evidence[np.arange(num), race] += _RACE_DISTANCES[race]
    logits = evidence * _RACE_DISTANCES - _RACE_DISTANCES**2 / 2 + np.log(RACE_SHARES)
    return labels, {
        "age": mean.astype(np.float32),
        "age_spread": spread.astype(np.float32),
        "gender": expit(_OVERCONFIDENCE * 2.0 * seen / 0.7**2).astype(np.float32),
        "race": softmax(_OVERCONFIDENCE * logits, axis=1).astype(np.float32),
    }


def _age_distribution(
    age: NDArray[np.float64], rng: np.random.Generator, spans: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the predicted probability of each year, (n, years)."""
    density = np.full(len(_YEARS), 1e-6)
    for share, (low, high) in zip(AGE_GROUP_SHARES, spans, strict=True):
        density[int(low) : int(high) + 1] += share / (high - low + 1)
    error = _error_years(_YEARS)
    difficulty = np.exp(rng.normal(0.0, 0.4, len(age)))
    seen = age + rng.normal(0.0, _error_years(age) * difficulty)
    scale = error * difficulty[:, None]
    log_likelihood = -0.5 * ((seen[:, None] - _YEARS) / scale) ** 2 - np.log(scale)
    return np.exp(log_softmax(log_likelihood + np.log(density), axis=1))


def _error_years(age: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard deviation of what the network sees of a face of medium difficulty, years."""
    return 1.5 + 7.5 * (1.0 - np.exp(-age / 30.0))

"""Estimate the true shares of classes from a classifier's outcomes and its confusion matrix on labelled images.

The outcomes are the classes and, last, "abstained"; for several attributes together, all combinations of these. M[c, o]
is the share of class c with outcome o, so the outcomes' shares are sum_c share[c] M[c, o]. M comes from the calibration
images, whose own mixture of classes does not matter. It is assumed to be the same for the scored images (label shift).

Estimate: maximum likelihood on the simplex by EM (Saerens, Latinne and Decaestecker 2002, Neural Computation 14(1),
with hard outcomes). Interval: bootstrap over calibration images (within their class) and over faces, of the estimate
without the simplex constraint, share = outcomes M^+, clipped to [0, 1]. Percentiles of the EM estimates themselves
cover too seldom at the simplex's border, where the estimates pile up.

Coverage of the intervals of single attributes and of gender and race together, over 200 simulated mixtures each of 30,
300 and 3,000 faces, with 2,800 calibration images: 89 to 97 %. The table of all three attributes: 99, 95 and 82 %, as
gender is harder to tell of children there, and errors are taken to be independent of age
(`benchmarks/shares.py --simulated 2800 --rounds 10 --mixtures 20 --faces 30 300 3000 --strengths 1 --counts-only`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

INTERVAL: Final = 0.90
"""Nominal coverage. The interval is for the mixture from which the faces are a random sample."""

PERCENTILES: Final = (4.0, 96.0)
"""Of the bootstrap. In the same simulation, 5 and 95 cover 88 to 92 % (gender), 87 to 91 % (race) and 91 to 94 % (age
group); these cover 90 to 93 %, 89 to 92 % and 92 to 96 %, and make the intervals 5 to 11 % wider."""

MIN_CALIBRATION_ROWS: Final = 20
"""Fewest calibration images of a class for its row of M to be used. With 20 each, intervals cover 88 % (five races)."""

MAX_CONDITION: Final = 30.0
"""Largest condition number of M with which shares are corrected; it amplifies noise by up to this factor. The condition
number of several matrices together is the product of theirs.

Simulation with nine age groups and 2,800 calibration images, for 1,000 and for 300 faces:

| condition number | mean error, corrected / raw (1,000) | (300) | width of intervals (1,000; 300) |
| --- | --- | --- | --- |
| 6 to 10 | 0.027 / 0.038 | 0.036 / 0.040 | 0.14; 0.20 |
| 20 to 30 | 0.039 / 0.046 | 0.048 / 0.048 | 0.57; 0.65 |
| over 30 | 0.041 / 0.048 | 0.051 / 0.047 | - |

Intervals cover the truth in 90 % of cases, and more often at higher numbers. With nine age groups jointly with ten
other classes (5,000 faces), the error of corrected shares relative to raw ones is 0.4 to 0.9 up to a product of 30,
about 1 at 70, and 1.3 at 400 (20 times 20)."""

NUM_RESAMPLES: Final = 300
"""Of the bootstrap."""

SMOOTHING: Final = 0.5
"""Images added to each class's row of M, spread evenly, so that no outcome is impossible; 20 images outweigh it."""

_MAX_STEPS = 2000
_TOLERANCE = 1e-6
_CHUNK_VALUES = 4_000_000


class Shares(NamedTuple):
    """Estimates for g groups and c classes."""

    share: FloatArray
    """(g, c); rows add up to 1. All three are NaN for a group without faces."""
    low: FloatArray
    """(g, c): lower end of the interval, which contains the share."""
    high: FloatArray
    """(g, c): upper end."""


def confusion_counts(truth: Sequence[IntArray], outcome: Sequence[IntArray], sizes: Sequence[int]) -> IntArray:
    """Count calibration images by class and outcome, of one attribute or of several together.

    Args:
        truth: (n,) true classes of each attribute; an image with a missing one (-1) is left out.
        outcome: (n,) predicted classes of each attribute; -1: abstained.
        sizes: number of classes of each attribute.

    Returns:
        (c, o) counts. c runs over the combinations of classes, o over those of classes and, last, "abstained"; the
        first attribute varies slowest.
    """
    known = np.all(np.stack(truth) >= 0, axis=0)
    outcome_sizes = [size + 1 for size in sizes]
    outcomes = [np.where(codes < 0, size, codes)[known] for codes, size in zip(outcome, sizes, strict=True)]
    rows = np.ravel_multi_index(tuple(codes[known] for codes in truth), tuple(sizes))
    columns = np.ravel_multi_index(tuple(outcomes), tuple(outcome_sizes))
    shape = (int(np.prod(sizes)), int(np.prod(outcome_sizes)))
    counts = np.zeros(shape, np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts


def why_not(confusion: IntArray, names: Sequence[str]) -> str | None:
    """Return the reason why shares can't be corrected with a confusion matrix; None if they can.

    Args:
        confusion: (c, o) counts.
        names: of the c classes.
    """
    num_rows = confusion.sum(axis=1)
    rarest = int(num_rows.argmin())
    if num_rows[rarest] < MIN_CALIBRATION_ROWS:
        return f"{names[rarest]}: {num_rows[rarest]} calibration images, {MIN_CALIBRATION_ROWS} are needed"
    condition = _condition(confusion)
    if condition > MAX_CONDITION:
        return (
            f"the model cannot tell the classes apart well enough{_never_predicted(confusion, names)} (confusion "
            f"matrix {_condition_text(condition)}, at most {MAX_CONDITION:g} is allowed)"
        )
    return None


def _never_predicted(confusion: IntArray, names: Sequence[str]) -> str:
    """Return which classes of one attribute are never predicted, as part of a sentence."""
    if confusion.shape[1] != len(names) + 1:  # several attributes: outcomes are no classes
        return ""
    never = [name for name, number in zip(names, confusion.sum(axis=0), strict=False) if not number]
    if len(never) == len(names):
        return ": it abstained on all calibration images"
    return f": it never predicted {', '.join(never)} for a calibration image" if never else ""


def _condition_text(condition: float) -> str:
    """Return a condition number in words; above 1 / (the precision of float64), the matrix is singular."""
    if condition > 1e15:
        return "singular"
    return f"of condition number {condition:.1f}" if condition < 1000 else f"of condition number {condition:.0e}"


def why_not_together(confusions: Sequence[IntArray]) -> str | None:
    """Return why shares can't be corrected with several matrices that are good enough alone; None if they can."""
    conditions = [_condition(confusion) for confusion in confusions]
    condition = math.prod(conditions)
    if condition <= MAX_CONDITION:
        return None
    product = " x ".join(f"{each:.1f}" for each in conditions)
    return (
        "the model cannot tell the combinations of classes apart well enough (confusion matrices of condition number "
        f"{product} = {condition:.1f}, at most {MAX_CONDITION:g} is allowed)"
    )


def true_shares(
    counts: IntArray,
    confusions: Sequence[IntArray],
    seed: int = 0,
    percentiles: tuple[float, float] = PERCENTILES,
) -> Shares:
    """Estimate the true shares of classes in each group.

    A group's shares do not depend on other groups' counts, not even in the last bit, because suppression may hide
    those counts.

    Args:
        counts: (g, product of the matrices' outcomes) faces by outcome; the first matrix varies slowest.
        confusions: (c, o) counts, one matrix for each set of attributes. Errors in one set are taken to be independent
            of errors in the others, given the true classes.
        seed: of the bootstrap. All groups use the same resampled matrices, so their intervals are not independent.
        percentiles: of the bootstrap, between which an interval lies.
    """
    rng = np.random.default_rng(seed)
    num_faces = counts.sum(axis=1)
    some = num_faces > 0
    num_classes = int(np.prod([len(confusion) for confusion in confusions]))
    shares = Shares(*(np.full((len(counts), num_classes), np.nan) for _ in Shares._fields))
    shares.share[some] = _maximise(
        counts[some] / num_faces[some, None], _kronecker([_rates(confusion) for confusion in confusions])
    )
    resampled: list[FloatArray] = [_rates(_resample(confusion, rng)) for confusion in confusions]
    inverses = _kronecker([_inverses(rates) for rates in resampled])
    chunk = max(1, _CHUNK_VALUES // (NUM_RESAMPLES * counts.shape[1]))
    chosen = np.flatnonzero(some)
    for start in range(0, len(chosen), chunk):
        groups = chosen[start : start + chunk]
        outcomes = counts[groups] / num_faces[groups, None]
        # Every group uses the same random seed, because the number of draws depends on its counts.
        drawn = np.stack(
            [
                np.random.default_rng([seed, 1]).multinomial(num, shares_of_group, size=NUM_RESAMPLES)
                for num, shares_of_group in zip(num_faces[groups], outcomes, strict=True)
            ],
            axis=1,
        )
        estimates = (drawn / num_faces[groups, None]) @ inverses
        low, high = np.clip(np.percentile(estimates, percentiles, axis=0), 0.0, 1.0)
        # Resampling gives a class without faces no spread, so use the exact binomial bound for 0 of n.
        unseen = 1.0 - ((1.0 - INTERVAL) / 2.0) ** (1.0 / num_faces[groups, None])
        shares.low[groups] = np.minimum(low, shares.share[groups])
        shares.high[groups] = np.maximum.reduce([high, shares.share[groups], np.broadcast_to(unseen, high.shape)])
    return shares


def _maximise(outcomes: FloatArray, rates: FloatArray) -> FloatArray:
    """Return the maximum-likelihood shares (g, c) by EM, from outcomes (g, o) and rates (c, o)."""
    shares = np.full((len(outcomes), len(rates)), 1.0 / len(rates))
    moves = np.ones(len(outcomes), bool)
    for _ in range(_MAX_STEPS):
        better = shares * ((outcomes / (shares @ rates)) @ rates.T)
        change = np.abs(better - shares).max(axis=1)
        # Each row stops on its own, so its precision does not depend on the other rows.
        shares = np.where(moves[:, None], better, shares)
        moves &= change >= _TOLERANCE
        if not moves.any():
            break
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _condition(confusion: IntArray) -> float:
    return float(np.linalg.cond(_rates(confusion)))


def _inverses(rates: FloatArray) -> FloatArray:
    """Return the pseudo-inverses of a stack of matrices."""
    return np.asarray(np.linalg.pinv(rates), np.float64)


def _rates(confusion: IntArray) -> FloatArray:
    """Return smoothed counts (..., c, o), divided by the sum of each class: M."""
    smoothed = confusion + SMOOTHING / confusion.shape[-1]
    rates: FloatArray = smoothed / smoothed.sum(axis=-1, keepdims=True)
    return rates


def _resample(confusion: IntArray, rng: np.random.Generator) -> IntArray:
    """Resample each class's images with replacement: (NUM_RESAMPLES, c, o) counts."""
    num_rows = confusion.sum(axis=1)
    return rng.multinomial(num_rows, confusion / num_rows[:, None], size=(NUM_RESAMPLES, len(confusion)))


def _kronecker(matrices: Sequence[FloatArray]) -> FloatArray:
    """Return the Kronecker product of matrices (..., i, j), the first varying slowest."""

    def product(left: FloatArray, right: FloatArray) -> FloatArray:
        pairs = left[..., :, None, :, None] * right[..., None, :, None, :]
        *stack, i, k, j, m = pairs.shape
        return pairs.reshape(*stack, i * k, j * m)

    return reduce(product, matrices)

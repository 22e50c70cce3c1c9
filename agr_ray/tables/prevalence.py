"""True shares of classes, from counts of what a classifier said and from how it errs on labelled images.

Observed outcomes are the classes and, last, "abstained"; of two attributes together, all combinations of these. With
M[c, o] the share of class c whose outcome is o, the outcomes' shares are sum_c share[c] M[c, o]. M is taken from the
calibration images, whose own mixture of classes does not matter; M is assumed to be the same for the faces
whose shares are estimated (label shift).

Estimate: maximum likelihood on the simplex by EM (Saerens, Latinne and Decaestecker 2002, Neural Computation 14(1),
for hard outcomes). Interval: bootstrap over calibration images (within their class) and over faces, of the estimate
without the simplex' border, share = outcomes M^+, then clipped to [0, 1]. Percentiles of the EM's own estimates cover
too seldom at the border, where they pile up.

What the constants below were chosen by: 200 simulated mixtures (30 for the joint table) of 30 to 5,000 faces for each
of gender, race, age group and all three, even and uneven, 2,800 calibration images. With percentiles 5 and 95 the
true shares were covered in 79 to 92 % of the cases, in 65 % and more for the joint table; as built, in 88 to 95 %,
and more for joint tables of few faces. Dirichlet instead of multinomial counts made no difference.
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
"""Nominal coverage: of the shares in the mixture that the faces are a random sample of."""

PERCENTILES: Final = (4.0, 96.0)
"""Of the bootstrap: wider than 5 and 95, which cover 87 to 90 %. That makes the intervals 6 % wider."""

MIN_CALIBRATION_ROWS: Final = 20
"""Calibration images below which a class' row of M is not trusted. At 20 a class, intervals cover 88 % (five races)."""

MAX_CONDITION: Final = 30.0
"""Largest condition number of M with correction; noise is amplified by up to this factor. The condition number of
several factors together is the product of theirs. Mean errors of corrected and
raw shares of nine simulated age groups, 2,800 calibration images: at 6 to 10, 0.027 and 0.038 (1,000 faces), 0.036 and
0.040 (300), intervals 0.14 and 0.20 wide; at 20 to 30, 0.039 and 0.046, 0.048 and 0.048, intervals 0.57 and 0.65 wide;
beyond, 0.041 and 0.048, 0.051 and 0.047. Intervals cover the truth in 90 % of cases, and more often at higher numbers.
With nine age groups jointly with ten other classes (5,000 faces), the error of corrected shares relative to raw ones
is 0.4 to 0.9 up to a product of 30, about 1 at 70, and 1.3 at 400 (20 times 20)."""

NUM_RESAMPLES: Final = 300
"""Of the bootstrap."""

SMOOTHING: Final = 0.5
"""Images added to each class' row of M, spread evenly: no outcome is impossible, and 20 images still outweigh it."""

_MAX_STEPS = 2000
_TOLERANCE = 1e-6
_CHUNK_VALUES = 4_000_000


class Shares(NamedTuple):
    """Estimates for g groups and c classes."""

    share: FloatArray
    """(g, c), rows add up to 1; NaN where the group has no faces, as the next two."""
    low: FloatArray
    """(g, c) lower end of the interval; it holds the share."""
    high: FloatArray
    """(g, c) upper end."""


def confusion_counts(truth: Sequence[IntArray], outcome: Sequence[IntArray], sizes: Sequence[int]) -> IntArray:
    """Count calibration images by class and outcome, in one attribute or in several together.

    Args:
        truth: (n,) classes in each attribute; -1, missing: the image is left out.
        outcome: (n,) classes in each attribute; -1: abstained.
        sizes: numbers of classes.

    Returns:
        (c, o): the combinations of classes, and those of classes and, last, "abstained"; the first attribute varies
        slowest.
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
    """Say in a few words why shares can't be corrected with a confusion matrix; None: they can.

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
        return f"confusion matrix too ill-conditioned: {condition:,.1f}, at most {MAX_CONDITION:g} is allowed"
    return None


def why_not_together(confusions: Sequence[IntArray]) -> str | None:
    """Return why shares can't be corrected with several matrices, each good enough alone; None if they can."""
    conditions = [_condition(confusion) for confusion in confusions]
    condition = math.prod(conditions)
    if condition <= MAX_CONDITION:
        return None
    product = " x ".join(f"{each:,.1f}" for each in conditions)
    return (
        f"confusion matrices too ill-conditioned together: {product} = {condition:,.1f}, at most {MAX_CONDITION:g} is "
        "allowed"
    )


def true_shares(counts: IntArray, confusions: Sequence[IntArray], seed: int = 0) -> Shares:
    """Estimate the true shares of classes in each group.

    A group's shares do not depend on other groups' counts, not even in the last bit: suppression may hide those.

    Args:
        counts: (g, product of the outcomes) faces by outcome.
        confusions: (c, o) counts for each part of the class; errors in one part are taken to be independent of the
            other parts, given the class, and the first part varies slowest.
        seed: of the bootstrap. Groups share its confusion matrices, and so are not independent of each other.
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
        low, high = np.clip(np.percentile(estimates, PERCENTILES, axis=0), 0.0, 1.0)
        # A class of which none was seen has no spread to resample: the exact binomial bound for 0 of n.
        unseen = 1.0 - ((1.0 - INTERVAL) / 2.0) ** (1.0 / num_faces[groups, None])
        shares.low[groups] = np.minimum(low, shares.share[groups])
        shares.high[groups] = np.maximum.reduce([high, shares.share[groups], np.broadcast_to(unseen, high.shape)])
    return shares


def _maximise(outcomes: FloatArray, rates: FloatArray) -> FloatArray:
    """Find the most likely shares by EM, from equal ones: (g, o) shares of outcomes, (c, o) rates to (g, c)."""
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
    """Turn counts (..., c, o) into shares of each class."""
    smoothed = confusion + SMOOTHING / confusion.shape[-1]
    rates: FloatArray = smoothed / smoothed.sum(axis=-1, keepdims=True)
    return rates


def _resample(confusion: IntArray, rng: np.random.Generator) -> IntArray:
    """Draw (NUM_RESAMPLES, c, o) counts, each class' images with replacement."""
    num_rows = confusion.sum(axis=1)
    return rng.multinomial(num_rows, confusion / num_rows[:, None], size=(NUM_RESAMPLES, len(confusion)))


def _kronecker(matrices: Sequence[FloatArray]) -> FloatArray:
    """Return the Kronecker product of matrices (..., i, j), the first varying slowest."""

    def product(left: FloatArray, right: FloatArray) -> FloatArray:
        pairs = left[..., :, None, :, None] * right[..., None, :, None, :]
        *stack, i, k, j, m = pairs.shape
        return pairs.reshape(*stack, i * k, j * m)

    return reduce(product, matrices)

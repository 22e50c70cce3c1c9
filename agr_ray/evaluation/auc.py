"""Area under the ROC curve by exact rank sums, for many groups at once, with the influence of each person.

The AUC is the probability that a positive row has a higher score than a negative one; ties count half (Hanley and
McNeil 1982). Its variance is DeLong's (DeLong, DeLong and Clarke-Pearson 1988), with a person's rows added up first
(Obuchowski 1997).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.terms import FloatArray
from agr_ray.evaluation.units import Units

_SCORE_BITS: Final = 30
"""Bits of a float32 from 0 to 1, whose order as an integer is that of the numbers."""
_UNIT_BITS: Final = 12
_PART_ROWS: Final = 500_000
"""Rows that are handled at a time after the sort."""


class Auc(NamedTuple):
    """The AUC of each group. NaN: the group has no positive or no negative row."""

    value: FloatArray
    """(groups,)"""
    influence: FloatArray
    """(units, groups), of each unit on the value; 0 where it is NaN."""
    num_positive: FloatArray
    """(groups,) rows."""
    num_negative: FloatArray
    """(groups,) rows."""


def group_auc(
    scores: NDArray[np.float32], is_positive: NDArray[np.bool_], groups: NDArray[Any], num_groups: int, units: Units
) -> Auc:
    """Return the AUC of n rows by group.

    One sort of 64-bit integers that hold group, score, unit and class of a row: exact, and 10 million rows take about
    a second.

    Args:
        scores: (n,) from 0 to 1.
        is_positive: (n,)
        groups: (n,) below `num_groups`; -1: the row is left out.
        num_groups: number of groups.
        units: sampling unit of each row.
    """
    known = groups >= 0
    if not known.all():
        scores, is_positive, groups, codes = scores[known], is_positive[known], groups[known], units.codes[known]
    else:
        codes = units.codes
    num_positive = np.bincount(groups[is_positive], minlength=num_groups)
    num_negative = np.bincount(groups, minlength=num_groups) - num_positive
    keys = _keys(scores, is_positive, groups, codes)
    keys.sort()
    first_positive = np.cumsum(num_positive) - num_positive
    first_negative = np.cumsum(num_negative) - num_negative
    num_places, num_seen_positive = units.num * num_groups, 0
    wins, won, weight = np.zeros(num_groups), np.zeros(num_places), np.zeros(num_places)
    for start, end in _parts(keys):
        own = keys[start:end]
        positive = (own & np.uint64(1)).astype(bool)
        blocks = own >> np.uint64(_UNIT_BITS + 1)
        first = np.flatnonzero(np.concatenate([[True], blocks[1:] != blocks[:-1]]))
        group = (blocks[first] >> np.uint64(_SCORE_BITS)).astype(np.int64)
        sizes = np.diff(first, append=len(own))
        # Counts within the group, before each block and in it.
        total = np.concatenate([[0], np.cumsum(positive)]) + num_seen_positive
        positive_before, positive_in = total[first], total[first + sizes] - total[first]
        negative_before, negative_in = start + first - positive_before, sizes - positive_in
        num_seen_positive = int(total[-1])
        # How many negative rows are below the block, and positive ones above it; the block's own count half.
        below = negative_before - first_negative[group] + negative_in / 2
        above = num_positive[group] - (positive_before - first_positive[group] + positive_in / 2)
        wins += np.bincount(group, positive_in * below, num_groups)
        per_positive, per_negative = (1.0 / np.maximum(num, 1)[group] for num in (num_positive, num_negative))
        places = ((own >> np.uint64(1)) & np.uint64((1 << _UNIT_BITS) - 1)).astype(np.int64) * num_groups
        places += np.repeat(group, sizes)
        share = np.where(positive, np.repeat(below * per_negative, sizes), np.repeat(above * per_positive, sizes))
        each = np.where(positive, np.repeat(per_positive, sizes), np.repeat(per_negative, sizes))
        won += np.bincount(places, share * each, num_places)
        weight += np.bincount(places, each, num_places)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = wins / (num_positive * num_negative)
    shape = units.num, num_groups
    influence = np.where(np.isfinite(value), won.reshape(shape) - np.nan_to_num(value) * weight.reshape(shape), 0.0)
    return Auc(value, influence, num_positive.astype(np.float64), num_negative.astype(np.float64))


def _parts(keys: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Yield the first row and the end of parts of about `_PART_ROWS` rows that divide no block of equal scores."""
    start = 0
    while start < len(keys):
        end = min(start + _PART_ROWS, len(keys))
        if end < len(keys):
            last_block = keys[end - 1] | np.uint64((1 << (_UNIT_BITS + 1)) - 1)
            end = int(np.searchsorted(keys, last_block, side="right"))
        yield start, end
        start = end


def _keys(
    scores: NDArray[np.float32], is_positive: NDArray[np.bool_], groups: NDArray[Any], units: NDArray[np.int16]
) -> NDArray[np.uint64]:
    """Return integers that sort by group and then by score."""
    clipped = np.clip(scores, 0.0, 1.0) + np.float32(0.0)  # -0.0 becomes 0.0
    keys = groups.astype(np.uint64)
    for value, bits in ((clipped.view(np.uint32), _SCORE_BITS), (units, _UNIT_BITS), (is_positive, 1)):
        keys <<= np.uint64(bits)
        keys |= value.astype(np.uint64)
    return keys


def mean_auc(of_classes: Sequence[Auc]) -> Auc:
    """Return the unweighted mean over the classes of a task (macro average, one against the rest).

    A class that a group does not have, or that is its only one, is left out of that group's mean. The numbers of rows
    are those of the scarcest class that counts.
    """
    values = np.stack([each.value for each in of_classes])
    counts = np.isfinite(values)
    num = counts.sum(axis=0)
    weights = np.where(counts, 1.0 / np.maximum(num, 1), 0.0)
    value = np.where(num > 0, (weights * np.nan_to_num(values)).sum(axis=0), np.nan)
    influence = sum((w[None, :] * each.influence for w, each in zip(weights, of_classes, strict=True)), np.float64(0.0))
    rows = [
        np.where(counts, np.stack([getattr(each, name) for each in of_classes]), np.inf).min(axis=0)
        for name in ("num_positive", "num_negative")
    ]
    return Auc(value, np.asarray(influence), *(np.where(np.isfinite(each), each, 0.0) for each in rows))

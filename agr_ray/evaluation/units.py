"""Sampling units: the persons, or random groups of whole persons, over which intervals are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.terms import FloatArray, row_terms
from agr_ray.labels import Labels
from agr_ray.models.predictions import Predictions

MAX_UNITS: Final = 4096
"""More persons than these are put into as many random groups. The standard deviation of a standard error is then
1 / sqrt(2 * 4096) = 1.1 % of it."""
_GOLDEN: Final = 0x9E3779B97F4A7C15


class Units(NamedTuple):
    """The sampling unit of each row."""

    codes: NDArray[np.int16]
    """(n,) from 0."""
    num: int
    """Number of units; some may have no row."""
    of: str
    """What a unit is: `person`, `image`, or the same `groups` of them."""


def units_of(persons: NDArray[Any] | None, num_rows: int, seed: int = 0, max_units: int = MAX_UNITS) -> Units:
    """Assign each row to a unit.

    Up to `max_units` persons are units themselves. More are put into random groups of whole persons, whose sums vary
    as those of persons do ("random groups", Wolter 2007, Introduction to Variance Estimation, chapter 2). So memory
    does not depend on the number of persons.

    Args:
        persons: (n,) any integer of 0 or more for each person. None: each row is a person.
        num_rows: n.
        seed: of the groups.
        max_units: `MAX_UNITS` at most.
    """
    of = "image" if persons is None else "person"
    if persons is None:
        if num_rows <= max_units:
            return Units(np.arange(num_rows, dtype=np.int16), num_rows, of)
        # Not every 4096th row: rows are sorted by name, and groups that are alike would understate the variance.
        random = np.random.default_rng(seed).integers(0, max_units, num_rows, dtype=np.int16)
        return Units(random, max_units, f"{of} groups")
    assert len(persons) == num_rows
    if len(np.unique(persons[: 4 * max_units])) <= max_units:
        names, codes = np.unique(persons, return_inverse=True)
        if len(names) <= max_units:
            return Units(codes.astype(np.int16), len(names), of)
    mixed = _mixed(persons.astype(np.uint64) ^ np.uint64(seed * _GOLDEN % 2**64))
    return Units((mixed % np.uint64(max_units)).astype(np.int16), max_units, f"{of} groups")


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finaliser of SplitMix64 (Steele, Lea and Flood 2014), which makes neighbouring numbers independent."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def unit_sums(
    units: Units, codes: NDArray[Any] | None = None, num_codes: int = 1, weights: NDArray[Any] | None = None
) -> FloatArray:
    """Return the sums of n rows by unit and code, (units, codes).

    Args:
        units: of the rows.
        codes: (n,) below `num_codes`; a row with -1 is left out. None: all are 0.
        num_codes: number of columns.
        weights: (n,) summed; None: rows are counted.
    """
    places = units.codes.astype(np.int64)
    if codes is not None:
        known = codes >= 0
        if not known.all():
            places, codes = places[known], codes[known]
            weights = None if weights is None else weights[known]
        places = places * num_codes + codes
    summed = np.bincount(places, weights, units.num * num_codes)
    return summed.reshape(units.num, num_codes).astype(np.float64, copy=False)


def term_sums(units: Units, labels: Labels, predictions: Sequence[Predictions], names: Sequence[str]) -> FloatArray:
    """Return the sums of terms by unit, (units, networks, terms).

    Args:
        units: of n rows.
        labels: of the same rows.
        predictions: of each network, for the same rows.
        names: of `terms.row_terms`.
    """
    networks = []
    for each in predictions:
        terms = row_terms(labels, each)
        networks.append(np.concatenate([unit_sums(units, weights=terms[name]) for name in names], axis=1))
    return np.stack(networks, axis=1)

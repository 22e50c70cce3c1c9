"""Count distinct faces: near-duplicates, by their perceptual hashes, are one face.

Two faces are joined if their hashes differ in at most a given number of bits, and then transitively: the chain of ever
more cropped copies of one photograph is one face. The result is exact, whatever the number of faces. Not all pairs are
compared (multi-index hashing: Norouzi, Punjani and Fleet 2012, Fast search in Hamming space). Near-duplicates differ in
few bits of one of the hash's words at least. The bits of that word are divided into bands, all but a few of which are
then equal. So for each choice of that many bands, faces are sorted by the bits in these bands, and only those that are
equal there are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log2
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from agr_ray.labels import IntArray
from agr_ray.schema import ABSTAINED, HASH_WORDS
from agr_ray.vision.perceptual_hash import NUM_BITS, hash_distance

HashArray = NDArray[np.uint64]
MAX_DISTANCE: Final = 12
"""Number of bits, of 128, in which the hashes of near-duplicates may differ; docs/demographics.md gives the errors."""
_MAX_PAIRS: Final = 4_000_000
"""Pairs that are collected before they are joined: 64 MB."""
_SAMPLE: Final = 100_000
_SORT_COST: Final = 0.5
"""Time to sort a hash, for each doubling of their number, in comparisons of a pair: measured, 10 and 20 ns."""


def joined(hashes: HashArray, max_distance: int) -> IntArray:
    """Return the number of each face, from 0: near-duplicates have the same.

    Memory: about 100 bytes for each face. Time grows with n log n, and with the square of the number of different
    hashes that are alike in many bits.

    Args:
        hashes: (n, words) uint64.
        max_distance: largest number of bits in which near-duplicates differ.
    """
    if not len(hashes):
        return np.zeros(0, np.int64)
    order = np.lexsort(hashes.T)
    is_first = np.ones(len(hashes), bool)
    is_first[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
    distinct = hashes[order[is_first]]
    hash_of = np.empty(len(hashes), np.int64)
    hash_of[order] = np.cumsum(is_first) - 1
    del order, is_first
    number = np.arange(len(distinct))
    for first, second in _near_pairs(distinct, max_distance):
        number = _merged(number, first, second)
    return number[hash_of]


def _merged(number: IntArray, first: IntArray, second: IntArray) -> IntArray:
    """Return the numbers after joining pairs of hashes, given by their indices."""
    ends = number[first], number[second]
    size = int(number.max()) + 1
    links = coo_array((np.ones(len(first), np.bool_), ends), shape=(size, size))
    return np.asarray(connected_components(links, directed=False)[1], np.int64)[number]


def _near_pairs(hashes: HashArray, max_distance: int) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield the indices of all pairs of different hashes within the distance, in pieces; a pair may come repeatedly."""
    pairs: list[tuple[IntArray, IntArray]] = []
    num_pairs = 0
    for word, mask in _masks(hashes, max_distance):
        keys = hashes[:, word] & mask
        order = np.argsort(keys)
        words = [hashes[order, each] for each in (word, *(other for other in range(hashes.shape[1]) if other != word))]
        position, last = _in_runs(keys[order])
        offset = 1
        while len(position):
            near, distance = position, np.zeros(len(position), np.uint8)
            for each in words:  # most pairs are already too far apart in the first
                distance = distance + hash_distance(each[near], each[near + offset])
                is_near = distance <= max_distance
                near, distance = near[is_near], distance[is_near]
            if len(near):
                pairs.append((order[near], order[near + offset]))
                num_pairs += len(near)
            if num_pairs > _MAX_PAIRS:
                yield _concatenated(pairs)
                pairs, num_pairs = [], 0
            offset += 1
            goes_on = position + offset <= last
            position, last = position[goes_on], last[goes_on]
    if pairs:
        yield _concatenated(pairs)


def _in_runs(keys: HashArray) -> tuple[IntArray, IntArray]:
    """Return the positions in sorted keys after which an equal key follows, and the last position of each one's key."""
    ends = np.flatnonzero(np.append(keys[1:] != keys[:-1], True))
    last = np.repeat(ends, np.diff(ends, prepend=-1))
    position = np.flatnonzero(last > np.arange(len(keys)))
    return position, last[position]


def _concatenated(pairs: Sequence[tuple[IntArray, IntArray]]) -> tuple[IntArray, IntArray]:
    return np.concatenate([first for first, _ in pairs]), np.concatenate([second for _, second in pairs])


def _masks(hashes: HashArray, max_distance: int) -> Iterator[tuple[int, np.uint64]]:
    """Yield words and masks such that any two hashes within the distance are equal in one of them at least.

    If the first of two words differed in more than 6 bits and the second in more than 5, both would differ in at least
    7 + 6 = 13. So within a distance of 12, one of them does not.
    """
    num_words = hashes.shape[1]
    for word in range(num_words):
        share = (max_distance + 1) // num_words + (word < (max_distance + 1) % num_words)
        if share:
            yield from ((word, mask) for mask in _masks_of_word(hashes[:, word], share - 1))


def _masks_of_word(values: HashArray, max_distance: int) -> list[np.uint64]:
    """Return the bits of every choice of bands in which words within the distance may agree.

    With b bands and a distance of d, they agree in b - d bands at least. More bands need more sorts, and fewer
    comparisons. The number of bands with the least work is taken, as estimated from a sample.
    """
    sample = values[:: max(1, len(values) // _SAMPLE)]
    shifts = np.arange(NUM_BITS, dtype=np.uint64)
    share_set = ((sample[:, None] >> shifts) & np.uint64(1)).mean(axis=0) if len(sample) else np.zeros(NUM_BITS)
    most_even_first = np.argsort(np.abs(share_set - 0.5), kind="stable")  # every band gets some that tell faces apart
    best: list[np.uint64] = []
    least_work = np.inf
    for num_bands in range(max_distance + 1, min(max_distance + 6, NUM_BITS) + 1):
        bands = [sum(1 << bit for bit in most_even_first[band::num_bands].tolist()) for band in range(num_bands)]
        masks = [np.uint64(sum(chosen)) for chosen in combinations(bands, num_bands - max_distance)]
        equal = [np.unique(sample & mask, return_counts=True)[1] for mask in masks[:: max(1, len(masks) // 4)]]
        pairs_each = np.mean([(counts * (counts - 1.0)).sum() / 2.0 for counts in equal])
        pairs_each *= (len(values) / max(len(sample), 1)) ** 2
        work = len(masks) * (_SORT_COST * len(values) * log2(len(values) + 1) + pairs_each)
        if work < least_work:
            best, least_work = masks, work
    return best


def face_codes(
    faces: pa.Table, groups: pa.Table, keys: Sequence[str], classes: Mapping[str, Sequence[str]]
) -> tuple[HashArray, NDArray[np.int32], NDArray[np.uint8]]:
    """Return the hash, the group and the classes of n faces, in 23 bytes each.

    Args:
        faces: rows of `face_rows.hashed_faces`, with the grouping columns `keys`.
        groups: a row for each group.
        keys: grouping columns.
        classes: of each attribute that was predicted.

    Returns:
        (n, words) hashes; (n,) index of the group; (n, attributes) index of the class, or the number of classes for
        `schema.ABSTAINED`.
    """
    words = faces["perceptual_hash"].combine_chunks().flatten()
    hashes = np.asarray(words).astype(np.int64).view(np.uint64).reshape(-1, HASH_WORDS)
    codes = [pc.index_in(faces[name], value_set=pa.array([*names, ABSTAINED])) for name, names in classes.items()]
    group = np.zeros(faces.num_rows, np.int32)
    if keys and faces.num_rows:
        number_of = {tuple(row.values()): number for number, row in enumerate(groups.select(keys).to_pylist())}
        encoded = [faces[key].combine_chunks().dictionary_encode(null_encoding="encode").indices for key in keys]
        found = np.stack([np.asarray(each) for each in encoded], axis=1)
        _, first, place = np.unique(found, axis=0, return_index=True, return_inverse=True)
        named = faces.select(keys).take(pa.array(first)).to_pylist()
        group = np.array([number_of[tuple(row.values())] for row in named], np.int32)[place]
    columns = [np.asarray(code).astype(np.uint8) for code in codes]
    return hashes, group, np.stack(columns, axis=1) if columns else np.zeros((faces.num_rows, 0), np.uint8)


@dataclass(frozen=True)
class DistinctFaces:
    """The faces that passed the gates, and which of them are near-duplicates. Arrays have one entry for each face."""

    number: IntArray
    """(n,) as from `joined`."""
    group: NDArray[np.integer[Any]]
    """(n,) index of the face's group."""
    codes: Mapping[str, NDArray[np.integer[Any]]]
    """Attribute -> (n,) index of the class; the number of classes stands for an abstention."""
    num_groups: int

    def per_group(self) -> IntArray:
        """Return the number of distinct faces in each group and, last, in all of them: (groups + 1,)."""
        return self._per_cell(np.zeros(len(self.number), np.int64), 1).ravel()

    def per_cell(self, classes: Mapping[str, Sequence[str]]) -> IntArray:
        """Return the number of distinct faces in each cell of each group and, last, of all groups: (groups + 1, cells).

        A face with several near-duplicates counts once in each cell that has any of them.

        Args:
            classes: of the attributes of a breakdown; faces with an abstention in any are left out.
        """
        sizes = tuple(len(names) for names in classes.values())
        codes = [self.codes[name] for name in classes]
        known = np.all([code < size for code, size in zip(codes, sizes, strict=True)], axis=0)
        cell = np.full(len(self.number), -1)
        cell[known] = np.ravel_multi_index([code[known] for code in codes], sizes)
        return self._per_cell(cell, int(np.prod(sizes)))

    def _per_cell(self, cell: IntArray, num_cells: int) -> IntArray:
        """Count distinct faces by group and cell, and by cell alone; a cell of -1 is left out."""
        counts = np.zeros((self.num_groups + 1, num_cells), np.int64)
        known = cell >= 0
        row = self.group[known] * num_cells + cell[known]
        for rows, target in ((row, counts[:-1].reshape(-1)), (cell[known], counts[-1])):
            code = np.unique(rows * (int(self.number.max(initial=0)) + 1) + self.number[known])
            target += np.bincount(code // (int(self.number.max(initial=0)) + 1), minlength=len(target))
        return counts

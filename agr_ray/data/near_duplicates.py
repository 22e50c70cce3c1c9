"""Find near-duplicates: copies of a picture that were re-encoded, resized or slightly cropped.

Two images are near-duplicates if the perceptual hashes of their aligned faces differ in few bits, and their thumbnails
are alike. The hashes find candidates without comparing all pairs; the thumbnails tell copies from faces that merely
look alike. docs/labels.md says what is found and what is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.schema import NEAR_DUPLICATES, SPLITS
from agr_ray.vision.perceptual_hash import NUM_BITS, hash_distance
from agr_ray.vision.thumbnail import THUMBNAIL_PX, likeness

UInt64Array = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

MAX_DISTANCE: Final = 8
"""Near-duplicates' hashes differ in at most this many bits."""
MIN_LIKENESS: Final = 0.97
"""Near-duplicates' thumbnails have at least this correlation."""

_LARGE: Final = 200_000
"""From this many hashes on, three long bands select fewer candidates than four short ones."""
_LARGEST_RADIUS: Final = 2
_CANDIDATES: Final = 1 << 22
"""Pairs of hashes that are compared at a time: about 200 MB."""
_PAIRS: Final = 1 << 18
"""Pairs of thumbnails that are compared at a time."""
_MOST_ROWS: Final = 50
"""Images of one hash with which an image is compared: many more would be a placeholder or a burst."""


def find_crossings(rows: pa.Table) -> pa.Table:
    """Return the images that have a near-duplicate in a split that is held out from them, with the likest of these.

    Val and test are held out from train, and test from val. So each image that would leak is in the result once, under
    the split from which it would have to be removed.

    Args:
        rows: the columns key, split, perceptual_hash and thumbnail, in any order and among others. Rows without a
            split or a hash have no near-duplicate.

    Returns:
        A table of `schema.NEAR_DUPLICATES`, sorted by key.
    """
    rows = rows.filter(pc.and_(pc.is_valid(rows["split"]), pc.is_valid(rows["perceptual_hash"]))).sort_by("key")
    if not rows.num_rows:
        return NEAR_DUPLICATES.empty_table()
    ranks = np.asarray(pc.index_in(rows["split"], pa.array(SPLITS)), np.int64)
    hashes = np.asarray(rows["perceptual_hash"], np.uint64)
    thumbnails = np.frombuffer(b"".join(rows["thumbnail"].to_pylist()), np.uint8)
    thumbnails = thumbnails.reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX)
    found = [np.empty((0, 2), np.int64)]
    scores = [np.empty(0, np.float32)]
    for pairs in _crossing_pairs(hashes, ranks):
        alike = likeness(thumbnails[pairs[:, 0]], thumbnails[pairs[:, 1]])
        found.append(pairs[alike >= MIN_LIKENESS])
        scores.append(alike[alike >= MIN_LIKENESS])
    one, other = np.concatenate(found).T
    score = np.concatenate(scores)
    best = np.lexsort((other, -score, one))
    best = best[np.unique(one[best], return_index=True)[1]]
    one, other, score = one[best], other[best], score[best]
    columns: dict[str, Any] = {
        "key": rows["key"].take(one),
        "split": rows["split"].take(one),
        "near_key": rows["key"].take(other),
        "near_split": rows["split"].take(other),
        "distance_bits": hash_distance(hashes[one], hashes[other]).astype(np.int32),
        "likeness": score,
    }
    return pa.table(columns, schema=NEAR_DUPLICATES)


def _crossing_pairs(hashes: UInt64Array, ranks: IntArray) -> Iterator[IntArray]:
    """Yield, in blocks, the pairs of rows with near hashes, (m, 2), of which the second is held out from the first."""
    values, inverse = np.unique(hashes, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(len(values) + 1))
    lowest, highest = np.full(len(values), len(SPLITS)), np.full(len(values), -1)
    np.minimum.at(lowest, inverse, ranks)
    np.maximum.at(highest, inverse, ranks)
    near = near_pairs(values, MAX_DISTANCE)
    near = np.concatenate([near, near[:, ::-1], np.repeat(np.arange(len(values)), 2).reshape(-1, 2)])
    near = near[lowest[near[:, 0]] < highest[near[:, 1]]]
    # The last rows of a hash in the order of their ranks are those held out.
    order = order[np.lexsort((ranks[order], inverse[order]))]
    counts = starts[near + 1] - starts[near]
    kept = np.minimum(counts[:, 1], _MOST_ROWS)
    ends = np.cumsum(counts[:, 0] * kept)
    begin = 0
    while begin < len(near):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + _PAIRS, side="right")))
        sizes = counts[begin:end, 0] * kept[begin:end]
        of_pair = np.repeat(np.arange(begin, end), sizes)
        within = np.arange(len(of_pair)) - np.repeat(ends[begin:end] - sizes - before, sizes)
        one = order[starts[near[of_pair, 0]] + within // kept[of_pair]]
        other = order[starts[near[of_pair, 1] + 1] - 1 - within % kept[of_pair]]
        crosses = ranks[one] < ranks[other]
        pairs = np.column_stack([one[crosses], other[crosses]])
        for first in range(0, len(pairs), _PAIRS):  # one hash alone may have more
            yield pairs[first : first + _PAIRS]
        begin = end


def near_pairs(hashes: UInt64Array, max_distance: int) -> IntArray:
    """Return all pairs of hashes that differ in at most `max_distance` bits: (m, 2) indices, the smaller one first.

    The 64 bits are divided into bands, say four. Two hashes that differ in at most d bits differ in at most d // 4
    bits of one of the bands. So a hash is only compared with those that have nearly the same value of a band.

    Args:
        hashes: (n,) distinct values.
        max_distance: 0 to 8.

    Raises:
        ValueError: `max_distance` is outside its range.

    Source: M. Norouzi, A. Punjani, D. Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance {max_distance} must be 0 to {MAX_DISTANCE} bits")
    num_bands = 3 if len(hashes) >= _LARGE else 4
    radius = max_distance // num_bands
    assert radius <= _LARGEST_RADIUS
    bands = _bands(hashes, num_bands)
    num_bits = -(-NUM_BITS // num_bands)
    found = [np.empty((0, 2), np.int64)]
    for number, keys in enumerate(bands):
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[order], np.arange((1 << num_bits) + 1))
        for mask in _masks(num_bits, radius):
            for pairs in _candidates(keys ^ mask, order, starts):
                one, other = pairs.T
                is_near = (one < other) & (hash_distance(hashes[one], hashes[other]) <= max_distance)
                for earlier in bands[:number]:  # which have found the pair already
                    is_near &= np.bitwise_count(earlier[one] ^ earlier[other]) > radius
                found.append(pairs[is_near])
    return np.concatenate(found)


def _bands(hashes: UInt64Array, num_bands: int) -> list[IntArray]:
    """Return the bands of each hash, (n,) each.

    The hash is a square of bits, row after row. A band has bits of a diagonal, because neighbours are correlated, and
    so are the bits of a column: then many hashes would have one value of the band.
    """
    side = int(NUM_BITS**0.5)
    bits = np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(-1, NUM_BITS // 8), axis=1)
    places = np.arange(NUM_BITS)
    diagonals = np.argsort((places // side + places % side) % side, kind="stable")
    return [
        bits[:, chosen].astype(np.int64) @ (1 << np.arange(len(chosen)))
        for chosen in np.array_split(diagonals, num_bands)
    ]


def _masks(num_bits: int, radius: int) -> Iterator[int]:
    """Yield all values of `num_bits` bits with at most `radius` of them set."""
    for num_set in range(radius + 1):
        for places in combinations(range(num_bits), num_set):
            yield sum(1 << place for place in places)


def _candidates(wanted: IntArray, order: IntArray, starts: IntArray) -> Iterator[IntArray]:
    """Yield, in blocks, each hash with every hash whose band has the wanted value: (m, 2) indices.

    Args:
        wanted: (n,) value of the band.
        order: (n,) indices of the hashes, sorted by band.
        starts: where each value begins in `order`.
    """
    first, counts = starts[wanted], starts[wanted + 1] - starts[wanted]
    ends = np.cumsum(counts)
    begin = 0
    while begin < len(wanted):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + _CANDIDATES, side="right")))
        block = counts[begin:end]
        within = np.arange(block.sum()) - np.repeat(ends[begin:end] - block - before, block)
        yield np.column_stack(
            [np.repeat(np.arange(begin, end), block), order[np.repeat(first[begin:end], block) + within]]
        )
        begin = end

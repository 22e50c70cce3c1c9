"""Near-duplicate faces are joined, exactly, and distinct faces are counted by cell and group."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from agr_ray.schema import ABSTAINED, PERCEPTUAL_HASH
from agr_ray.tables.duplicates import DistinctFaces, _masks, face_codes, joined
from agr_ray.vision.perceptual_hash import hash_distance

CLASSES = {"gender": ("female", "male"), "race": ("asian", "black", "white")}


def drawn_hashes(num: int, seed: int, num_bits: int = 64) -> np.ndarray:
    """Return hashes in which only some bits of each word differ; every tenth is a near-duplicate of another one."""
    rng = np.random.default_rng(seed)
    used = rng.permutation(64)[:num_bits].astype(np.uint64)
    hashes = (rng.integers(0, 2, (num, 2, num_bits), np.uint64) << used).sum(axis=2).astype(np.uint64)
    for copy in range(0, num, 10):
        hashes[copy] = hashes[rng.integers(num)]
        for bit in rng.permutation(128)[: rng.integers(0, 15)].tolist():
            hashes[copy, bit // 64] ^= np.uint64(1 << bit % 64)
    return hashes


def joined_slowly(hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """Compare all pairs, and give each face the smallest index that a chain of near-duplicates reaches."""
    near = hash_distance(hashes[:, None], hashes[None]).sum(axis=2) <= max_distance
    number = np.arange(len(hashes))
    while True:
        lowest = np.where(near, number[None], len(hashes)).min(axis=1)
        if (lowest == number).all():
            return number
        number = lowest


def partition(number: np.ndarray) -> list[int]:
    """Return the numbers in the order of their first appearance, so that equal partitions are equal lists."""
    order: dict[int, int] = {}
    return [order.setdefault(each, len(order)) for each in number.tolist()]


@pytest.mark.parametrize("max_distance", [0, 1, 2, 5, 12])
@pytest.mark.parametrize(("num", "num_bits"), [(1, 64), (700, 64), (700, 6), (700, 12)])
def test_the_same_faces_are_joined_as_by_comparing_all_pairs(num: int, num_bits: int, max_distance: int) -> None:
    hashes = drawn_hashes(num, num_bits + max_distance, num_bits)

    assert partition(joined(hashes, max_distance)) == partition(joined_slowly(hashes, max_distance))


def test_no_face_is_joined_with_none() -> None:
    assert joined(np.zeros((0, 2), np.uint64), 12).tolist() == []


def test_a_chain_is_one_face_though_its_ends_differ_in_many_bits() -> None:
    chain = np.array([[(1 << length) - 1] * 2 for length in range(0, 65, 4)], np.uint64)

    assert joined(chain, 8).tolist() == [0] * 17
    assert len(np.unique(joined(chain, 7))) == 17


def test_many_pairs_are_joined_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = drawn_hashes(700, 1, 8)
    monkeypatch.setattr("agr_ray.tables.duplicates._MAX_PAIRS", 50)

    assert partition(joined(hashes, 5)) == partition(joined_slowly(hashes, 5))


@pytest.mark.parametrize("num", [2, 1000])
@pytest.mark.parametrize("max_distance", [0, 1, 4, 12])
@pytest.mark.parametrize("num_words", [1, 2, 3])
def test_every_way_to_differ_in_few_bits_leaves_a_mask_equal(num: int, num_words: int, max_distance: int) -> None:
    rng = np.random.default_rng(0)
    masks = list(_masks(rng.integers(0, 2**63, (num, num_words), np.uint64), max_distance))
    for _ in range(200):
        flipped = [0] * num_words
        for bit in rng.permutation(64 * num_words)[:max_distance].tolist():
            flipped[bit // 64] |= 1 << bit % 64
        assert any(int(mask) & flipped[word] == 0 for word, mask in masks)


def faces(rows: list[tuple[int, str | None, str, str]]) -> pa.Table:
    names = ("day", "gender", "race")
    columns = {name: pa.array([row[1 + place] for row in rows], pa.string()) for place, name in enumerate(names)}
    return pa.table({"perceptual_hash": pa.array([[row[0]] * 2 for row in rows], PERCEPTUAL_HASH)} | columns)


def test_distinct_faces_are_counted_by_cell_and_by_group_and_in_total() -> None:
    table = faces(
        [
            (-1, "mon", "male", "white"),  # all bits set
            (-2, "mon", "male", "white"),  # a near-duplicate
            (-2, "tue", "male", "black"),  # in another group and cell
            (255, "mon", "male", ABSTAINED),
            (255 << 30, None, "female", "white"),
        ]
    )
    groups = pa.table({"day": [None, "mon", "tue", "wed"]})

    hashes, group, codes = face_codes(table, groups, ["day"], CLASSES)
    distinct = DistinctFaces(joined(hashes, 12), group, dict(zip(CLASSES, codes.T, strict=True)), groups.num_rows)

    assert distinct.per_group().tolist() == [1, 2, 1, 0, 3]
    by_gender = distinct.per_cell({"gender": CLASSES["gender"]})
    assert by_gender.tolist() == [[1, 0], [0, 2], [0, 1], [0, 0], [1, 2]]
    by_race = distinct.per_cell({"race": CLASSES["race"]})
    assert by_race.tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 2]]
    assert distinct.per_cell(CLASSES)[-1].tolist() == [0, 0, 1, 0, 1, 1]


def test_without_groups_there_is_one_and_without_faces_all_counts_are_0() -> None:
    groups = pa.table({"num_images": [3]})

    hashes, group, codes = face_codes(faces([]), groups, [], CLASSES)
    distinct = DistinctFaces(joined(hashes, 12), group, dict(zip(CLASSES, codes.T, strict=True)), 1)

    assert distinct.per_group().tolist() == [0, 0]
    assert distinct.per_cell(CLASSES).tolist() == [[0] * 6] * 2

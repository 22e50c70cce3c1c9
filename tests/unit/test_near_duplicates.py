"""Near-duplicates: every pair of near hashes is found, and copies are told from pictures that are alike."""

from __future__ import annotations

import itertools
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pictures import encoded, picture

from agr_ray.data import near_duplicates
from agr_ray.data.near_duplicates import MAX_DISTANCE, find_crossings, near_pairs
from agr_ray.vision.perceptual_hash import hash_distance, perceptual_hash
from agr_ray.vision.thumbnail import THUMBNAIL_PX, likeness, thumbnail


def random_hashes(num: int, seed: int) -> NDArray[np.uint64]:
    """Return distinct hashes, most of which are a few bits from another one."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, max(1, num // 8), dtype=np.uint64)[rng.integers(0, max(1, num // 8), num)]
    for chance in (0.7, 0.5, 0.4, 0.4, 0.4):
        flips = np.uint64(1) << rng.integers(0, 64, num).astype(np.uint64)
        hashes = np.where(rng.random(num) < chance, hashes ^ flips, hashes)
    return rng.permutation(np.unique(hashes))


def all_pairs(hashes: NDArray[np.uint64], most: int) -> list[list[int]]:
    return [
        [i, j] for i, j in itertools.combinations(range(len(hashes)), 2) if hash_distance(hashes[i], hashes[j]) <= most
    ]


@pytest.mark.parametrize("is_large", [False, True], ids=["four bands", "three bands"])
@pytest.mark.parametrize("most", range(MAX_DISTANCE + 1))
def test_the_search_finds_each_pair_within_the_distance_once(
    most: int, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "_LARGE", 0 if is_large else 10**9)
    monkeypatch.setattr(near_duplicates, "_CANDIDATES", 50)
    hashes = random_hashes(300, seed=most)

    pairs = near_pairs(hashes, most)

    assert sorted(pairs.tolist()) == all_pairs(hashes, most)
    assert most == 0 or len(pairs) > 10


@pytest.mark.parametrize("num", [0, 1])
def test_few_hashes_have_no_pairs(num: int) -> None:
    assert near_pairs(random_hashes(num, 0)[:num], 8).shape == (0, 2)


@pytest.mark.parametrize("most", [-1, 9])
def test_a_distance_that_would_compare_most_pairs_is_rejected(most: int) -> None:
    with pytest.raises(ValueError, match=f"max_distance {most} must be 0 to 8 bits"):
        near_pairs(random_hashes(5, 0), most)


def image_row(key: str, split: str | None, grey: NDArray[np.uint8]) -> dict[str, Any]:
    return {
        "key": key,
        "split": split,
        "perceptual_hash": int(perceptual_hash(grey)) or None,
        "thumbnail": thumbnail(grey).tobytes(),
    }


def table(*rows: dict[str, Any]) -> pa.Table:
    types = {"key": pa.string(), "split": pa.string(), "perceptual_hash": pa.uint64(), "thumbnail": pa.binary(256)}
    return pa.Table.from_pylist(list(rows), pa.schema(list(types.items())))


def found(*rows: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    crossings = find_crossings(table(*rows)).to_pylist()
    return [(each["key"], each["split"], each["near_key"], each["near_split"]) for each in crossings]


def copy_of(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a re-encoded, slightly cropped copy of half the size."""
    return encoded(cv2.resize(grey[2:-1, 1:-2], (100, 100), interpolation=cv2.INTER_AREA), 60)


def test_a_copy_in_a_split_that_is_held_out_is_found_once_under_the_other_split() -> None:
    rows = [
        image_row("a", "train", picture(1)),
        image_row("b", "test", copy_of(picture(1))),
        image_row("c", "val", picture(2)),
        image_row("d", "train", copy_of(picture(2))),
        image_row("e", "test", copy_of(picture(2))),
        image_row("f", "train", picture(3)),
    ]
    expected = [("a", "train", "b", "test"), ("c", "val", "e", "test"), ("d", "train")]

    crossings = found(*rows)

    assert [each[: len(wanted)] for each, wanted in zip(crossings, expected, strict=True)] == expected
    assert sorted(found(*reversed(rows))) == crossings


def test_copies_within_a_split_or_without_one_are_not_counted() -> None:
    same = [image_row(key, "test", picture(1)) for key in "ab"]
    assert found(*same, image_row("c", None, picture(1))) == []
    assert found() == []


def test_each_copy_of_an_image_that_many_copies_share_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_PAIRS", 7)
    rows = [image_row(f"{split}{n:03d}", split, picture(1)) for split in ("train", "val", "test") for n in range(60)]

    crossings = found(*rows)

    assert [each[0] for each in crossings] == [f"{split}{n:03d}" for split in ("train", "val") for n in range(60)]
    assert {each[3] for each in crossings} == {"test"}


def test_pictures_whose_hashes_are_near_but_whose_thumbnails_are_not_alike_are_told_apart() -> None:
    other = image_row("b", "test", picture(2))
    other["perceptual_hash"] = int(perceptual_hash(picture(1))) ^ 0b11

    assert found(image_row("a", "train", picture(1)), other) == []


def test_images_of_one_colour_have_no_near_duplicates() -> None:
    flat = np.full((50, 50), 7, np.uint8)
    assert found(image_row("a", "train", flat), image_row("b", "test", flat)) == []


def test_the_likest_image_is_named() -> None:
    rows = [image_row("a", "train", picture(1)), image_row("b", "test", copy_of(picture(1)))]
    rows.append(image_row("c", "test", picture(1)))

    (row,) = find_crossings(table(*rows)).to_pylist()

    assert (row["near_key"], row["distance_bits"], round(row["likeness"], 5)) == ("c", 0, 1.0)


def test_likeness_ignores_brightness_and_small_shifts() -> None:
    first = thumbnail(picture(5, side=THUMBNAIL_PX * 8))
    shifted = np.roll(first, (1, -2), axis=(0, 1))
    darker = (first // 2 + 10).astype(np.uint8)
    flat = np.full_like(first, 90)

    scores = likeness(np.stack([first, first, first, first]), np.stack([shifted, darker, thumbnail(picture(6)), flat]))

    assert scores[0] == pytest.approx(1.0, abs=1e-5)
    assert scores[1] > 0.99
    assert abs(scores[2]) < 0.8
    assert scores[3] == 0.0

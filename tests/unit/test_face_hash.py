"""The hash of an aligned face: copies of a photograph have nearly the same, other faces another one."""

from __future__ import annotations

import cv2
import numpy as np
import pyarrow as pa
import pytest

from agr_ray.data.rendered import render_chip
from agr_ray.schema import HASH_WORDS, PERCEPTUAL_HASH
from agr_ray.tables.duplicates import MAX_DISTANCE
from agr_ray.vision.align import align_chip
from agr_ray.vision.decode import decode_image, encode_jpeg
from agr_ray.vision.face_hash import face_hash
from agr_ray.vision.perceptual_hash import hash_distance

SIDE_PX = 80


def hash_of(rgb: np.ndarray) -> np.ndarray:
    return np.array(face_hash(align_chip(rgb, SIDE_PX), SIDE_PX), np.int64).view(np.uint64)


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(hash_distance(hash_of(one), hash_of(other)).sum())


@pytest.mark.parametrize(
    "copied",
    [
        lambda rgb: decode_image(encode_jpeg(rgb, 40)).rgb,
        lambda rgb: cv2.resize(rgb, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA),
        lambda rgb: np.clip(rgb * 0.85 + 10.0, 0, 255).astype(np.uint8),
    ],
)
def test_copies_are_near_duplicates(copied: object) -> None:
    for seed in range(10):
        chip = render_chip(0, seed).image_rgb
        assert distance(chip, copied(chip)) <= MAX_DISTANCE  # type: ignore[operator]


def test_a_change_of_one_half_of_the_face_changes_one_word() -> None:
    chip = np.asarray(render_chip(0, 1).image_rgb)
    other = chip.copy()
    other[chip.shape[0] * 3 // 4 :] = np.asarray(render_chip(0, 2).image_rgb)[chip.shape[0] * 3 // 4 :]

    upper, lower = hash_distance(hash_of(chip), hash_of(other)).tolist()

    assert upper == 0
    assert lower > 0


def test_the_margins_do_not_count() -> None:
    crop = align_chip(np.asarray(render_chip(0, 1).image_rgb), SIDE_PX)
    margin = (crop.shape[0] - SIDE_PX) // 2
    framed = np.zeros_like(crop)
    framed[margin:-margin, margin:-margin] = crop[margin:-margin, margin:-margin]

    assert face_hash(framed, SIDE_PX) == face_hash(crop, SIDE_PX)


def test_a_hash_fits_its_column() -> None:
    words = face_hash(align_chip(np.asarray(render_chip(0, 1).image_rgb), SIDE_PX), SIDE_PX)

    assert len(words) == HASH_WORDS
    assert pa.array([words], PERCEPTUAL_HASH).to_pylist() == [list(words)]

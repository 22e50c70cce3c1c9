from __future__ import annotations

import cv2
import numpy as np
import pytest
from pictures import encoded, picture

from agr_ray.vision.perceptual_hash import NUM_BITS, hash_distance, perceptual_hash

COPIES = {
    "re-encoded": lambda grey: encoded(grey, 40),
    "half the size": lambda grey: cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "enlarged": lambda grey: cv2.resize(grey, None, fx=1.7, fy=1.7, interpolation=cv2.INTER_CUBIC),
    "brighter": lambda grey: np.clip(grey * 0.9 + 20, 0, 255).astype(np.uint8),
    "cropped by 1 % of a side": lambda grey: encoded(grey[2:, 1:-1], 70),
}


@pytest.mark.parametrize("copy", [pytest.param(make, id=name) for name, make in COPIES.items()])
def test_a_copy_is_near_its_original(copy) -> None:
    distances = [int(hash_distance(perceptual_hash(picture(n)), perceptual_hash(copy(picture(n))))) for n in range(20)]
    assert max(distances) <= 6


def test_unrelated_images_differ_in_about_half_of_the_bits() -> None:
    hashes = np.array([perceptual_hash(picture(seed)) for seed in range(40)], np.uint64)
    distances = hash_distance(hashes[:, None], hashes[None, :])[np.triu_indices(40, 1)]
    assert distances.min() >= 12
    assert abs(distances.mean() - NUM_BITS / 2) < 1.5


def test_an_image_of_one_colour_has_the_hash_zero_at_any_size() -> None:
    shapes = [(1, 1), (17, 40), (32, 32), (33, 900), (500, 300)]
    assert [int(perceptual_hash(np.full(shape, 200, np.uint8))) for shape in shapes] == [0] * 5


def test_half_of_the_bits_are_set() -> None:
    assert [int(perceptual_hash(picture(seed))).bit_count() for seed in range(10)] == [NUM_BITS // 2] * 10


def test_the_hash_of_a_known_image_is_the_same_on_every_machine() -> None:
    rows, columns = np.mgrid[:48, :64]
    grey = ((rows * 5 + columns * 3 + (rows * columns) // 7) % 256).astype(np.uint8)
    assert f"{int(perceptual_hash(grey)):016x}" == "001f704f5e94dbb6"


def test_distances_broadcast_and_count_bits() -> None:
    one = np.array([0, 1, 2**64 - 1], np.uint64)
    assert hash_distance(one, np.uint64(0)).tolist() == [0, 1, 64]
    assert hash_distance(one[:, None], one).tolist() == [[0, 1, 64], [1, 0, 63], [64, 63, 0]]

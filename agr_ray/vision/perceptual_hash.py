"""A hash of what an image shows: copies that were re-encoded, resized or slightly cropped differ in few bits."""

from __future__ import annotations

from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

NUM_BITS: Final = 64
_SIDE_PX: Final = 32
_FREQUENCIES: Final = slice(1, 9)
"""Rows and columns of the cosine transform that give the bits. The zeroth ones hold the brightness and its gradients
across the image."""
_FLAT: Final = 1e-2
"""Coefficients of an image of one colour are below this, and are rounding errors; a step of one grey level over a
tenth of the image gives about 1."""


def perceptual_hash(grey: NDArray[np.uint8]) -> np.uint64:
    """Return the 64-bit hash of a grey image.

    The image is averaged down to 32 x 32 pixels. Each bit tells whether one of the 64 lowest frequencies of its cosine
    transform, except those constant in x or y, is above their median. So half of the bits are set, and the distance of
    two hashes is an even number; that of two unrelated images is about 32. An image of one colour has the hash 0. A
    mirrored or rotated copy has another hash.

    Args:
        grey: (height, width) uint8, of any size and shape: an aligned face, or a whole photograph.

    Source: C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, without its blur.
    """
    height, width = grey.shape
    shrinks = min(height, width) >= _SIDE_PX
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    small = cv2.resize(grey.astype(np.float32), (_SIDE_PX, _SIDE_PX), interpolation=interpolation)
    coefficients = cv2.dct(small)[_FREQUENCIES, _FREQUENCIES].ravel()
    coefficients[np.abs(coefficients) < _FLAT] = 0.0
    bits = coefficients > np.median(coefficients)
    return np.uint64(int.from_bytes(np.packbits(bits).tobytes(), "big"))


def hash_distance(one: NDArray[np.uint64] | np.uint64, other: NDArray[np.uint64] | np.uint64) -> NDArray[Any]:
    """Return the number of bits, 0 to 64, in which hashes differ: uint8 of the arguments' broadcast shape."""
    return np.asarray(np.bitwise_count(np.bitwise_xor(one, other)))

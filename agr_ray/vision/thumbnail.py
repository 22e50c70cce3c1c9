"""A thumbnail of an image, and how alike two thumbnails are: tells copies of a picture from pictures that are alike."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

THUMBNAIL_PX: Final = 16
"""Side of a thumbnail."""
_SHIFT_PX: Final = 2
"""A copy may be shifted by this many pixels of the thumbnail, an eighth of its side."""
_BLOCK: Final = 1 << 15
"""Pairs that are compared at a time."""

Thumbnails = NDArray[np.uint8]


def thumbnail(grey: NDArray[np.uint8]) -> Thumbnails:
    """Return a grey image (height, width), averaged to 16 x 16 pixels."""
    small = cv2.resize(grey, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.uint8)


def likeness(one: Thumbnails, other: Thumbnails) -> NDArray[np.float32]:
    """Return the correlation of each pair of thumbnails, (n,) float32: 1 if they are equal but for brightness.

    The middle of either thumbnail is laid on the other one at every shift of up to two pixels, and the best
    correlation counts. It is 0 if one of them has no contrast.

    Args:
        one: (n, 16, 16) uint8.
        other: of the same shape.
    """
    best = np.zeros(len(one), np.float32)
    for start in range(0, len(one), _BLOCK):
        block = slice(start, start + _BLOCK)
        for fixed, moved in ((one[block], other[block]), (other[block], one[block])):
            best[block] = np.maximum(best[block], _best_correlation(fixed, moved))
    return best


def _best_correlation(fixed: Thumbnails, moved: Thumbnails) -> NDArray[np.float32]:
    side = THUMBNAIL_PX - 2 * _SHIFT_PX
    middle = _normalised(fixed[:, _SHIFT_PX:-_SHIFT_PX, _SHIFT_PX:-_SHIFT_PX])
    best = np.zeros(len(fixed), np.float32)
    for top in range(2 * _SHIFT_PX + 1):
        for left in range(2 * _SHIFT_PX + 1):
            window = _normalised(moved[:, top : top + side, left : left + side])
            best = np.maximum(best, np.einsum("ij,ij->i", middle, window))
    return best


def _normalised(windows: Thumbnails) -> NDArray[np.float32]:
    """Return windows as rows of mean 0 and length 1; a window of one colour is all 0."""
    rows = windows.reshape(len(windows), -1).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    result: NDArray[np.float32] = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return result

"""The perceptual hash of an aligned face, by which near-duplicate photographs are found."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from agr_ray.vision.perceptual_hash import perceptual_hash


def face_hash(crop_rgb: NDArray[np.uint8], side_px: int) -> tuple[int, int]:
    """Return 64 bits of the upper half of a face and 64 of the lower half, as signed numbers.

    Aligned faces are alike: eyes and mouths are where the template has them. So 64 bits of a whole face do not tell
    millions of faces apart, and two halves are hashed. The margins are left out, because copies of a photograph that
    were cropped at its border differ there.

    Args:
        crop_rgb: (S, S, 3) uint8, aligned, with margins.
        side_px: side of the template's square in the middle of the crop.
    """
    margin = (crop_rgb.shape[0] - side_px) // 2
    square = slice(margin, margin + side_px)
    face = np.asarray(cv2.cvtColor(crop_rgb, cv2.COLOR_RGB2GRAY), np.uint8)[square, square]
    middle = side_px // 2
    upper, lower = (int(np.int64(perceptual_hash(half).view(np.int64))) for half in (face[:middle], face[middle:]))
    return upper, lower

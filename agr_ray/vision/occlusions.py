"""Things in front of a face: sunglasses, a face mask, a square."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

_SHIFT: Final = 4
"""Fractional bits of OpenCV's drawing coordinates."""
_DARK: Final = (18, 18, 20)
_MASK_COLOURS: Final = ((225, 232, 236), (150, 190, 215), (35, 35, 38))
"""White, light blue, black."""
_MASK_OUTLINE: Final = ((-1.1, 0.75), (0.0, 1.0), (1.1, 0.75), (0.95, -0.5), (0.4, -0.9), (-0.4, -0.9), (-0.95, -0.5))
"""From the centre of the mouth: across in distances between the eyes, and up. Positive heights are shares of the mask's
own, negative ones of the distance from the mouth to the eyes."""


def draw_sunglasses(rgb: NDArray[np.uint8], landmarks: NDArray[np.float64], width: float) -> NDArray[np.uint8]:
    """Return a copy with opaque lenses before both eyes, a bridge and temples.

    Args:
        rgb: (height, width, 3).
        landmarks: (5, 2) in pixels, in the order of `schema.LANDMARK_NAMES`.
        width: of a lens, in distances between the eyes; an eye is about 0.45 wide.
    """
    left, right = landmarks[0], landmarks[1]
    across = right - left
    distance = float(np.hypot(*across))
    angle = math.degrees(math.atan2(across[1], across[0]))
    drawn = rgb.copy()
    for eye in (left, right):
        axes = _fixed((width * distance / 2, 0.75 * width * distance / 2))
        cv2.ellipse(drawn, _fixed(eye - 0.5), axes, angle, 0, 360, _DARK, cv2.FILLED, cv2.LINE_AA, _SHIFT)
    thickness = max(1, round(0.08 * distance))
    ends = (left - 0.75 * across, right + 0.75 * across)
    cv2.line(drawn, _fixed(ends[0] - 0.5), _fixed(ends[1] - 0.5), _DARK, thickness, cv2.LINE_AA, _SHIFT)
    return drawn


def draw_mask(
    rgb: NDArray[np.uint8], landmarks: NDArray[np.float64], height: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Return a copy with a face mask over mouth and chin, of a random one of three colours.

    Args:
        rgb: (height, width, 3).
        landmarks: as in `draw_sunglasses`.
        height: of its upper edge above the mouth, as a share of the distance from the mouth to the eyes; 0.4 is the tip
            of the nose.
        rng: chooses the colour.
    """
    colour = _MASK_COLOURS[int(rng.integers(len(_MASK_COLOURS)))]
    mouth = landmarks[3:5].mean(axis=0)
    across, up = landmarks[1] - landmarks[0], landmarks[:2].mean(axis=0) - mouth
    outline = [mouth + x * across + (y * height if y > 0 else y) * up for x, y in _MASK_OUTLINE]
    drawn = rgb.copy()
    points = np.array([_fixed(point - 0.5) for point in outline], np.int32)
    cv2.fillPoly(drawn, [points], colour, cv2.LINE_AA, _SHIFT)
    return drawn


def draw_patch(rgb: NDArray[np.uint8], side_px: float, area: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a copy with a square of a random colour at a random place inside the alignment template.

    Args:
        rgb: (S, S, 3), an aligned crop.
        side_px: side of the template, which is centred.
        area: of the square, as a share of the template's.
        rng: chooses place and colour, the same for all areas.
    """
    place, colour = rng.random(2), rng.integers(0, 256, 3)
    size = math.sqrt(area) * side_px
    left, top = (round(edge) for edge in (rgb.shape[0] - side_px) / 2 + place * (side_px - size))
    drawn = rgb.copy()
    drawn[top : top + round(size), left : left + round(size)] = colour
    return drawn


def _fixed(point: Sequence[float] | NDArray[np.float64]) -> tuple[int, int]:
    x, y = (round(float(value) * 2**_SHIFT) for value in point)
    return x, y

"""Aligned square crops: a least-squares similarity transform maps five landmarks onto one template."""

from __future__ import annotations

import math
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from agr_ray import schema

TEMPLATE_NAME: Final = schema.TEMPLATE

TEMPLATE_POINTS: Final = ((0.30, 0.29), (0.70, 0.29), (0.49, 0.53), (0.32, 0.69), (0.67, 0.69))
"""x, y of each of `schema.LANDMARK_NAMES` as fractions of the crop's side, without margin: UTKFace's own geometry."""

HAAR_SQUARE: Final = (0.50, 0.587, 0.99)
"""The template's square relative to a box of OpenCV's frontal cascade: x and y of its centre, and its side."""

DEFAULT_MARGIN: Final = 0.10

_MAX_WARP_PX: Final = 16_384
"""Longest side of an image before and after warping: OpenCV refuses 32,767 pixels and more."""
_MIN_WARP_SCALE: Final = 0.75
"""Of a face that is warped and then averaged, relative to its size in the image."""


def stored_side_px(side_px: int, margin: float = DEFAULT_MARGIN) -> int:
    """Return the side of a stored crop: the template's square of `side_px`, and `margin * side_px` on each side."""
    return round(side_px * (1 + 2 * margin))


def align(
    rgb: NDArray[np.uint8],
    box_xyxy: NDArray[np.floating],
    landmarks: NDArray[np.floating],
    side_px: int,
    margin: float = DEFAULT_MARGIN,
) -> NDArray[np.uint8]:
    """Crop one detected face by its landmarks, or by its box if the landmarks are NaN."""
    if np.isfinite(landmarks).all():
        return align_face(rgb, landmarks, side_px, margin)
    return align_box(rgb, box_xyxy, side_px, margin)


def align_face(
    rgb: NDArray[np.uint8], landmarks: NDArray[np.floating], side_px: int, margin: float = DEFAULT_MARGIN
) -> NDArray[np.uint8]:
    """Crop a face, rotated, scaled and shifted so that its landmarks lie on the template.

    `rgb` is uint8, height x width x 3; `landmarks` is (5, 2) in its pixels, in the order of
    `schema.LANDMARK_NAMES`. The result is uint8, S x S x 3 with S = `stored_side_px(side_px, margin)`. Outside the
    image its border is reflected. A face that shrinks to less than three quarters is averaged.

    Raises:
        ValueError: if the landmarks are not finite, or all in one place.
    """
    side = stored_side_px(side_px, margin)
    affine = similarity(np.asarray(landmarks, dtype=np.float64), template_points_px(side_px, side))
    return _warp(rgb, affine, side)


def template_points_px(side_px: float, stored_px: int) -> NDArray[np.float64]:
    """Return the template's landmarks, (5, 2), in a crop of `stored_px` whose template has a side of `side_px`."""
    return (np.asarray(TEMPLATE_POINTS) - 0.5) * side_px + stored_px / 2


def landmarks_in_crop(
    landmarks: NDArray[np.floating], side_px: int, margin: float = DEFAULT_MARGIN
) -> NDArray[np.float64]:
    """Return where the landmarks of a face, (5, 2) in pixels of its photograph, are in its crop from `align_face`.

    They are near the template's. NaN for landmarks from which no crop can be made.
    """
    points = np.asarray(landmarks, np.float64)
    try:
        affine = similarity(points, template_points_px(side_px, stored_side_px(side_px, margin)))
    except ValueError:
        return np.full(points.shape, np.nan)
    return points @ affine[:, :2].T + affine[:, 2]


def align_box(
    rgb: NDArray[np.uint8], box_xyxy: NDArray[np.floating], side_px: int, margin: float = DEFAULT_MARGIN
) -> NDArray[np.uint8]:
    """Crop a face without landmarks by its box, which is of OpenCV's frontal cascade; see `HAAR_SQUARE`.

    `box_xyxy` is (4,) in pixels of `rgb`. The result has the size of `align_face`'s.
    """
    x0, y0, x1, y1 = (float(value) for value in box_xyxy)
    centre_x, centre_y, ratio = HAAR_SQUARE
    square_px = ratio * max(x1 - x0, y1 - y0)
    return _cut_square(rgb, x0 + centre_x * (x1 - x0), y0 + centre_y * (y1 - y0), square_px, side_px, margin)


def align_chip(rgb: NDArray[np.uint8], side_px: int, margin: float = DEFAULT_MARGIN) -> NDArray[np.uint8]:
    """Use a whole chip, in which no face was found, as the template's square; the margin reflects its border.

    If the chip is not square, its central square is used.
    """
    height, width = rgb.shape[:2]
    return _cut_square(rgb, width / 2, height / 2, min(width, height), side_px, margin)


def similarity(points: NDArray[np.floating], target: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the least-squares similarity transform, 2 x 3 without reflection, from `points` to `target`, both (n, 2).

    Source: Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991.
    In two dimensions, rotation and scale are one complex number, so no singular value decomposition is needed.

    Raises:
        ValueError: if the points are not finite, or all in one place.
    """
    source_mean, target_mean = points.mean(axis=0), target.mean(axis=0)
    source, goal = points - source_mean, target - target_mean
    spread = float((source**2).sum())
    if not np.isfinite(spread) or spread <= 0:
        raise ValueError(f"no similarity maps the points {points.tolist()} onto a template")
    cosine = float((source * goal).sum()) / spread
    sine = float((source[:, 0] * goal[:, 1] - source[:, 1] * goal[:, 0]).sum()) / spread
    linear = np.array([[cosine, -sine], [sine, cosine]])
    return np.column_stack([linear, target_mean - linear @ source_mean])


def _cut_square(
    rgb: NDArray[np.uint8], centre_x: float, centre_y: float, square_px: float, side_px: int, margin: float
) -> NDArray[np.uint8]:
    side = stored_side_px(side_px, margin)
    scale = side_px / square_px
    affine = np.array([[scale, 0.0, side / 2 - scale * centre_x], [0.0, scale, side / 2 - scale * centre_y]])
    return _warp(rgb, affine, side)


def _warp(rgb: NDArray[np.uint8], affine: NDArray[np.float64], side: int) -> NDArray[np.uint8]:
    """Warp `rgb` by `affine` (image to crop) into a square of `side` pixels.

    A face that shrinks is first warped to a whole multiple of `side`, at least three quarters of its size in the image,
    and then averaged down: below half its size, bilinear sampling alone would skip pixels and alias. Warping it to its
    full size would take 1.3 to 2 times as long, for pixels 0.1 of 255 levels nearer to those of an ideal crop.
    """
    rgb, affine = _near_crop(rgb, affine, side)
    scale = math.hypot(affine[0, 0], affine[1, 0])
    multiple = max(1, min(math.ceil(_MIN_WARP_SCALE / scale - 1e-6), _MAX_WARP_PX // side))
    matrix = affine * multiple
    matrix[:, 2] += 0.5 * matrix[:, :2].sum(axis=1) - 0.5  # OpenCV's origin is the centre of the first pixel
    big_side = side * multiple
    warped = cv2.warpAffine(rgb, matrix, (big_side, big_side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    if multiple > 1:
        warped = cv2.resize(warped, (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(warped, dtype=np.uint8)


def _near_crop(
    rgb: NDArray[np.uint8], affine: NDArray[np.float64], side: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return the part of a very large image around the crop's centre, and the affine from that part to the crop."""
    centre_xy = np.linalg.solve(affine[:, :2], side / 2 - affine[:, 2])
    excess_xy = np.array([max(0, length - _MAX_WARP_PX) for length in rgb.shape[1::-1]])
    corner = np.clip(np.round(centre_xy) - _MAX_WARP_PX // 2, 0, excess_xy).astype(int)
    part = rgb[corner[1] : corner[1] + _MAX_WARP_PX, corner[0] : corner[0] + _MAX_WARP_PX]
    return part, np.column_stack([affine[:, :2], affine[:, 2] + affine[:, :2] @ corner])

"""The canvas a head is drawn on: soft polygons, lines, spots and noise in the head's own coordinates.

The unit is the distance between the eyes, the origin is midway between them, x points to the viewer's right and y down.
A head stays inside `head_outline` whatever its labels are, so a mask made from its pose alone hides all of it.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from agr_ray.data.rendered.traits import RenderedArray

HEAD_HALF_WIDTH: Final = 1.50
HEAD_HALF_HEIGHT: Final = 1.90
HEAD_CENTRE_Y: Final = 0.25
_HEAD_POWER: Final = 4.0
"""The outline that encloses every head is |x / half width|^4 + |(y - centre) / half height|^4 = 1."""

_MARGIN: Final = 0.06
_SUBPIXEL_BITS: Final = 4

Roi = tuple[slice, slice]


def head_outline(num_points: int = 96) -> RenderedArray:
    """Return the outline, (num_points, 2), that encloses every head whatever its labels."""
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    cosine, sine = np.cos(angles), np.sin(angles)
    x = HEAD_HALF_WIDTH * np.sign(cosine) * np.abs(cosine) ** (2 / _HEAD_POWER)
    y = HEAD_HALF_HEIGHT * np.sign(sine) * np.abs(sine) ** (2 / _HEAD_POWER) + HEAD_CENTRE_Y
    return np.stack([x, y], axis=1).astype(np.float32)


class Canvas:
    """RGB, opacity and skin shading of a head, and functions that draw on them in the head's coordinates."""

    def __init__(self, scale_px: float, rng: np.random.Generator) -> None:
        self.scale_px = scale_px
        self.width = int(np.ceil(2 * (HEAD_HALF_WIDTH + _MARGIN) * scale_px))
        self.height = int(np.ceil(2 * (HEAD_HALF_HEIGHT + _MARGIN) * scale_px))
        self.origin_px = (self.width / 2, self.height / 2 - HEAD_CENTRE_Y * scale_px)
        self._origin = np.array(self.origin_px, np.float32)
        self.x = ((np.arange(self.width) + 0.5 - self.origin_px[0]) / scale_px).astype(np.float32)
        self.y = ((np.arange(self.height) + 0.5 - self.origin_px[1]) / scale_px).astype(np.float32)
        self.rgb = np.zeros(
            (3, self.height, self.width), np.float32
        )  # planes first, because numpy is slow on a last axis of length 3
        self.alpha = np.zeros((self.height, self.width), np.float32)
        self.shade = np.zeros((self.height, self.width), np.float32)
        grain = np.frombuffer(rng.bytes(self.width * self.height), np.uint8).reshape(self.height, self.width)
        self._blobs: list[tuple[float, float, float, float, float]] = []
        self._noises: dict[float, RenderedArray] = {}
        self._grain = (grain.astype(np.float32) - 127.5) * np.float32(1 / 74)

    def noise(self, size: float) -> RenderedArray:
        """Return noise with mean 0, deviation about 1 and blobs of about this size; the same for the same size."""
        if size not in self._noises:
            self._noises[size] = self._draw_noise(size)
        return self._noises[size]

    def _draw_noise(self, size: float) -> RenderedArray:
        sigma = size * self.scale_px / 2
        if sigma < 0.5:
            return self._grain
        step = max(int(sigma / 1.5), 1)
        small = np.ascontiguousarray(self._grain[::step, ::step])
        blurred = np.asarray(cv2.GaussianBlur(small, (0, 0), sigma / step), np.float32)
        blurred *= np.float32(2 * np.sqrt(np.pi) * sigma / step)
        if step == 1:
            return blurred
        return np.asarray(cv2.resize(blurred, (self.width, self.height), interpolation=cv2.INTER_LINEAR), np.float32)

    def limit(self) -> RenderedArray:
        """Return 1 inside `head_outline`, falling to 0 on it."""
        x = np.abs(self.x / HEAD_HALF_WIDTH) ** _HEAD_POWER
        y = np.abs((self.y - HEAD_CENTRE_Y) / HEAD_HALF_HEIGHT) ** _HEAD_POWER
        inside: RenderedArray = np.clip((1.0 - x[None, :] - y[:, None]) * 5, 0, 1)
        return inside

    def _roi(self, points: RenderedArray, margin: float) -> Roi:
        x, y = points[:, 0], points[:, 1]
        scale_px, (left, top) = self.scale_px, self.origin_px
        x0 = min(max(int((float(x.min()) - margin) * scale_px + left) - 2, 0), self.width - 1)
        y0 = min(max(int((float(y.min()) - margin) * scale_px + top) - 2, 0), self.height - 1)
        x1 = min(max(int((float(x.max()) + margin) * scale_px + left) + 3, x0 + 1), self.width)
        y1 = min(max(int((float(y.max()) + margin) * scale_px + top) + 3, y0 + 1), self.height)
        return slice(y0, y1), slice(x0, x1)

    def _pixels(self, points: RenderedArray) -> RenderedArray:
        return points * np.float32(self.scale_px) + self._origin

    def _fixed(self, points: RenderedArray, roi: Roi) -> npt.NDArray[np.int32]:
        pixels = self._pixels(points) - np.array([roi[1].start + 0.5, roi[0].start + 0.5], np.float32)
        return np.round(pixels * 2**_SUBPIXEL_BITS).astype(np.int32)

    def fill(self, points: RenderedArray, soft: float = 0.0) -> tuple[Roi, RenderedArray]:
        """Return a polygon as opacity 0..1 within its region, its edge blurred by `soft`."""
        roi = self._roi(points, 3 * soft)
        mask = np.zeros((roi[0].stop - roi[0].start, roi[1].stop - roi[1].start), np.uint8)
        cv2.fillPoly(mask, [self._fixed(points, roi)], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        return roi, self._soft(mask, soft)

    def stroke(self, lines: list[tuple[RenderedArray, float]], width: float, soft: float) -> tuple[Roi, RenderedArray]:
        """Return open lines, each with its own strength 0..1, as opacity within their region."""
        roi = self._roi(np.concatenate([points for points, _ in lines]), 3 * soft + width)
        mask = np.zeros((roi[0].stop - roi[0].start, roi[1].stop - roi[1].start), np.uint8)
        thickness = max(width * self.scale_px, 1.0)
        faint = min(width * self.scale_px, 1.0)
        for points, strength in lines:
            level = int(255 * min(strength, 1.0) * faint)
            if level > 0:
                fixed = self._fixed(points, roi)
                cv2.polylines(mask, [fixed], False, level, round(thickness), cv2.LINE_AA, _SUBPIXEL_BITS)
        return roi, self._soft(mask, soft)

    def _soft(self, mask: npt.NDArray[np.uint8], soft: float) -> RenderedArray:
        alpha = mask.astype(np.float32) * np.float32(1 / 255)
        sigma = soft * self.scale_px
        return _blur(alpha, sigma) if sigma > 0.3 else alpha

    def paint(self, roi: Roi, alpha: RenderedArray, colour: RenderedArray) -> None:
        """Blend a colour, (3,) or 3xHxW, over the canvas."""
        region = self.rgb[:, *roi]
        blended = (colour if colour.ndim == 3 else colour[:, None, None]) - region
        blended *= alpha
        region += blended
        opacity = self.alpha[roi]
        opacity += alpha * (1 - opacity)

    def darken(self, roi: Roi, amount: RenderedArray) -> None:
        """Scale the canvas by 1 - amount."""
        region = self.rgb[:, *roi]
        region *= 1 - amount

    def blob(self, x: float, y: float, width: float, height: float, amount: float) -> None:
        """Add a soft spot to the skin shading, darker below 0; `shade_blobs` then draws them all at once."""
        self._blobs.append((x, y, width, height, amount))

    def blobs(self, x: float, y: float, width: float, height: float, amount: float) -> None:
        """Add a soft spot on each side, at -x and x."""
        self.blob(-x, y, width, height, amount)
        self.blob(x, y, width, height, amount)

    def shade_blobs(self) -> None:
        """Draw the soft spots added so far into the skin shading."""
        x, y, width, height, amount = np.array(self._blobs, np.float32).T[:, :, None]
        across = np.exp(-0.5 * ((self.x - x) / width) ** 2)
        down = amount * np.exp(-0.5 * ((self.y - y) / height) ** 2)
        # Not numpy's product, which may start threads.
        self.shade = np.asarray(cv2.gemm(down, across, 1, self.shade, 1, flags=cv2.GEMM_1_T), np.float32)
        self._blobs.clear()


def _blur(image: RenderedArray, sigma: float) -> RenderedArray:
    """Blur; a wide blur is done at a coarser resolution, which looks the same and takes a fraction of the time."""
    height, width = image.shape
    step = min(int(sigma / 2), width // 4, height // 4)
    if step < 2:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)
    small = cv2.resize(image, (-(-width // step), -(-height // step)), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / step)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)


_STEPS: Final = np.linspace(0, 1, 7)[:-1]
_SPLINE: Final = 0.5 * np.stack(
    [
        -_STEPS + 2 * _STEPS**2 - _STEPS**3,
        2 - 5 * _STEPS**2 + 3 * _STEPS**3,
        _STEPS + 4 * _STEPS**2 - 3 * _STEPS**3,
        -(_STEPS**2) + _STEPS**3,
    ],
    axis=1,
)


def smooth_curve(points: list[tuple[float, float]], closed: bool = False) -> RenderedArray:
    """Return a Catmull-Rom curve through the points."""
    curve: RenderedArray = _spline_weights(len(points), closed) @ np.array(points, np.float32)
    return curve


@cache
def _spline_weights(num_knots: int, closed: bool) -> RenderedArray:
    """Return the weight of each knot (columns) in each point of the curve (rows)."""
    last = num_knots - 1
    rows = []
    for knot in range(num_knots if closed else last):
        around = np.arange(knot - 1, knot + 3)
        around = around % num_knots if closed else np.clip(around, 0, last)
        for weights in _SPLINE:
            row = np.zeros(num_knots, np.float32)
            np.add.at(row, around, weights)
            rows.append(row)
    return np.stack(rows if closed else [*rows, np.eye(num_knots, dtype=np.float32)[last]])


def ellipse(x: float, y: float, width: float, height: float) -> RenderedArray:
    """Return the outline of an ellipse with these half axes."""
    return _CIRCLE * np.array([width, height], np.float32) + np.array([x, y], np.float32)


_ANGLES: Final = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CIRCLE: Final = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1).astype(np.float32)

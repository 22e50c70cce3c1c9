"""Corruptions of aligned crops, each at five severities: what poor photographs do to a face.

In the manner of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019. The corruptions and their levels are our own, and chosen for faces. Sizes are relative to the
face, so that crops of all sizes are corrupted alike. The exception is `resolution`, which is in pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from agr_ray.vision.align import DEFAULT_MARGIN, template_points_px
from agr_ray.vision.decode import decode_crop, encode_jpeg
from agr_ray.vision.occlusions import draw_mask, draw_patch, draw_sunglasses

Image: TypeAlias = NDArray[np.uint8]
"""(height, width, 3), RGB."""

SEVERITIES: Final = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Crop:
    """One aligned face."""

    rgb: Image
    """(S, S, 3); S is the side of the template and its margins."""
    side_px: float
    """Side of the alignment template, which is about the width of a face."""
    landmarks: NDArray[np.float64]
    """(5, 2), x before y, in pixels of the crop, in the order of `schema.LANDMARK_NAMES`."""


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption."""

    family: str
    """Similar corruptions have the same family: optics, sensor, light, occlusion, alignment."""
    summary: str
    """What it does, in a few words."""
    unit: str
    """Of `levels`."""
    levels: tuple[float, float, float, float, float]
    """The level of each severity, in the order of `SEVERITIES`."""
    apply: Callable[[Crop, float, np.random.Generator], Image]
    """Returns the corrupted copy of a crop at a level."""


def corrupt(
    rgb: Image,
    name: str,
    severity: int,
    rng: np.random.Generator,
    landmarks: NDArray[np.floating] | None = None,
    margin: float = DEFAULT_MARGIN,
) -> Image:
    """Return a corrupted copy of an aligned crop, of the same shape.

    Args:
        rgb: (S, S, 3), with margins.
        name: of one of `CORRUPTIONS`.
        severity: one of `SEVERITIES`.
        rng: of `image_rng`: with an equal state, all severities of a corruption make the same random choices.
        landmarks: (5, 2) in pixels of the crop, as from `align.landmarks_in_crop`. None, or NaN: those of the template.
        margin: of the crop, as a share of the template's side.
    """
    side_px = rgb.shape[0] / (1 + 2 * margin)
    if landmarks is None or not np.isfinite(landmarks).all():
        landmarks = template_points_px(side_px, rgb.shape[0])
    corruption = CORRUPTIONS[name]
    crop = Crop(rgb, side_px, np.asarray(landmarks, np.float64))
    return corruption.apply(crop, corruption.levels[SEVERITIES.index(severity)], rng)


def image_rng(seed: int, name: str, image_id: str) -> np.random.Generator:
    """Return the generator of one image and corruption, which is the same in every process and in any order."""
    digest = hashlib.sha256(f"{seed}:{name}:{image_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _resolution(crop: Crop, face_px: float, rng: np.random.Generator) -> Image:  # noqa: ARG001  # as all corruptions
    return _enlarged(_shrunk(crop, face_px), crop.rgb.shape[0])


def _blur(crop: Crop, sigma: float, rng: np.random.Generator) -> Image:  # noqa: ARG001
    return _blurred(crop.rgb, sigma * crop.side_px)


def _motion_blur(crop: Crop, length: float, rng: np.random.Generator) -> Image:
    angle = rng.uniform(0.0, math.pi)
    kernel = _line_kernel(length * crop.side_px, angle)
    return np.asarray(cv2.filter2D(crop.rgb, -1, kernel, borderType=cv2.BORDER_REFLECT), np.uint8)


def _jpeg(crop: Crop, quality: float, rng: np.random.Generator) -> Image:  # noqa: ARG001
    return decode_crop(encode_jpeg(crop.rgb, int(quality)))


def _noise(crop: Crop, sigma: float, rng: np.random.Generator) -> Image:
    return _with_noise(crop.rgb, sigma, rng)


def _exposure(crop: Crop, stops: float, rng: np.random.Generator) -> Image:  # noqa: ARG001
    """Multiply the light by 2 ** stops, in linear intensities of sRGB (IEC 61966-2-1)."""
    encoded = np.arange(256) / 255.0
    light = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    light = np.minimum(light * 2.0**stops, 1.0)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.asarray(_to_uint8(encoded * 255.0)[crop.rgb], np.uint8)


def _contrast(crop: Crop, share: float, rng: np.random.Generator) -> Image:  # noqa: ARG001
    mean = crop.rgb.mean()
    return _to_uint8(mean + share * (crop.rgb - mean))


def _sunglasses(crop: Crop, width: float, rng: np.random.Generator) -> Image:  # noqa: ARG001
    return draw_sunglasses(crop.rgb, crop.landmarks, width)


def _mask(crop: Crop, height: float, rng: np.random.Generator) -> Image:
    return draw_mask(crop.rgb, crop.landmarks, height, rng)


def _patch(crop: Crop, area: float, rng: np.random.Generator) -> Image:
    return draw_patch(crop.rgb, crop.side_px, area, rng)


def _rotation(crop: Crop, degrees: float, rng: np.random.Generator) -> Image:
    side = crop.rgb.shape[0]
    turn = degrees if rng.random() < 0.5 else -degrees
    affine = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), turn, 1.0)
    return np.asarray(
        cv2.warpAffine(crop.rgb, affine, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT), np.uint8
    )


_WEBCAM: Final[Mapping[float, tuple[float, float, int]]] = {
    96: (0.5, 0.01, 60),
    64: (0.6, 0.02, 45),
    48: (0.7, 0.03, 35),
    32: (0.8, 0.04, 28),
    24: (0.9, 0.05, 20),
}
"""By the width of the face in pixels: blur in these pixels, noise, JPEG quality."""


def _webcam(crop: Crop, face_px: float, rng: np.random.Generator) -> Image:
    """Photograph the face with few pixels, out of focus and in poor light, compress the picture, and enlarge it."""
    sigma_px, noise, quality = _WEBCAM[face_px]
    small = _with_noise(_blurred(_shrunk(crop, face_px), sigma_px), noise, rng)
    return _enlarged(decode_crop(encode_jpeg(small, quality)), crop.rgb.shape[0])


def _shrunk(crop: Crop, face_px: float) -> Image:
    """Return the crop with a face of this width; it is not enlarged."""
    side = crop.rgb.shape[0]
    smaller = max(1, round(side * min(1.0, face_px / crop.side_px)))
    return np.asarray(cv2.resize(crop.rgb, (smaller, smaller), interpolation=cv2.INTER_AREA), np.uint8)


def _enlarged(rgb: Image, side: int) -> Image:
    return np.asarray(cv2.resize(rgb, (side, side), interpolation=cv2.INTER_LINEAR), np.uint8)


def _blurred(rgb: Image, sigma_px: float) -> Image:
    return np.asarray(cv2.GaussianBlur(rgb, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT), np.uint8)


def _with_noise(rgb: Image, sigma: float, rng: np.random.Generator) -> Image:
    """Add Gaussian noise whose standard deviation is a share of white."""
    return _to_uint8(rgb + (255.0 * sigma) * rng.standard_normal(rgb.shape, np.float32))


def _line_kernel(length_px: float, angle: float) -> NDArray[np.float32]:
    """Return a kernel that averages along a line; positions between pixels are shared among their neighbours."""
    radius = math.ceil(length_px / 2)
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1), np.float32)
    places = np.linspace(-length_px / 2, length_px / 2, max(3, 8 * radius + 1))
    for x, y in zip(radius + places * math.cos(angle), radius + places * math.sin(angle), strict=True):
        left, top = min(math.floor(x), 2 * radius - 1), min(math.floor(y), 2 * radius - 1)
        right, below = x - left, y - top
        kernel[top : top + 2, left : left + 2] += np.outer((1 - below, below), (1 - right, right))
    return np.asarray(kernel / kernel.sum(), np.float32)


def _to_uint8(values: NDArray[np.floating]) -> Image:
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


CORRUPTIONS: Final[Mapping[str, Corruption]] = {
    "resolution": Corruption("optics", "few pixels, enlarged", "px of the face", (64, 48, 32, 24, 16), _resolution),
    "blur": Corruption("optics", "out of focus", "of the face", (0.01, 0.015, 0.02, 0.03, 0.045), _blur),
    "motion_blur": Corruption(
        "optics", "moved, any direction", "of the face", (0.03, 0.05, 0.08, 0.12, 0.17), _motion_blur
    ),
    "noise": Corruption("sensor", "Gaussian noise", "of white", (0.03, 0.06, 0.1, 0.15, 0.22), _noise),
    "jpeg": Corruption("sensor", "JPEG", "quality", (40, 25, 15, 10, 6), _jpeg),
    "webcam": Corruption("sensor", "few pixels, blur, noise and JPEG", "px of the face", (96, 64, 48, 32, 24), _webcam),
    "underexposure": Corruption("light", "too dark", "stops", (-1, -2, -3, -4, -5), _exposure),
    "overexposure": Corruption("light", "too bright", "stops", (0.5, 1, 1.5, 2, 2.5), _exposure),
    "contrast": Corruption("light", "flat", "of the contrast", (0.6, 0.45, 0.3, 0.2, 0.1), _contrast),
    "sunglasses": Corruption("occlusion", "dark glasses", "eye distances", (0.45, 0.6, 0.75, 0.9, 1.05), _sunglasses),
    "mask": Corruption("occlusion", "face mask", "of the way to the eyes", (0.1, 0.25, 0.4, 0.55, 0.7), _mask),
    "patch": Corruption("occlusion", "a square anywhere", "of the area", (0.05, 0.1, 0.2, 0.3, 0.4), _patch),
    "rotation": Corruption("alignment", "turned in the plane", "degrees", (10, 20, 30, 45, 60), _rotation),
}
"""All corruptions by name; the order is that of reports."""

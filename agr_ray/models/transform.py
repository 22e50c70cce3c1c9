"""From a stored crop to the network's input, without random changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from numpy.typing import NDArray
from torch import Tensor

from agr_ray.schema import TEMPLATE
from agr_ray.vision.align import DEFAULT_MARGIN, stored_side_px

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
"""Paper eqs 2 and 3, where the mean of green is misprinted as 0.406."""

LUMA: Final = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luminance: ITU-R BT.601."""

WHOLE: Final = (0.0, 0.0, 1.0)
"""The window that is the alignment template's square."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a stored crop becomes the network's input. Stored with the weights, which need it."""

    image_size: int
    """Side of the network's input, pixels."""
    crop_side_px: int
    """Side of the alignment template in the centre of the stored crop, without the margins, pixels."""
    margin: float = DEFAULT_MARGIN
    """Margin of the stored crop on each side, as a fraction of the template's side."""
    template: str = TEMPLATE
    """Name and version of the alignment template."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of red, green, blue in 0..1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Of red, green, blue in 0..1."""
    equalize: bool = False
    """Whether the luminance of the stored crop, including its margins, is equalised first."""
    window: tuple[float, float, float] = WHOLE
    """Left edge, top edge and side of the square that the network sees, as fractions of the template's side. Networks
    that were trained elsewhere see another one than `WHOLE`."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for meta.json."""
        return {**dataclasses.asdict(self), **{name: list(getattr(self, name)) for name in _TRIPLES}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from what `to_json` gave.

        Raises:
            ValueError: a key is missing or unknown, mean, std or window does not have three numbers, or the window
                exceeds the stored crop.
        """
        expected = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != expected:
            raise ValueError(f"expected the keys {sorted(expected)}, found {sorted(values)}")
        triples = {name: tuple(map(float, values[name])) for name in _TRIPLES}
        for name, numbers in triples.items():
            if len(numbers) != 3:
                raise ValueError(f"expected three numbers for {name}, found {len(numbers)}")
        transform = cls(**{**values, **triples})
        stored = stored_side_px(transform.crop_side_px, transform.margin)
        left, top, side = _window_px(transform, stored)
        if min(left, top) < 0 or side < 1 or max(left, top) + side > stored:
            raise ValueError(f"window {list(transform.window)} exceeds the stored crop of {stored} pixels")
        return transform


_TRIPLES: Final = ("mean", "std", "window")


def to_nchw(images_nhwc_u8: NDArray[np.uint8] | Tensor, device: torch.device) -> Tensor:
    """Return (n, 3, h, w) uint8 on the device, without reordering pixels: channels stay last in memory."""
    if isinstance(images_nhwc_u8, Tensor):
        tensor = images_nhwc_u8
    else:
        # Arrays that share memory with an object store are read-only, which torch can't represent.
        tensor = torch.from_numpy(images_nhwc_u8 if images_nhwc_u8.flags.writeable else images_nhwc_u8.copy())
    return tensor.to(device, non_blocking=True).permute(0, 3, 1, 2)


def prepare_eval(images_u8: Tensor, transform: Transform) -> Tensor:
    """Equalise if the transform says so, cut out the template, resize and normalise.

    Args:
        images_u8: (n, 3, stored, stored) uint8, RGB.
        transform: of the network.

    Returns:
        (n, 3, image_size, image_size) float32.
    """
    if transform.equalize:
        images_u8 = equalize_luminance(images_u8)
    return normalise(centre(images_u8, transform), transform)


def equalize_luminance(images_u8: Tensor) -> Tensor:
    """Flatten the histogram of each image's luminance and keep its colour (paper eq. 17, on Y of YCrCb).

    Level v becomes (cdf(v) - cdf_min) / (num_pixels - cdf_min) * 255, as in OpenCV; an image of one level is not
    changed. Keeping Cr and Cb while Y changes means adding the same value to red, green and blue, clipped to 0..255.

    Args:
        images_u8: (n, 3, h, w) uint8, RGB.

    Returns:
        (n, 3, h, w) uint8.
    """
    weights = torch.tensor(LUMA, device=images_u8.device).view(1, 3, 1, 1)
    luma = (images_u8 * weights).sum(dim=1, keepdim=True).round().long()
    levels = luma.flatten(1)
    counts = torch.zeros(len(levels), 256, device=levels.device)
    cdf = counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=torch.float32)).cumsum(dim=1)
    lowest = cdf.gather(1, levels.amin(dim=1, keepdim=True))
    rest = levels.shape[1] - lowest
    equalized = ((cdf - lowest) * 255.0 / rest.clamp(min=1.0)).round().gather(1, levels)
    difference = torch.where(rest > 0, equalized - levels, 0.0).view_as(luma)
    return (images_u8 + difference).clamp(0.0, 255.0).to(torch.uint8)


def centre(images_u8: Tensor, transform: Transform) -> Tensor:
    """Cut out the transform's window; resize it if its side differs from the input's."""
    stored = images_u8.shape[-1]
    left, top, side = _window_px(transform, stored)
    assert images_u8.shape[-2] == stored >= max(left, top) + side, (images_u8.shape, transform)
    square = images_u8[:, :, top : top + side, left : left + side]
    return square if side == transform.image_size else resize(square, transform.image_size)


def _window_px(transform: Transform, stored_px: int) -> tuple[int, int, int]:
    """Return left edge, top edge and side of the window in a stored crop, all in pixels."""
    first = (stored_px - transform.crop_side_px) // 2
    left, top, side = (round(fraction * transform.crop_side_px) for fraction in transform.window)
    return first + left, first + top, side


def resize(images: Tensor, side: int) -> Tensor:
    """Resize with an anti-aliasing filter, to float32."""
    return F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)


def normalise(images: Tensor, transform: Transform) -> Tensor:
    """Map 0..255 to (value / 255 - mean) / std in one pass."""
    mean = torch.tensor(transform.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(transform.std, device=images.device).view(1, 3, 1, 1)
    return torch.addcmul(-mean / std, images.float(), 1.0 / (255.0 * std))

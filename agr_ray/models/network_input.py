"""From a stored crop to the network's input, without random changes."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from numpy.typing import NDArray
from torch import Tensor

from agr_ray.models.transform import Transform

LUMA: Final = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luminance: ITU-R BT.601."""


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
    left, top, side = transform.window_px(stored)
    assert images_u8.shape[-2] == stored >= max(left, top) + side, (images_u8.shape, transform)
    square = images_u8[:, :, top : top + side, left : left + side]
    return square if side == transform.image_size else resize(square, transform.image_size)


def resize(images: Tensor, side: int) -> Tensor:
    """Resize with an anti-aliasing filter, to float32."""
    return F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)


def normalise(images: Tensor, transform: Transform) -> Tensor:
    """Map 0..255 to (value / 255 - mean) / std in one pass."""
    mean = torch.tensor(transform.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(transform.std, device=images.device).view(1, 3, 1, 1)
    return torch.addcmul(-mean / std, images.float(), 1.0 / (255.0 * std))

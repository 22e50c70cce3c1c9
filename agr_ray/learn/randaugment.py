"""RandAugment on a batch of uint8 images, with operations drawn for each image.

The operations and their strengths are torchvision's, which are those of Cubuk et al., "RandAugment: Practical automated
data augmentation with a reduced search space", NeurIPS 2020. torchvision's own class draws once for a whole batch.
Here, images that drew the same operation and direction are processed together, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

MAX_MAGNITUDE: Final = 30.0
_FILL: Final = (124.0, 116.0, 104.0)  # ImageNet's mean colour, for areas that an image was moved out of

Operation = Callable[[Tensor, float], Tensor]


def rand_augment(images_u8: Tensor, num_ops: int, magnitude: float, generator: torch.Generator) -> Tensor:
    """Apply operations drawn uniformly from `SIGNED` and `UNSIGNED` to each image, one after another.

    Args:
        images_u8: (n, 3, h, w) uint8, RGB; not changed.
        num_ops: operations per image, drawn with replacement.
        magnitude: 0 to MAX_MAGNITUDE; the strength of signed operations is negated with probability 1/2.
        generator: on any device; the same state gives the same images.

    Returns:
        (n, 3, h, w) uint8.
    """
    strength = magnitude / MAX_MAGNITUDE
    drawn = [(op, sign) for op in SIGNED.values() for sign in (1.0, -1.0)]
    # Twice, because signed operations are there twice: all have the same probability.
    drawn += [(op, 1.0) for op in UNSIGNED.values() for _ in range(2)]
    images = images_u8.clone()
    for _ in range(num_ops):
        choices = torch.randint(len(drawn), (len(images),), generator=generator, device=generator.device).cpu()
        for choice, (op, sign) in enumerate(drawn):
            rows = (choices == choice).nonzero().squeeze(1)
            if len(rows):
                rows = rows.to(images.device)
                images[rows] = op(images[rows], sign * strength)
    return images


def _affine(
    images: Tensor,
    *,
    degrees: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Rotate, shift by fractions of the side in x and y, and shear about the centre, pixels per pixel in x and y."""
    side = images.shape[-1]
    shear_degrees = [math.degrees(math.atan(share)) for share in shear]
    shift_px = [int(share * side) for share in shift]
    moved: Tensor = functional.affine(
        images, degrees, shift_px, 1.0, shear_degrees, InterpolationMode.BILINEAR, list(_FILL)
    )
    return moved


SIGNED: Final[Mapping[str, Operation]] = {
    "shear_x": lambda images, strength: _affine(images, shear=(0.3 * strength, 0.0)),
    "shear_y": lambda images, strength: _affine(images, shear=(0.0, 0.3 * strength)),
    "translate_x": lambda images, strength: _affine(images, shift=(150.0 / 331.0 * strength, 0.0)),
    "translate_y": lambda images, strength: _affine(images, shift=(0.0, 150.0 / 331.0 * strength)),
    "rotate": lambda images, strength: _affine(images, degrees=30.0 * strength),
    "brightness": lambda images, strength: functional.adjust_brightness(images, 1.0 + 0.9 * strength),
    "saturation": lambda images, strength: functional.adjust_saturation(images, 1.0 + 0.9 * strength),
    "contrast": lambda images, strength: functional.adjust_contrast(images, 1.0 + 0.9 * strength),
    "sharpness": lambda images, strength: functional.adjust_sharpness(images, 1.0 + 0.9 * strength),
}
"""Operations whose strength, 0 to 1, may be negated."""

UNSIGNED: Final[Mapping[str, Operation]] = {
    "identity": lambda images, strength: images,  # noqa: ARG005  # as the others
    "posterize": lambda images, strength: functional.posterize(images, 8 - round(4.0 * strength)),
    "solarize": lambda images, strength: functional.solarize(images, 255.0 * (1.0 - strength)),
    "autocontrast": lambda images, strength: functional.autocontrast(images),  # noqa: ARG005
    "equalize": lambda images, strength: functional.equalize(images),  # noqa: ARG005
}
"""Operations whose strength, 0 to 1, has only one direction, or no effect."""

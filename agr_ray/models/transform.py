"""How a stored crop becomes the network's input. `network_input` does it; this module does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Self

from agr_ray.schema import TEMPLATE
from agr_ray.vision.align import DEFAULT_MARGIN, stored_side_px

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
"""Paper eqs 2 and 3, where the mean of green is misprinted as 0.406."""

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
        left, top, side = transform.window_px(stored)
        if min(left, top) < 0 or side < 1 or max(left, top) + side > stored:
            raise ValueError(f"window {list(transform.window)} exceeds the stored crop of {stored} pixels")
        return transform

    def window_px(self, stored_px: int) -> tuple[int, int, int]:
        """Return left edge, top edge and side of the window in a stored crop, all in pixels."""
        first = (stored_px - self.crop_side_px) // 2
        left, top, side = (round(fraction * self.crop_side_px) for fraction in self.window)
        return first + left, first + top, side


_TRIPLES: Final = ("mean", "std", "window")

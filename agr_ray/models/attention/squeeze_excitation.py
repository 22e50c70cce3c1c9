"""Squeeze-and-excitation: channel attention."""

from __future__ import annotations

import torchvision

_REDUCTION = 16


class SqueezeExcitation(torchvision.ops.SqueezeExcitation):  # type: ignore[misc]  # torchvision has no types
    """Multiply each channel by a gate computed from the means of all channels: torchvision's.

    Source: Hu, Shen and Sun, "Squeeze-and-Excitation Networks", CVPR 2018, equations 2 to 4, reduction ratio 16.

    Args:
        num_channels: of the feature map.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, max(num_channels // _REDUCTION, 1))

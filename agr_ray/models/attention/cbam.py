"""CBAM: channel attention, then spatial attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_REDUCTION = 16
_KERNEL = 7


class Cbam(nn.Module):
    """Multiply each channel by a gate, then each position by another.

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018, equations 1 to 3, reduction ratio 16,
    kernel of 7 x 7; without the batch norm that its code adds.

    Args:
        num_channels: of the feature map.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        hidden = max(num_channels // _REDUCTION, 1)
        self.channels = nn.Sequential(nn.Linear(num_channels, hidden), nn.ReLU(), nn.Linear(hidden, num_channels))
        self.places = nn.Conv2d(2, 1, _KERNEL, padding=_KERNEL // 2)

    def forward(self, feature_map_nchw: Tensor) -> Tensor:
        """Return the reweighted map, of the same shape."""
        x = feature_map_nchw
        gates = (self.channels(x.mean(dim=(2, 3))) + self.channels(x.amax(dim=(2, 3)))).sigmoid()
        x = x * gates[:, :, None, None]
        summary = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        attended: Tensor = x * self.places(summary).sigmoid()
        return attended

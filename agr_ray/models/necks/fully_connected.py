"""A fully connected layer over a grid of the last feature map."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

_SIDE = 3


class FullyConnected(nn.Module):
    """The last feature map, averaged to 3 x 3 positions, through a linear layer and a ReLU.

    It takes the place of VGG-16's two linear layers of 4,096 over 7 x 7 positions, as transfer learning replaces them.
    The row "transfer learning, VGG-16" of the paper's table 10 leaves their sizes open.

    Args:
        stage_channels: channels of the feature map after each stage.
    """

    def __init__(self, stage_channels: Sequence[int]) -> None:
        super().__init__()
        channels = stage_channels[-1]
        self.pool = nn.AdaptiveAvgPool2d(_SIDE)
        self.layer = nn.Sequential(nn.Linear(_SIDE * _SIDE * channels, channels), nn.ReLU())

    def forward(self, maps_nchw: Sequence[Tensor]) -> Tensor:
        """Return (n, channels of the last map)."""
        pooled: Tensor = self.layer(self.pool(maps_nchw[-1]).flatten(1))
        return pooled

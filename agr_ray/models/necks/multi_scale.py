"""Pooling of the last three feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_NUM_MAPS = 3


class MultiScale(nn.Module):
    """The means of each channel of the last three feature maps (c3, c4 and c5 of a ResNet), mixed by a linear layer.

    The row "multi-task, multi-instance, multi-scale" of the paper's table 11 leaves the fusion open: the means are
    concatenated, mapped to the channels of the last map, and rectified. A backbone with fewer stages gives fewer maps.

    Args:
        stage_channels: channels of the feature map after each stage.
    """

    def __init__(self, stage_channels: Sequence[int]) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.mix = nn.Sequential(nn.Linear(sum(stage_channels[-_NUM_MAPS:]), stage_channels[-1]), nn.ReLU())

    def forward(self, maps_nchw: Sequence[Tensor]) -> Tensor:
        """Return (n, channels of the last map)."""
        pooled = torch.cat([self.pool(each).flatten(1) for each in maps_nchw[-_NUM_MAPS:]], dim=1)
        mixed: Tensor = self.mix(pooled)
        return mixed

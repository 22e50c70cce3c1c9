"""Global average pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class AveragePool(nn.Module):
    """The mean of each channel of the last feature map.

    Args:
        stage_channels: channels of the feature map after each stage.
    """

    def __init__(self, stage_channels: Sequence[int]) -> None:  # noqa: ARG002  # as all necks
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, maps_nchw: Sequence[Tensor]) -> Tensor:
        """Return (n, channels of the last map)."""
        pooled: Tensor = self.pool(maps_nchw[-1])
        return pooled.flatten(1)

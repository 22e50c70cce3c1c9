"""Global average pooling."""

from __future__ import annotations

from torch import Tensor, nn


class AveragePool(nn.Module):
    """The mean of each channel.

    Args:
        num_channels: of the feature map.
    """

    def __init__(self, num_channels: int) -> None:  # noqa: ARG002  # as all necks
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, feature_map_nchw: Tensor) -> Tensor:
        """Return (n, num_channels)."""
        pooled: Tensor = self.pool(feature_map_nchw)
        return pooled.flatten(1)

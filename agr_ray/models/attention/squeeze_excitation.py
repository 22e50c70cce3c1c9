"""Squeeze-and-excitation: channel attention."""

from __future__ import annotations

from torch import Tensor, nn

_REDUCTION = 16


class SqueezeExcitation(nn.Module):
    """Multiply each channel by a gate computed from the means of all channels.

    Source: Hu, Shen and Sun, "Squeeze-and-Excitation Networks", CVPR 2018, equations 2 to 4, reduction ratio 16.

    Args:
        num_channels: of the feature map.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        hidden = max(num_channels // _REDUCTION, 1)
        self.gate = nn.Sequential(
            nn.Linear(num_channels, hidden), nn.ReLU(), nn.Linear(hidden, num_channels), nn.Sigmoid()
        )

    def forward(self, feature_map_nchw: Tensor) -> Tensor:
        """Return the reweighted map, of the same shape."""
        gates: Tensor = self.gate(feature_map_nchw.mean(dim=(2, 3)))
        return feature_map_nchw * gates[:, :, None, None]

"""Shuffle attention: channel and spatial attention in groups of channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NUM_GROUPS = 64


class ShuffleAttention(nn.Module):
    """Gate half of the channels by their means and half by their normalised values, in groups, and shuffle channels.

    Source: Zhang and Yang, "SA-Net: Shuffle Attention for Deep Convolutional Neural Networks", ICASSP 2021 (arXiv
    2102.00240), equations 1 to 4, with 64 groups, or the most that divide the channels into halves. The group norm of
    the spatial half has its own scale and shift for each channel, as in the authors' code.

    Args:
        num_channels: of the feature map, even.
    """

    reorders_channels = True
    """Layers after this block that were trained without it would read the wrong channels."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self._num_groups = next(groups for groups in range(_NUM_GROUPS, 0, -1) if num_channels % (2 * groups) == 0)
        half = num_channels // (2 * self._num_groups)
        self.channel_scale = nn.Parameter(torch.zeros(half, 1, 1))
        self.channel_shift = nn.Parameter(torch.ones(half, 1, 1))
        self.place_scale = nn.Parameter(torch.zeros(half, 1, 1))
        self.place_shift = nn.Parameter(torch.ones(half, 1, 1))
        self.norm = nn.GroupNorm(half, half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, feature_map_nchw: Tensor) -> Tensor:
        """Return the reweighted and shuffled map, of the same shape."""
        n, channels, height, width = feature_map_nchw.shape
        grouped = feature_map_nchw.reshape(n * self._num_groups, -1, height, width)
        first, second = grouped.chunk(2, dim=1)
        by_channel = first.mean(dim=(2, 3), keepdim=True) * self.channel_scale + self.channel_shift
        by_place = self.norm(second) * self.place_scale + self.place_shift
        halves = torch.cat([first * by_channel.sigmoid(), second * by_place.sigmoid()], dim=1)
        shuffled: Tensor = self.shuffle(halves.reshape(n, channels, height, width))
        return shuffled

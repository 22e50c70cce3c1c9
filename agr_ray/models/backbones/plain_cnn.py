"""A small plain CNN, for comparison."""

from __future__ import annotations

import torch
from torch import nn

from agr_ray.models.backbones.staged import StagedBackbone, fold_batch_norms

_CHANNELS = (32, 64, 128, 256)


class PlainCNN(StagedBackbone):
    """Four blocks of a 3 x 3 convolution, batch norm, ReLU and 2 x 2 max-pooling, trained from random weights.

    The row "CNN-based age, gender, ethnicity" of the paper's table 11 gives no layers. These are ours: the usual
    pattern, with channels doubled from 32 to 256.
    """

    trunk = ("blocks",)

    def __init__(self, name: str) -> None:  # noqa: ARG002  # as all backbones
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels in _CHANNELS:
            layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
            before = channels
        self.blocks = nn.Sequential(*layers)
        self.num_features = before
        self.arrange()

    def fuse(self, device: torch.device) -> bool:  # noqa: ARG002  # the same on all devices
        """Fold batch norms."""
        fold_batch_norms(self)
        return True

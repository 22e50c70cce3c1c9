"""torchvision's VGG-16 (Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015)."""

from __future__ import annotations

from typing import Any

import torch

from agr_ray.models.backbones.torchvision_backbone import TorchvisionBackbone


class VGG(TorchvisionBackbone):
    """The convolutions and poolings. The neck `fully_connected` takes the place of its three linear layers."""

    trunk = ("features",)
    replaced_layers = ("classifier.",)

    def take(self, net: Any) -> None:
        """Take the convolutions and poolings."""
        self.features = net.features
        self.num_features = int(net.features[-3].out_channels)

    def fuse(self, device: torch.device) -> bool:  # noqa: ARG002  # there are no batch norms
        """Fuse nothing."""
        return True

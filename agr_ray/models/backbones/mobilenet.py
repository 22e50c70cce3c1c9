"""torchvision's MobileNetV3s (Howard et al., "Searching for MobileNetV3", ICCV 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from agr_ray.models.backbones.staged import fold_batch_norms
from agr_ray.models.backbones.torchvision_backbone import TorchvisionBackbone


class MobileNetV3(TorchvisionBackbone):
    """All layers except the last; the linear layer after pooling is `project`."""

    trunk = ("features",)
    replaced_layers = ("classifier.3.",)

    def take(self, net: Any) -> None:
        """Take the convolutions and the first linear layer, without its dropout: `model.dropout` sets that."""
        self.num_features = int(net.classifier[3].in_features)
        self.features = net.features
        self.classifier = nn.Sequential(net.classifier[0], net.classifier[1])

    def project(self, pooled: Tensor) -> Tensor:
        """Apply the linear layer and its activation."""
        features: Tensor = self.classifier(pooled)
        return features

    def fuse(self, device: torch.device) -> bool:  # noqa: ARG002  # the same on all devices
        """Fold batch norms."""
        fold_batch_norms(self)
        return True

"""torchvision's EfficientNets (Tan and Le, "EfficientNet: Rethinking Model Scaling for CNNs", ICML 2019)."""

from __future__ import annotations

from typing import Any

import torch

from agr_ray.models.backbones.staged import fold_batch_norms
from agr_ray.models.backbones.torchvision_backbone import TorchvisionBackbone


class EfficientNet(TorchvisionBackbone):
    """All convolutions. The dropout before the last layer is left out: `model.dropout` sets that."""

    trunk = ("features",)
    replaced_layers = ("classifier.",)

    def take(self, net: Any) -> None:
        """Take the convolutions."""
        self.num_features = int(net.classifier[-1].in_features)
        self.features = net.features

    def fuse(self, device: torch.device) -> bool:  # noqa: ARG002  # the same on all devices
        """Fold batch norms."""
        fold_batch_norms(self)
        return True

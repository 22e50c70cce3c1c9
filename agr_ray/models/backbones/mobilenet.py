"""torchvision's MobileNetV3s (Howard et al., "Searching for MobileNetV3", ICCV 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from agr_ray.models.backbones.base import Backbone
from agr_ray.models.backbones.torchvision_parts import fold_batch_norms, published_weights, shrinking_stages


class MobileNetV3(Backbone):
    """All layers except the last, with torchvision's names. The linear layer after pooling is `project`."""

    replaced_layers = ("classifier.3.",)

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        net: Any = torchvision.models.get_model(name, weights=None)
        self.num_channels = int(net.classifier[0].in_features)
        self.num_features = int(net.classifier[3].in_features)
        self.features = net.features
        # Without its dropout of 20 %, because `model.dropout` sets that.
        self.classifier = nn.Sequential(net.classifier[0], net.classifier[1])

    def forward(self, images_nchw: Tensor) -> Tensor:
        """Return the feature map at 1/32 of the input's side."""
        feature_map: Tensor = self.features(images_nchw)
        return feature_map

    def project(self, pooled: Tensor) -> Tensor:
        """Apply the linear layer and its activation."""
        features: Tensor = self.classifier(pooled)
        return features

    def stages(self) -> list[list[nn.Parameter]]:
        """Return five stages."""
        return shrinking_stages(self)

    def imagenet_weights(self) -> Mapping[str, Tensor]:
        """Download torchvision's weights."""
        return published_weights(self._name)

    def fuse(self, device: torch.device) -> bool:  # noqa: ARG002  # the same on all devices
        """Fold batch norms."""
        fold_batch_norms(self)
        return True

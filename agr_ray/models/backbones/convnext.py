"""torchvision's ConvNeXt-T (Liu et al., "A ConvNet for the 2020s", CVPR 2022)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agr_ray.models.backbones.torchvision_backbone import TorchvisionBackbone


class ConvNeXt(TorchvisionBackbone):
    """All layers except the last; the layer norm after pooling is `project`."""

    trunk = ("features",)
    replaced_layers = ("classifier.2.",)

    def take(self, net: Any) -> None:
        """Take the convolutions and the layer norm."""
        self.features = net.features
        self.classifier = net.classifier[:1]
        self.num_features = int(net.classifier[2].in_features)

    def project(self, pooled: Tensor) -> Tensor:
        """Normalise the features."""
        features: Tensor = self.classifier(pooled[:, :, None, None]).flatten(1)
        return features

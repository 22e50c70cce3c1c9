"""torchvision's Swin-T (Liu et al., "Swin Transformer", ICCV 2021)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.models.swin_transformer import PatchMerging

from agr_ray.models.backbones.base import After
from agr_ray.models.backbones.torchvision_backbone import TorchvisionBackbone


class Swin(TorchvisionBackbone):
    """All layers except the last. Its maps are channels-last inside."""

    trunk = ("features",)
    shrinking = (PatchMerging,)
    replaced_layers = ("head.",)

    def take(self, net: Any) -> None:
        """Take the stages and the layer norm of the last feature map."""
        self.features = net.features
        self.norm = net.norm
        self.num_features = int(net.head.in_features)

    def feature_maps(self, images_nchw: Tensor, after: After) -> list[Tensor]:
        """Return the feature map after each stage, the last one normalised."""
        last = len(self._sizes) - 1

        def changed(index: int, map_nhwc: Tensor) -> Tensor:
            normalised = self.norm(map_nhwc) if index == last else map_nhwc
            return after(index, normalised.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

        return [map_nhwc.permute(0, 3, 1, 2) for map_nhwc in super().feature_maps(images_nchw, changed)]

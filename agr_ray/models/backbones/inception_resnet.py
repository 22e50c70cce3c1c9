"""facenet-pytorch's Inception-ResNet-v1 (Schroff et al., "FaceNet", CVPR 2015; Szegedy et al., AAAI 2017).

Its weights of VGGFace2 and CASIA-WebFace are files of facenet-pytorch's releases.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor, nn

from agr_ray.errors import ConfigError
from agr_ray.models.backbones.base import After, download
from agr_ray.models.backbones.staged import StagedBackbone, fold_batch_norms
from agr_ray.models.transform import IMAGENET_MEAN, IMAGENET_STD

_FILES: Final = {"vggface2": "20180402-114759-vggface2.pt", "casia-webface": "20180408-102900-casia-webface.pt"}


class InceptionResNet(StagedBackbone):
    """All layers up to the embedding of 512 numbers, under facenet-pytorch's names. Images need 80 pixels or more."""

    trunk = (
        *("conv2d_1a", "conv2d_2a", "conv2d_2b", "maxpool_3a", "conv2d_3b", "conv2d_4a", "conv2d_4b", "repeat_1"),
        *("mixed_6a", "repeat_2", "mixed_7a", "repeat_3", "block8"),
    )
    min_side_px = 80
    published = tuple(_FILES)
    replaced_layers = ("logits.",)
    scale: Tensor
    shift: Tensor

    def __init__(self, name: str) -> None:  # noqa: ARG002  # as all backbones
        super().__init__()
        self.check_available()
        from facenet_pytorch import InceptionResnetV1

        net: Any = InceptionResnetV1(pretrained=None)
        for layer in self.trunk:
            self.add_module(layer, getattr(net, layer))
        self.last_linear: nn.Module = net.last_linear
        self.last_bn: nn.Module = net.last_bn
        self.num_features = int(net.last_linear.out_features)
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        # From ImageNet's normalisation to the one of the published weights: (pixel - 127.5) / 128, pixels 0 to 255.
        self.register_buffer("scale", (std * 255 / 128)[:, None, None], persistent=False)
        self.register_buffer("shift", ((mean * 255 - 127.5) / 128)[:, None, None], persistent=False)
        self.arrange()

    @classmethod
    def check_available(cls) -> None:
        """Check that facenet-pytorch is installed.

        It is not a dependency, because it requires old versions of torch, numpy and Pillow. It works with current ones.

        Raises:
            ConfigError: it is not.
        """
        if find_spec("facenet_pytorch") is None:
            raise ConfigError(
                "the backbone inception_resnet_v1 needs a package: pip install --no-deps facenet-pytorch==2.6.0"
            )

    def feature_maps(self, images_nchw: Tensor, after: After) -> list[Tensor]:
        """Return the feature map after each stage of images in ImageNet's normalisation."""
        return super().feature_maps(images_nchw * self.scale + self.shift, after)

    def published_weights(self, name: str) -> Mapping[str, Tensor]:
        """Download facenet-pytorch's weights.

        Raises:
            WeightsError: the download failed.
        """
        url = f"https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/{_FILES[name]}"
        return download(
            url, lambda: torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, weights_only=True)
        )

    def project(self, pooled: Tensor) -> Tensor:
        """Return the embedding, not scaled to unit length: facenet-pytorch's classifier has no scaling either."""
        embedding: Tensor = self.last_bn(self.last_linear(pooled))
        return embedding

    def fuse(self, device: torch.device) -> bool:  # noqa: ARG002  # the same on all devices
        """Fold batch norms."""
        fold_batch_norms(self)
        return True

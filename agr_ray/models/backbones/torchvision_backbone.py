"""torchvision's networks as backbones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torchvision
from torch import Tensor

from agr_ray.models.backbones.base import download
from agr_ray.models.backbones.staged import StagedBackbone


class TorchvisionBackbone(StagedBackbone):
    """Layers of a torchvision network, under torchvision's names.

    Args:
        name: of the network in `torchvision.models`.
    """

    published = ("imagenet",)

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self.take(torchvision.models.get_model(name, weights=None))
        self.arrange()

    def take(self, net: Any) -> None:
        """Register the layers of the network, and set `num_features`."""
        raise NotImplementedError

    def published_weights(self, name: str) -> Mapping[str, Tensor]:  # noqa: ARG002  # there is only one
        """Download torchvision's best weights.

        Raises:
            WeightsError: the download failed.
        """
        return imagenet_weights(self._name)


def imagenet_weights(name: str) -> Mapping[str, Tensor]:
    """Download torchvision's best weights of a network.

    Raises:
        WeightsError: the download failed.
    """
    weights: Any = torchvision.models.get_model_weights(name).DEFAULT
    return download(
        weights.url, lambda: dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    )

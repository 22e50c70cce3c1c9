"""The interface of all backbones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightsError(Exception):
    """Pretrained weights can't be read, or do not fit the backbone. The message is one line."""


class Backbone(nn.Module):
    """Maps normalised images, (n, 3, side, side) float, to a feature map, (n, num_channels, h, w).

    A subclass sets `num_channels` and `num_features`, and defines `forward`. It may override the other methods.
    """

    num_channels: int
    """Channels of the feature map."""
    num_features: int
    """Number of features after pooling and `project`."""
    replaced_layers: tuple[str, ...] = ()
    """Name prefixes of tensors in published state dicts that the heads replace."""

    def project(self, pooled: Tensor) -> Tensor:
        """Map the pooled feature map, (n, num_channels), to (n, num_features)."""
        return pooled

    def stages(self) -> list[list[nn.Parameter]]:
        """Return all parameters in stages, from the image to the features (`train.layer_decay`)."""
        return [list(self.parameters())]

    def imagenet_weights(self) -> Mapping[str, Tensor]:
        """Download the published weights, named as in `state_dict`.

        Raises:
            WeightsError: there are no published weights, or the download failed.
        """
        raise WeightsError("this backbone has no published ImageNet weights; allowed: none, or a path or URI")

    def fuse(self, device: torch.device) -> bool:  # noqa: ARG002  # for subclasses
        """Fuse layers in place for inference on this device, in evaluation mode, without changing the function.

        Returns:
            Whether all layers may also compute in bfloat16 outside autocast, inputs included.
        """
        return False

"""Functions for torchvision's networks: published weights, stages, and folding of batch norms."""

from __future__ import annotations

import http.client
from typing import Any, cast

import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from agr_ray.models.backbones.base import WeightsError


def published_weights(name: str) -> dict[str, Tensor]:
    """Download torchvision's ImageNet weights of a network.

    Raises:
        WeightsError: the download failed.
    """
    weights: Any = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return cast(dict[str, Tensor], dict(weights.get_state_dict(progress=False, check_hash=True)))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"weights imagenet: {weights.url} could not be downloaded: {reason}; "
            "with no network, set model.pretrained to the path of that file, or to none"
        ) from None


def shrinking_stages(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters in stages. A stage begins at each block that shrinks the feature map.

    torchvision's ResNets and MobileNetV3s have five, at 1/2 to 1/32 of the input's side. Blocks must be registered in
    the order in which they run.
    """
    stages: list[list[nn.Parameter]] = [[]]
    for child in backbone.children():
        for block in child if isinstance(child, nn.Sequential) else [child]:
            if stages[-1] and any(map(_shrinks, block.modules())):
                stages.append([])
            stages[-1].extend(block.parameters())
    assert sum(map(len, stages)) == len(list(backbone.parameters())), "a parameter outside the backbone's blocks"
    return stages


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution registered right before it: in torchvision's networks, its input."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(module, name, nn.Identity())
        fold_batch_norms(child)
        before = name, child


def _shrinks(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return False
    stride = module.stride
    return (max(stride) if isinstance(stride, tuple) else stride) > 1

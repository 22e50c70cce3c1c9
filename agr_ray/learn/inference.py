"""A trained network -> one that only predicts: the same function, computed in less time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from agr_ray.learn.precision import uses_bfloat16
from agr_ray.models.network import MultiTaskNet


def for_inference(model: MultiTaskNet, precision: str) -> MultiTaskNet:
    """Return a copy that predicts the same in less time, and can't be trained.

    Batch norms become part of the convolutions before them, channels are last in memory, and the trunk's weights are
    bfloat16 where `precision` asks for it: autocast would convert them again for every batch.

    Args:
        model: in evaluation mode, on the device where it will run.
        precision: of `PredictConfig`; predict with the same.
    """
    assert not model.training
    device = next(model.parameters()).device
    made = copy.deepcopy(model).requires_grad_(False)
    _fold_batch_norms(made.trunk)
    dtype = torch.bfloat16 if uses_bfloat16(device, precision) else torch.float32
    made.trunk = _Trunk(made.trunk.to(device, dtype).to(memory_format=torch.channels_last), dtype)
    return made


class _Trunk(nn.Module):
    """A trunk that takes and gives float32, whatever its weights are."""

    def __init__(self, trunk: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.trunk = trunk
        self._dtype = dtype

    def forward(self, images_nchw: Tensor) -> Tensor:
        features: Tensor = self.trunk(images_nchw.to(self._dtype, memory_format=torch.channels_last))
        return features.float()


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm that stands right after a convolution, as they do in all of torchvision's trunks."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(module, name, nn.Identity())
        _fold_batch_norms(child)
        before = name, child

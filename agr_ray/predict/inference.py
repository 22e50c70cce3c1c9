"""Turn a trained network into one that only predicts: the same function, computed faster."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from agr_ray.models.backbones.base import After, Backbone
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.precision import compute_dtype


def for_inference(model: MultiTaskNet, precision: str) -> MultiTaskNet:
    """Return a copy that predicts the same faster, and cannot be trained. Its memory format is channels-last.

    If the backbone supports it (`Backbone.fuse`), its layers are fused and its weights are cast to the data type of
    `precision`: autocast would convert them again for every batch. Other backbones stay as they are.

    Args:
        model: in evaluation mode, on the device where it will run.
        precision: of `PredictConfig`; predict with the same.
    """
    assert not model.training
    device = next(model.parameters()).device
    fused = copy.deepcopy(model).requires_grad_(False)
    if fused.backbone.fuse(device):
        fused.backbone = _CastBackbone(fused.backbone, compute_dtype(device, precision)).eval()
    return fused.to(memory_format=torch.channels_last)


class _CastBackbone(Backbone):
    """A backbone whose weights have one data type, and whose inputs are cast to it."""

    def __init__(self, backbone: Backbone, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = backbone.to(dtype)
        self._dtype = dtype

    @property
    def stage_channels(self) -> tuple[int, ...]:
        return self.backbone.stage_channels

    def feature_maps(self, images_nchw: Tensor, after: After) -> list[Tensor]:
        def cast(index: int, feature_map: Tensor) -> Tensor:
            return after(index, feature_map).to(self._dtype)  # an attention block may compute in another type

        return self.backbone.feature_maps(images_nchw.to(self._dtype, memory_format=torch.channels_last), cast)

    def project(self, pooled: Tensor) -> Tensor:
        return self.backbone.project(pooled.to(self._dtype))

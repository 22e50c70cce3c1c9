"""A trained network -> one that only predicts: the same function, computed in less time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from agr_ray.models.network import MultiTaskNet
from agr_ray.models.precision import compute_dtype


def for_inference(model: MultiTaskNet, precision: str) -> MultiTaskNet:
    """Return a copy that predicts the same in less time, and can't be trained.

    Batch norms become part of the convolutions before them, channels are last in memory, and the backbone's weights are
    bfloat16 where `precision` asks for it: autocast would convert them again for every batch. On a CPU a ResNet's
    additions and ReLUs are done by its convolutions, an eighth of the time.

    Args:
        model: in evaluation mode, on the device where it will run.
        precision: of `PredictConfig`; predict with the same.
    """
    assert not model.training
    device = next(model.parameters()).device
    made = copy.deepcopy(model).requires_grad_(False)
    _fold_batch_norms(made.backbone)
    dtype = compute_dtype(device, precision)
    made.backbone = _Backbone(made.backbone.to(device, dtype).to(memory_format=torch.channels_last), dtype)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        _fuse_activations(made.backbone)
    return made


class _Backbone(nn.Module):
    """A backbone that takes and gives float32, whatever its weights are."""

    def __init__(self, backbone: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = backbone
        self._dtype = dtype

    def forward(self, images_nchw: Tensor) -> Tensor:
        features: Tensor = self.backbone(images_nchw.to(self._dtype, memory_format=torch.channels_last))
        return features.float()


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm that stands right after a convolution, as they do in all of torchvision's backbones."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(module, name, nn.Identity())
        _fold_batch_norms(child)
        before = name, child


def _fuse_activations(module: nn.Module) -> None:
    """Have the convolutions of torchvision's ResNets add and rectify."""
    for name, child in list(module.named_children()):
        if isinstance(child, BasicBlock | Bottleneck):
            setattr(module, name, _FusedBlock(child))
            continue
        if isinstance(child, ResNet):
            child.conv1, child.relu = _FusedConv(child.conv1, "relu"), nn.Identity()
        _fuse_activations(child)


class _FusedConv(nn.Module):
    """A convolution and what follows it, by the oneDNN operators that `torch.compile` puts in their place."""

    def __init__(self, conv: nn.Conv2d, then: str) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self._then = then

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self._geometry, self._then, [], ""
        )
        return y

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return relu(y + conv(x)), which takes the place of `y`."""
        added: Tensor = torch.ops.mkldnn._convolution_pointwise_(
            y, x, self.weight, self.bias, *self._geometry, "add", 1.0, "relu", [], ""
        )
        return added


class _FusedBlock(nn.Module):
    """A residual block whose batch norms are folded."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        convs = [block.conv1, block.conv2] + ([block.conv3] if isinstance(block, Bottleneck) else [])
        self.first = nn.Sequential(*(_FusedConv(conv, "relu") for conv in convs[:-1]))
        self.last = _FusedConv(convs[-1], "none")
        self.downsample = block.downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last.add_to(x if self.downsample is None else self.downsample(x), y)

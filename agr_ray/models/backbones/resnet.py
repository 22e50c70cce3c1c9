"""torchvision's ResNets (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from agr_ray.models.backbones.staged import TorchvisionBackbone, fold_batch_norms


class ResNet(TorchvisionBackbone):
    """All layers up to the last feature map, at 1/32 of the input's side."""

    trunk = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    replaced_layers = ("fc.",)
    conv1: nn.Module
    relu: nn.Module

    def take(self, net: Any) -> None:
        """Take all layers but the last."""
        self.num_features = int(net.fc.in_features)
        for layer in self.trunk:
            self.add_module(layer, getattr(net, layer))

    def fuse(self, device: torch.device) -> bool:
        """Fold batch norms. On a CPU, also fuse additions and ReLUs into convolutions: 10 % less time."""
        fold_batch_norms(self)
        if device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            self.conv1, self.relu = _FusedConv(self.conv1, "relu"), nn.Identity()
            for stage in self.children():
                for name, block in list(stage.named_children()):
                    if isinstance(block, BasicBlock | Bottleneck):
                        setattr(stage, name, _FusedBlock(block))
        return True


class _FusedConv(nn.Module):
    """A convolution fused with its ReLU or addition, by the oneDNN operators that `torch.compile` uses."""

    def __init__(self, conv: Any, then: str) -> None:
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
        """Return relu(y + conv(x)), computed in the memory of `y`."""
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

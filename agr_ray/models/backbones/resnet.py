"""ResNets (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016), with torchvision's names and strides.

The layers are our own, because these networks score most, and torchvision takes long to import: decision 52.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from agr_ray.models.backbones.staged import StagedBackbone, fold_batch_norms

_BASIC: Final = (3, 3)
_BOTTLENECK: Final = (1, 3, 1)
"""Sides of the kernels of a block."""
_EXPANSION: Final = 4  # channels of a bottleneck's result, as a multiple of those inside
_BLOCKS: Final = {
    "resnet18": (_BASIC, (2, 2, 2, 2)),
    "resnet34": (_BASIC, (3, 4, 6, 3)),
    "resnet50": (_BOTTLENECK, (3, 4, 6, 3)),
    "resnet101": (_BOTTLENECK, (3, 4, 23, 3)),
}
"""Kernels, and blocks of each stage: table 1."""


class ResNet(StagedBackbone):
    """All layers up to the last feature map, at 1/32 of the input's side.

    Args:
        name: of the network.
    """

    trunk = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    published = ("imagenet",)
    replaced_layers = ("fc.",)
    conv1: nn.Module
    relu: nn.Module

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self.conv1 = _conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        kernels, sizes = _BLOCKS[name]
        num_channels = 64
        for stage, size in enumerate(sizes):
            blocks = []
            for place in range(size):
                stride = 2 if stage and not place else 1
                blocks.append(ResidualBlock(num_channels, 64 * 2**stage, stride, kernels))
                num_channels = blocks[-1].num_outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.num_features = num_channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.arrange()

    def published_weights(self, name: str) -> Mapping[str, Tensor]:  # noqa: ARG002  # there is only one
        """Download torchvision's best weights.

        Raises:
            WeightsError: the download failed.
        """
        from agr_ray.models.backbones.torchvision_backbone import imagenet_weights  # imports torchvision

        return imagenet_weights(self._name)

    def fuse(self, device: torch.device) -> bool:
        """Fold batch norms. On a CPU, also fuse additions and ReLUs into convolutions: 10 % less time."""
        fold_batch_norms(self)
        if device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            self.conv1, self.relu = _FusedConv(self.conv1, "relu"), nn.Identity()
            for stage in self.children():
                for name, block in list(stage.named_children()):
                    if isinstance(block, ResidualBlock):
                        setattr(stage, name, _FusedBlock(block))
        return True


class ResidualBlock(nn.Module):
    """Add the result of convolutions, each with a batch norm, to their input.

    Args:
        num_inputs: channels.
        width: channels between the convolutions.
        stride: of the block; that of its first convolution with a kernel of 3 x 3.
        kernels: side of each convolution's kernel.
    """

    def __init__(self, num_inputs: int, width: int, stride: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.num_outputs = width * (_EXPANSION if len(kernels) == len(_BOTTLENECK) else 1)
        self._numbers = range(1, len(kernels) + 1)
        channels = [num_inputs, *[width] * (len(kernels) - 1), self.num_outputs]
        for place, kernel in enumerate(kernels):
            its_stride = stride if place == kernels.index(3) else 1
            self.add_module(f"conv{place + 1}", _conv(channels[place], channels[place + 1], kernel, its_stride))
            self.add_module(f"bn{place + 1}", nn.BatchNorm2d(channels[place + 1]))
        self.downsample: nn.Module | None = None
        if stride != 1 or num_inputs != self.num_outputs:
            shortcut = _conv(num_inputs, self.num_outputs, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(self.num_outputs))

    def layers(self) -> list[tuple[Any, Any]]:
        """Return each convolution and its batch norm."""
        return [(getattr(self, f"conv{number}"), getattr(self, f"bn{number}")) for number in self._numbers]

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, num_outputs, h, w)."""
        y = x
        for place, (conv, norm) in enumerate(self.layers()):
            y = norm(conv(functional.relu(y, inplace=True) if place else y))
        y += x if self.downsample is None else self.downsample(x)
        return functional.relu(y, inplace=True)


def _conv(num_inputs: int, num_outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(num_inputs, num_outputs, kernel, stride, padding=kernel // 2, bias=False)


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

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        *first, last = (conv for conv, _ in block.layers())
        self.first = nn.Sequential(*(_FusedConv(conv, "relu") for conv in first))
        self.last = _FusedConv(last, "none")
        self.downsample = block.downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last.add_to(x if self.downsample is None else self.downsample(x), y)

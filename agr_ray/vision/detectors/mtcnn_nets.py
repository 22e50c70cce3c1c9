"""MTCNN's three nets (Zhang et al. 2016, figure 2), arranged for speed on a CPU.

Their weights are in mtcnn.safetensors: those of facenet-pytorch 2.6 (MIT licence, in mtcnn.LICENSE), under its names.
The nets take pixels from 0 to 255: the scaling to about -1..1 with which they were trained is folded into the first
layer.
"""

from __future__ import annotations

import functools
import math
from importlib.resources import as_file, files
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from agr_ray.device import has_bfloat16

Proposals = tuple[Tensor, Tensor, Tensor]
"""Of k windows of a strip: numbers (k,), counted row by row, probabilities of a face (k,) and regressions (k, 4)."""


class Nets(Protocol):
    """The three nets. Inputs are uint8, outputs float32."""

    def propose(self, strip_rgb: NDArray[np.uint8], threshold: float) -> Proposals:
        """Run P-Net over a strip of the sheet (height, width, 3); return the windows of at least that probability."""
        ...

    def refine(self, crops_nhwc: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """Run R-Net over crops (n, 24, 24, 3); return box regressions (n, 4) and probabilities (n, 2)."""
        ...

    def output(self, crops_nhwc: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """Run O-Net over crops (n, 48, 48, 3); return regressions (n, 4), landmarks (n, 10), probabilities (n, 2)."""
        ...


class TorchNets:
    """The nets in PyTorch, in bfloat16 if the CPU supports it."""

    def __init__(self) -> None:
        self._dtype = torch.bfloat16 if has_bfloat16(torch.device("cpu")) else torch.float32
        self._p_net = ProposalNet().to(self._dtype)
        self._r_net, self._o_net = refine_net().to(self._dtype), output_net().to(self._dtype)

    def propose(self, strip_rgb: NDArray[np.uint8], threshold: float) -> Proposals:
        """As `Nets.propose`."""
        net = self._p_net
        features = net.features(self._input(strip_rgb[None])).permute(0, 2, 3, 1).flatten(0, 2)
        probabilities = net.face_logit(features)[:, 0].float().sigmoid()
        passed = (probabilities >= threshold).nonzero()[:, 0]
        # Not in bfloat16: oneDNN would compile and keep a kernel for each number of windows, 1 MiB each.
        regressions = functional.linear(features[passed].float(), net.box.weight.float(), net.box.bias.float())
        return passed, probabilities[passed], regressions

    def refine(self, crops_nhwc: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """As `Nets.refine`."""
        return tuple(each.float() for each in self._r_net(self._input(crops_nhwc)))

    def output(self, crops_nhwc: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """As `Nets.output`."""
        return tuple(each.float() for each in self._o_net(self._input(crops_nhwc)))

    def _input(self, images_nhwc: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(images_nhwc).permute(0, 3, 1, 2).to(self._dtype)


class ProposalNet(nn.Module):
    """The layers of P-Net. There is no `forward`: the cascade runs `box`, the box regression, only where faces are."""

    def __init__(self) -> None:
        super().__init__()
        weights = read_weights("pnet")
        self.features = _features(weights, kernels=(3, 3, 3), pools=(2, None, None))
        self.face_logit, self.box = nn.Linear(32, 1), nn.Linear(32, 4)
        with torch.no_grad():
            for layer, name in ((self.face_logit, "face"), (self.box, "conv4_2")):
                layer.weight.copy_(weights[f"{name}.weight"].flatten(1))
                layer.bias.copy_(weights[f"{name}.bias"])
        self.eval().to(memory_format=torch.channels_last)


class CropNet(nn.Module):
    """R-Net or O-Net.

    Args:
        weights: of the net, by facenet-pytorch's names.
        kernels: side of each convolution's kernel.
        pools: side of the max-pooling after each convolution; None: there is none.
    """

    def __init__(self, weights: dict[str, Tensor], kernels: tuple[int, ...], pools: tuple[int | None, ...]) -> None:
        super().__init__()
        self.features = _features(weights, kernels, pools)
        number = len(kernels) + 1
        self.dense = _linear(weights, f"dense{number}")
        self.prelu = nn.PReLU(len(weights[f"prelu{number}.weight"]))
        with torch.no_grad():
            self.prelu.weight.copy_(weights[f"prelu{number}.weight"])
        self.face = _linear(weights, f"dense{number + 1}_1")
        others = (f"dense{number + 1}_{output}" for output in (2, 3))
        self.outputs = nn.ModuleList(_linear(weights, name) for name in others if f"{name}.weight" in weights)
        self.eval().to(memory_format=torch.channels_last)

    def forward(self, crops_nchw: Tensor) -> tuple[Tensor, ...]:
        """Return box regressions (n, 4), O-Net's landmarks (n, 10) and probabilities (n, 2), the second of a face.

        Landmarks are five x, then five y, as fractions of the crop's side.

        Args:
            crops_nchw: (n, 3, side, side) pixels.
        """
        maps = self.features(crops_nchw)
        # The weights expect columns before rows before channels.
        hidden = self.prelu(self.dense(maps.permute(0, 3, 2, 1).flatten(1)))
        return (*(output(hidden) for output in self.outputs), functional.softmax(self.face(hidden), dim=1))


def refine_net() -> CropNet:
    """Return R-Net, for crops of 24 pixels; it has no landmarks."""
    return CropNet(read_weights("rnet"), kernels=(3, 3, 2), pools=(3, 3, None))


def output_net() -> CropNet:
    """Return O-Net, for crops of 48 pixels."""
    return CropNet(read_weights("onet"), kernels=(3, 3, 3, 2), pools=(3, 3, 2, None))


class RowwisePReLU(nn.Module):
    """PReLU on channels-last maps; torch's own loops over the channels of each pixel, ours over a row of pixels."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of the same shape, (n, channels, height, width)."""
        num, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(num * height, width * channels)
        done = functional.prelu(rows, self.weight.repeat(width))
        return done.view(num, height, width, channels).permute(0, 3, 1, 2)


class MaxPool(nn.Module):
    """Max-pooling with stride 2 and partial windows at the ends, as with torch's `ceil_mode`.

    Slicing takes an eighth of torch's time for few maps.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of half the height and width; odd sides are rounded up if the window is even, else down."""
        missing_rows, missing_columns = ((self._size - side) % 2 for side in x.shape[2:])
        if missing_rows or missing_columns:
            x = functional.pad(x, (0, missing_columns, 0, missing_rows), value=-math.inf)
        last = self._size - 1
        x = functools.reduce(torch.maximum, [x[:, :, row : x.shape[2] - last + row : 2] for row in range(self._size)])
        columns = [x[..., column : x.shape[3] - last + column : 2] for column in range(self._size)]
        return functools.reduce(torch.maximum, columns)


_MEAN_PIXEL: Final = 127.5
_PIXEL_SCALE: Final = 128


def _features(weights: dict[str, Tensor], kernels: tuple[int, ...], pools: tuple[int | None, ...]) -> nn.Sequential:
    """Return the convolutions, each with its PReLU and max-pooling."""
    layers: list[nn.Module] = []
    for number, (kernel, pool) in enumerate(zip(kernels, pools, strict=True), start=1):
        weight, bias = weights[f"conv{number}.weight"], weights[f"conv{number}.bias"]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], kernel)
        with torch.no_grad():
            conv.weight.copy_(weight)
            assert conv.bias is not None
            conv.bias.copy_(bias)
        layers += [conv, RowwisePReLU(weights[f"prelu{number}.weight"]), *([] if pool is None else [MaxPool(pool)])]
    return nn.Sequential(*layers)


def _linear(weights: dict[str, Tensor], name: str) -> nn.Linear:
    num_outputs, num_inputs = weights[f"{name}.weight"].shape
    layer = nn.Linear(num_inputs, num_outputs)
    with torch.no_grad():
        layer.weight.copy_(weights[f"{name}.weight"])
        layer.bias.copy_(weights[f"{name}.bias"])
    return layer


def read_weights(net: str) -> dict[str, Tensor]:
    """Return the weights of `pnet`, `rnet` or `onet`, by facenet-pytorch's names, for pixels from 0 to 255.

    P-Net's last convolution becomes that of one logit, `face`, because the softmax of two is the sigmoid of their
    difference.
    """
    with as_file(files(__package__) / "mtcnn.safetensors") as path:
        stored = load_file(path)
    weights = {name.partition(".")[2]: value for name, value in stored.items() if name.startswith(f"{net}.")}
    first = weights["conv1.weight"]
    weights["conv1.bias"] = weights["conv1.bias"].sub(first.sum(dim=(1, 2, 3)), alpha=_MEAN_PIXEL / _PIXEL_SCALE)
    weights["conv1.weight"] = first / _PIXEL_SCALE
    if net == "pnet":
        for part in ("weight", "bias"):
            both = weights[f"conv4_1.{part}"]
            weights[f"face.{part}"] = both[1:] - both[:1]
    return weights

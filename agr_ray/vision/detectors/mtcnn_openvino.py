"""MTCNN's nets in OpenVINO, on CPUs: convolutions in int8, the rest in bfloat16 or float32, as the CPU supports.

The graphs have the weights of `mtcnn_nets`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from agr_ray.device import has_bfloat16
from agr_ray.openvino_extra import CompiledGraph, import_openvino
from agr_ray.vision.detectors.mtcnn_nets import Proposals, read_weights

_P_NET_RANGES: Final = ((0.0, 255.0), (-3.6, 13.6), (-7.4, 15.4), (-5.1, 17.3))
"""Ranges of the inputs of P-Net's four convolutions, as NNCF measured them on the pyramids of 32 photographs of people.
Values beyond them are clipped."""
_R_NET_RANGES: Final = ((0.0, 255.0), (-1.6, 3.9), (-1.4, 2.85))
"""The same for R-Net's three convolutions: 99.96 % of their inputs are in these ranges, for the candidates in 64 press
photographs."""
_O_NET_RANGES: Final = ((0.0, 255.0), (-1.2, 4.9), (-1.8, 4.7), (-0.95, 4.25))
"""The same for O-Net's four convolutions."""
_MAX_STRIPS: Final = 12
_WEIGHT_LEVELS: Final = 255
_ACTIVATION_LEVELS: Final = 256


class OpenVinoNets:
    """The nets of `mtcnn_nets.Nets`, on as many threads as PyTorch uses when it is built."""

    def __init__(self) -> None:
        self._floats = "bf16" if has_bfloat16(torch.device("cpu")) else "f32"
        self._num_threads = torch.get_num_threads()
        self._r_net, self._o_net = self._compiled(_refine_net()), self._compiled(_output_net())
        # One for each width of a strip, because it is slower with a width that may vary. Photographs that are shrunk to
        # 1,280 px have 12 widths; others may have hundreds, and each takes memory and threads.
        self._p_net = functools.lru_cache(_MAX_STRIPS)(
            lambda height, width: self._compiled(_proposal_net(height, width))
        )

    def propose(self, strip_rgb: NDArray[np.uint8], threshold: float) -> Proposals:
        """As `Nets.propose`."""
        logits, boxes = self._p_net(*strip_rgb.shape[:2])(strip_rgb[None])
        logits, boxes = logits.reshape(-1), boxes.reshape(4, -1)
        passed = np.flatnonzero(logits >= float(torch.tensor(threshold).logit()))
        return (
            torch.from_numpy(passed),
            torch.from_numpy(logits[passed]).sigmoid(),
            torch.from_numpy(np.ascontiguousarray(boxes[:, passed].T)),
        )

    def refine(self, crops_nhwc: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """As `Nets.refine`."""
        return tuple(map(torch.from_numpy, self._r_net(crops_nhwc)))

    def output(self, crops_nhwc: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """As `Nets.output`."""
        return tuple(map(torch.from_numpy, self._o_net(crops_nhwc)))

    def _compiled(self, graph: Any) -> CompiledGraph:
        return CompiledGraph(graph, self._num_threads, self._floats)


def _proposal_net(height: int, width: int) -> Any:
    """Return P-Net in int8, for a strip: logits of a face (1, 1, rows, columns), regressions (1, 4, rows, columns).

    `height` and `width` must be even.
    """
    assert height % 2 == width % 2 == 0
    openvino, weights = import_openvino(), read_weights("pnet")
    pixels, maps = _input((1, height, width, 3))
    maps = _features(_pooled_convolution(maps, weights), weights, (None, None), _P_NET_RANGES[1:3], first=2)
    maps = _rounded(maps, *_P_NET_RANGES[3])
    outputs = [_convolution(maps, weights, name) for name in ("face", "conv4_2")]
    return openvino.Model(outputs, [pixels])


def _refine_net() -> Any:
    return _crop_net("rnet", 24, (3, 3, None), _R_NET_RANGES)


def _output_net() -> Any:
    return _crop_net("onet", 48, (3, 3, 2, None), _O_NET_RANGES)


def _crop_net(name: str, side_px: int, pools: Sequence[int | None], ranges: Sequence[tuple[float, float]]) -> Any:
    """Return R-Net or O-Net for any number of crops, with the outputs of `CropNet` in the same order."""
    openvino, weights = import_openvino(), read_weights(name)
    ops = openvino.opset13
    pixels, maps = _input((-1, side_px, side_px, 3))
    maps = _features(maps, weights, pools, ranges)
    # The weights expect columns before rows before channels.
    flat = ops.reshape(ops.transpose(maps, ops.constant([0, 3, 2, 1])), ops.constant([0, -1]), special_zero=True)
    number = len(pools) + 1
    hidden = ops.prelu(_linear(flat, weights, f"dense{number}"), _constant(weights[f"prelu{number}.weight"]))
    others = [f"dense{number + 1}_{output}" for output in (2, 3)]
    outputs = [_linear(hidden, weights, each) for each in others if f"{each}.weight" in weights]
    face = ops.softmax(_linear(hidden, weights, f"dense{number + 1}_1"), 1)
    return openvino.Model([*outputs, face], [pixels])


def _input(shape: Sequence[int]) -> tuple[Any, Any]:
    """Return a graph's input (uint8 NHWC, of the given shape), and this input converted to float32 NCHW."""
    openvino = import_openvino()
    ops = openvino.opset13
    pixels = ops.parameter(list(shape), openvino.Type.u8)
    return pixels, ops.transpose(ops.convert(pixels, "f32"), ops.constant([0, 3, 1, 2]))


def _features(
    maps: Any,
    weights: dict[str, Tensor],
    pools: Sequence[int | None],
    ranges: Sequence[tuple[float, float]],
    first: int = 1,
) -> Any:
    """Apply the convolutions of `mtcnn_nets` from number `first` on, each with its PReLU and max-pooling.

    Args:
        maps: input of the first.
        weights: of the net.
        pools: side of the pooling window after each convolution; None: there is no pooling.
        ranges: to which the input of each convolution is clipped.
        first: number of the first convolution.
    """
    ops = import_openvino().opset13
    for number, (pool, limits) in enumerate(zip(pools, ranges, strict=True), start=first):
        maps = _convolution(_rounded(maps, *limits), weights, f"conv{number}")
        maps = ops.prelu(maps, _constant(weights[f"prelu{number}.weight"]))
        if pool is not None:
            maps = ops.max_pool(maps, [2, 2], [1, 1], [0, 0], [0, 0], [pool, pool], "ceil").output(0)
    return maps


def _pooled_convolution(pixels: Any, weights: dict[str, Tensor]) -> Any:
    """Return the maps after P-Net's first convolution, its PReLU and its max-pooling of 2 x 2.

    They are the maximum of four convolutions with a stride of 2, one for each position in a pooling window. The height
    and width of `pixels` must be even. With AVX-512, this takes a quarter less time than one convolution and OpenVINO's
    pooling, which needs the maps in another order in memory.
    """
    ops = import_openvino().opset13
    pixels = _rounded(pixels, *_P_NET_RANGES[0])
    slopes = _constant(weights["prelu1.weight"])
    places = []
    for top, left in itertools.product((0, 1), repeat=2):
        shifted = functional.pad(weights["conv1.weight"], (left, 0, top, 0))
        places.append(ops.prelu(_convolution(pixels, weights | {"conv1.weight": shifted}, "conv1", stride=2), slopes))
    return functools.reduce(ops.maximum, places)


def _convolution(maps: Any, weights: dict[str, Tensor], name: str, stride: int = 1) -> Any:
    ops = import_openvino().opset13
    weight = weights[f"{name}.weight"]
    # Twice the largest weight of each output channel, so that all are within 64 of 0: without VNNI, sums of products of
    # larger numbers overflow.
    end = 2 * weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    kernel = _rounded(_constant(weight), -end, end, _WEIGHT_LEVELS)
    product = ops.convolution(maps, kernel, [stride, stride], [0, 0], [0, 0], [1, 1])
    return ops.add(product, _constant(weights[f"{name}.bias"].reshape(1, -1, 1, 1)))


def _linear(rows: Any, weights: dict[str, Tensor], name: str) -> Any:
    ops = import_openvino().opset13
    product = ops.matmul(rows, _constant(weights[f"{name}.weight"]), False, True)
    return ops.add(product, _constant(weights[f"{name}.bias"].reshape(1, -1)))


def _rounded(values: Any, low: Tensor | float, high: Tensor | float, levels: int = _ACTIVATION_LEVELS) -> Any:
    """Round to evenly spaced levels, by which OpenVINO recognises what to compute in int8."""
    ends = [_constant(torch.as_tensor(end).reshape(-1, 1, 1, 1)) for end in (low, high)]
    return import_openvino().opset13.fake_quantize(values, *ends, *ends, levels)


def _constant(values: Tensor) -> Any:
    return import_openvino().opset13.constant(values.float().numpy())

"""MTCNN's nets in OpenVINO, on CPUs: P-Net in int8; R-Net and O-Net in bfloat16 if the CPU has it, else in float32.

The graphs have the weights of `mtcnn_nets`. Only P-Net is in int8, because the others find boxes and landmarks of its
candidates anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agr_ray.device import has_bfloat16
from agr_ray.openvino_extra import CompiledGraph, import_openvino
from agr_ray.vision.detectors.mtcnn_nets import Proposals, read_weights

_P_NET_RANGES: Final = ((0.0, 255.0), (-3.6, 13.6), (-7.4, 15.4), (-5.1, 17.3))
"""Ranges of the inputs of P-Net's four convolutions, as NNCF measured them on the pyramids of 32 photographs of people.
Values beyond them are clipped."""
_MAX_STRIPS: Final = 12
_WEIGHT_LEVELS: Final = 255
_ACTIVATION_LEVELS: Final = 256


class OpenVinoNets:
    """The nets of `mtcnn_nets.Nets`, on as many threads as PyTorch uses when it is built."""

    def __init__(self) -> None:
        self._floats = "bf16" if has_bfloat16(torch.device("cpu")) else "f32"
        self._num_threads = torch.get_num_threads()
        self._r_net = self._compiled(_crop_net("rnet", 24, pools=(3, 3, None)))
        self._o_net = self._compiled(_crop_net("onet", 48, pools=(3, 3, 2, None)))
        # One for each width of a strip, because it is slower with a width that may vary. Photographs that are shrunk to
        # 1,280 px have 12 widths; others may have hundreds, and each takes memory and threads.
        self._p_net = lru_cache(_MAX_STRIPS)(lambda height, width: self._compiled(_proposal_net(height, width)))

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
    """Return P-Net in int8, for a strip: logits of a face (1, 1, rows, columns), regressions (1, 4, rows, columns)."""
    openvino, weights = import_openvino(), read_weights("pnet")
    pixels, maps = _features(weights, (1, height, width, 3), (2, None, None), _P_NET_RANGES)
    maps = _rounded(maps, *_P_NET_RANGES[-1])
    outputs = [_convolution(maps, weights, name, is_int8=True) for name in ("face", "conv4_2")]
    return openvino.Model(outputs, [pixels])


def _crop_net(name: str, side_px: int, pools: Sequence[int | None]) -> Any:
    """Return R-Net or O-Net for any number of crops; the outputs are those of `CropNet`."""
    openvino, weights = import_openvino(), read_weights(name)
    ops = openvino.opset13
    pixels, maps = _features(weights, (-1, side_px, side_px, 3), pools)
    # The weights expect columns before rows before channels.
    flat = ops.reshape(ops.transpose(maps, ops.constant([0, 3, 2, 1])), ops.constant([0, -1]), special_zero=True)
    number = len(pools) + 1
    hidden = ops.prelu(_linear(flat, weights, f"dense{number}"), _constant(weights[f"prelu{number}.weight"]))
    others = [f"dense{number + 1}_{output}" for output in (2, 3)]
    outputs = [_linear(hidden, weights, each) for each in others if f"{each}.weight" in weights]
    face = ops.softmax(_linear(hidden, weights, f"dense{number + 1}_1"), 1)
    return openvino.Model([*outputs, face], [pixels])


def _features(
    weights: dict[str, Tensor],
    shape: Sequence[int],
    pools: Sequence[int | None],
    ranges: Sequence[tuple[float, float]] = (),
) -> tuple[Any, Any]:
    """Return the input, uint8 NHWC of a shape, and the maps after the convolutions, as those of `mtcnn_nets`.

    With `ranges`, of the convolutions' inputs, the convolutions are in int8.
    """
    openvino = import_openvino()
    ops = openvino.opset13
    pixels = ops.parameter(list(shape), openvino.Type.u8)
    maps = ops.transpose(ops.convert(pixels, "f32"), ops.constant([0, 3, 1, 2]))
    for index, pool in enumerate(pools):
        if ranges:
            maps = _rounded(maps, *ranges[index])
        maps = _convolution(maps, weights, f"conv{index + 1}", is_int8=bool(ranges))
        maps = ops.prelu(maps, _constant(weights[f"prelu{index + 1}.weight"]))
        if pool is not None:
            maps = ops.max_pool(maps, [2, 2], [1, 1], [0, 0], [0, 0], [pool, pool], "ceil").output(0)
    return pixels, maps


def _convolution(maps: Any, weights: dict[str, Tensor], name: str, *, is_int8: bool = False) -> Any:
    ops = import_openvino().opset13
    weight = weights[f"{name}.weight"]
    kernel = _constant(weight)
    if is_int8:
        # Twice the largest weight of each output channel: without VNNI, sums of products of larger numbers overflow.
        end = 2 * weight.abs().amax(dim=(1, 2, 3), keepdim=True)
        kernel = _rounded(kernel, -end, end, _WEIGHT_LEVELS)
    product = ops.convolution(maps, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
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

"""Attention blocks, necks and CORAL's read-out against their formulas, written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from agr_ray.labels import UTKFACE
from agr_ray.models.heads.thresholds import THRESHOLDS_YEARS, Thresholds
from agr_ray.registry import ATTENTION, HEADS, NECKS

Array = NDArray[np.float64]


def randomised(part: Any) -> tuple[Any, dict[str, Array]]:
    """Draw all parameters of a part, which may start at zero; return it in evaluation mode, and them by name."""
    torch.manual_seed(0)
    part = part.double().eval()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_(std=0.5)
    return part, {name: parameter.detach().numpy() for name, parameter in part.named_parameters()}


def feature_map(num_channels: int, side: int = 4) -> Array:
    return np.random.default_rng(0).normal(size=(2, num_channels, side, side))


def output(part: nn.Module, *maps: Array, is_neck: bool = False) -> Array:
    tensors = [torch.from_numpy(each) for each in maps]
    with torch.inference_mode():
        return np.asarray(part(tensors) if is_neck else part(*tensors))


def sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


def test_squeeze_and_excitation() -> None:
    block, w = randomised(ATTENTION["squeeze_excitation"](32))
    x = feature_map(32)

    squeezed = relu(x.mean(axis=(2, 3)) @ w["fc1.weight"][:, :, 0, 0].T + w["fc1.bias"])
    gates = sigmoid(squeezed @ w["fc2.weight"][:, :, 0, 0].T + w["fc2.bias"])
    assert squeezed.shape == (2, 2)
    np.testing.assert_allclose(output(block, x), x * gates[:, :, None, None])


def test_cbam() -> None:
    block, w = randomised(ATTENTION["cbam"](32))
    x = feature_map(32)

    def gate(pooled: Array) -> Array:
        hidden = relu(pooled @ w["channels.0.weight"].T + w["channels.0.bias"])
        return np.asarray(hidden @ w["channels.2.weight"].T + w["channels.2.bias"])

    gated = x * sigmoid(gate(x.mean(axis=(2, 3))) + gate(x.max(axis=(2, 3))))[:, :, None, None]
    summary = np.stack([gated.mean(axis=1), gated.max(axis=1)], axis=1)
    padded = np.pad(summary, ((0, 0), (0, 0), (3, 3), (3, 3)))
    places = np.empty((2, 1, 4, 4))
    for row, column in np.ndindex(4, 4):
        window = padded[:, :, row : row + 7, column : column + 7]
        places[:, 0, row, column] = (window * w["places.weight"]).sum(axis=(1, 2, 3)) + w["places.bias"]
    np.testing.assert_allclose(output(block, x), gated * sigmoid(places))


def test_shuffle_attention() -> None:
    block, w = randomised(ATTENTION["shuffle"](256))
    x = feature_map(256)

    groups = x.reshape(2, 64, 2, 2, 4, 4)  # image, group, half, channel of the half, place
    first, second = groups[:, :, 0], groups[:, :, 1]
    first = first * sigmoid(first.mean(axis=(3, 4), keepdims=True) * w["channel_scale"] + w["channel_shift"])
    centred = second - second.mean(axis=(3, 4), keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=(3, 4), keepdims=True) + 1e-5)
    normed = normed * w["norm.weight"][:, None, None] + w["norm.bias"][:, None, None]
    second = second * sigmoid(normed * w["place_scale"] + w["place_shift"])
    joined = np.stack([first, second], axis=2).reshape(2, 256, 4, 4)
    shuffled = np.empty_like(joined)
    shuffled[:, 0::2], shuffled[:, 1::2] = joined[:, :128], joined[:, 128:]
    np.testing.assert_allclose(output(block, x), shuffled)


def test_self_attention() -> None:
    block, w = randomised(ATTENTION["self_attention"](16))
    x = feature_map(16, side=3)

    tokens = x.reshape(2, 16, 9).transpose(0, 2, 1)
    centred = tokens - tokens.mean(axis=2, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + 1e-5) * w["norm.weight"] + w["norm.bias"]
    projected = normed @ w["attention.in_proj_weight"].T + w["attention.in_proj_bias"]
    queries, keys, values = (each.reshape(2, 9, 8, 2).transpose(0, 2, 1, 3) for each in np.split(projected, 3, axis=2))
    scores = np.exp(queries @ keys.transpose(0, 1, 3, 2) / np.sqrt(2))
    attended = (scores / scores.sum(axis=3, keepdims=True)) @ values
    attended = attended.transpose(0, 2, 1, 3).reshape(2, 9, 16)
    added = tokens + attended @ w["attention.out_proj.weight"].T + w["attention.out_proj.bias"]
    np.testing.assert_allclose(output(block, x), added.transpose(0, 2, 1).reshape(x.shape))


def test_self_attention_first_passes_its_input_on() -> None:
    block = ATTENTION["self_attention"](16).double()
    x = feature_map(16)

    np.testing.assert_array_equal(output(block, x), x)


def test_average_neck() -> None:
    maps = [feature_map(8), feature_map(6, side=2)]

    np.testing.assert_allclose(output(NECKS["average"]((8, 6)), *maps, is_neck=True), maps[1].mean(axis=(2, 3)))


def test_multi_scale_neck() -> None:
    neck, w = randomised(NECKS["multi_scale"]((4, 8, 6, 10)))
    maps = [feature_map(4, side=16), feature_map(8, side=8), feature_map(6), feature_map(10, side=2)]

    means = np.concatenate([each.mean(axis=(2, 3)) for each in maps[1:]], axis=1)
    expected = relu(means @ w["mix.0.weight"].T + w["mix.0.bias"])
    np.testing.assert_allclose(output(neck, *maps, is_neck=True), expected)


def test_fully_connected_neck() -> None:
    neck, w = randomised(NECKS["fully_connected"]((8, 6)))
    maps = [feature_map(8, side=12), feature_map(6, side=6)]

    grid = maps[1].reshape(2, 6, 3, 2, 3, 2).mean(axis=(3, 5))
    expected = relu(grid.reshape(2, 54) @ w["layer.0.weight"].T + w["layer.0.bias"])
    np.testing.assert_allclose(output(neck, *maps, is_neck=True), expected)


@pytest.mark.parametrize("name", ["coral", "corn"])
def test_an_ordinal_head_never_passes_a_threshold_after_a_failed_one(name: str) -> None:
    head, w = randomised(HEADS["age"][name](4, "age", UTKFACE))
    assert isinstance(head, Thresholds)
    features = np.random.default_rng(1).normal(size=(3, 4))
    logits = features @ w["layer.weight"].T + w["bias" if name == "coral" else "layer.bias"]
    p = sigmoid(logits)
    passed = np.minimum.accumulate(p, axis=1) if name == "coral" else np.multiply.accumulate(p, axis=1)

    outputs = head(torch.from_numpy(features))
    assert outputs.shape == (3, len(THRESHOLDS_YEARS))
    np.testing.assert_allclose(outputs.detach().numpy(), logits)
    np.testing.assert_allclose(head.passed(outputs).detach().numpy(), passed)

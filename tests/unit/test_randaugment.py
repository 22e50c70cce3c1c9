"""RandAugment: which operations are drawn, how strong they are, and that images do not mix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from agr_ray.learn import randaugment
from agr_ray.learn.randaugment import SIGNED, UNSIGNED, rand_augment

SIDE = 48


def crops(num: int = 4) -> Tensor:
    """Return smooth images, (num, 3, SIDE, SIDE) uint8, in the memory order of NHWC arrays."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = [np.sin(3 * x + k) * np.cos(2 * y - k) for k in range(3 * num)]
    planes = np.stack(waves).reshape(num, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return torch.from_numpy((127.5 + 120 * planes).astype(np.uint8)).permute(0, 3, 1, 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_papers_fourteen_operations_exist() -> None:
    assert len(SIGNED) + len(UNSIGNED) == 14


@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
@pytest.mark.parametrize("strength", [0.3, 1.0, -0.6])
def test_an_operation_treats_each_image_of_a_batch_alone(name: str, strength: float) -> None:
    if name in UNSIGNED and strength < 0.0:
        return
    operation = {**SIGNED, **UNSIGNED}[name]
    images = crops(3)
    together = operation(images, strength)
    assert together.dtype == torch.uint8
    assert together.shape == images.shape
    for k in range(3):
        assert torch.equal(together[k : k + 1], operation(images[k : k + 1], strength))
    assert torch.equal(together, images) == (name == "identity")


@pytest.mark.parametrize("name", SIGNED)
def test_zero_strength_changes_nothing(name: str) -> None:
    torch.testing.assert_close(SIGNED[name](crops(), 0.0).float(), crops().float(), rtol=0, atol=1)


@pytest.mark.parametrize(("sign", "first"), [(1.0, 20 + 10), (-1.0, 20 - 10)])
def test_a_shift_is_a_fraction_of_the_side(sign: float, first: int) -> None:
    images = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    images[..., 20] = 255
    moved = SIGNED["translate_x"](images, sign * 0.5)  # 0.5 * 150 / 331 * 48 = 10.9 pixels
    assert moved[0, 0, 24].float().argmax() == first
    turned = SIGNED["translate_y"](images.transpose(-1, -2), sign * 0.5)
    assert torch.equal(turned.transpose(-1, -2), moved)


def test_colour_operations_are_as_strong_as_torchvisions() -> None:
    images = crops()
    brighter = SIGNED["brightness"](images, -0.5)
    torch.testing.assert_close(brighter.float(), 0.55 * images.float(), rtol=0, atol=1)
    assert torch.equal(UNSIGNED["posterize"](images, 1.0), images // 16 * 16)
    assert torch.equal(UNSIGNED["solarize"](images, 1.0), 255 - images)
    assert torch.equal(UNSIGNED["solarize"](images, 0.5), torch.where(images >= 128, 255 - images, images))


def test_all_operations_and_directions_are_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randaugment, "SIGNED", {"a": lambda images, strength: images + (1 if strength > 0 else 2)})
    monkeypatch.setattr(randaugment, "UNSIGNED", {"b": lambda images, strength: images + int(30 * strength)})
    images = torch.zeros(4000, 3, 1, 1, dtype=torch.uint8)
    changed = rand_augment(images, 1, 12.0, generator())
    values, counts = changed[:, 0, 0, 0].unique(return_counts=True)
    assert values.tolist() == [1, 2, 12]
    assert (counts / 4000).tolist() == pytest.approx([0.25, 0.25, 0.5], abs=0.03)
    twice = rand_augment(images, 2, 12.0, generator())[:, 0, 0, 0]
    assert set(twice.unique().tolist()) == {2, 3, 4, 13, 14, 24}


def test_the_given_images_are_left_alone_and_the_draw_can_be_repeated() -> None:
    images = crops(16)
    first, again, other = (rand_augment(images, 2, 9.0, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(images, crops(16))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.stride() == images.stride()

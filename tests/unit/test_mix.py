"""Mixup and CutMix: draws, mixed images, and the weight of each label."""

from __future__ import annotations

import math

import pytest
import torch
from heads import LINEAR, heads, linear, targets
from torch import Tensor

from agr_ray.config import AugmentConfig, LossConfig
from agr_ray.labels import UTKFACE
from agr_ray.learn.losses import label_counts, multi_task_loss, rows_of
from agr_ray.learn.mix import Mix, draw_mix, mix_images

NAN = math.nan
NUM, SIDE = 400, 24


def draw(seed: int = 0, num: int = NUM, **config: float) -> Mix:
    mix = draw_mix(num, SIDE, AugmentConfig(**config), torch.Generator().manual_seed(seed))
    assert mix is not None
    return mix


def blend(partner: list[int], share: list[float]) -> Mix:
    return Mix(torch.tensor(partner), torch.tensor(share), torch.zeros(len(partner), 4, dtype=torch.int64))


def test_without_mixing_nothing_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    assert draw_mix(4, SIDE, AugmentConfig(), generator) is None
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


@pytest.mark.parametrize(("alpha", "spread"), [(0.2, math.sqrt(0.25 / 1.4)), (1.0, math.sqrt(1 / 12))])
def test_shares_are_drawn_from_beta(alpha: float, spread: float) -> None:
    mix = draw(num=4000, mixup_alpha=alpha)
    assert sorted(mix.partner.tolist()) == list(range(4000))
    assert mix.share.mean().item() == pytest.approx(0.5, abs=0.03)
    assert mix.share.std().item() == pytest.approx(spread, abs=0.02)
    assert not mix.boxes.any()


def test_a_blend_is_the_weighted_sum_of_both_images() -> None:
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed = mix_images(images, blend([1, 0, 2], [0.25, 1.0, 0.5]))
    torch.testing.assert_close(mixed[0], 0.25 * images[0] + 0.75 * images[1])
    assert torch.equal(mixed[1], images[1])
    torch.testing.assert_close(mixed[2], images[2])


def test_a_cutmix_image_is_its_partner_inside_a_box_and_itself_outside() -> None:
    mix = draw(cutmix_alpha=1.0)
    images = torch.arange(NUM, dtype=torch.float32).view(NUM, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
    mixed = mix_images(images, mix)
    for k in range(NUM):
        x0, y0, x1, y1 = mix.boxes[k].tolist()
        expected = images[k].clone()
        expected[:, y0:y1, x0:x1] = float(mix.partner[k])
        assert torch.equal(mixed[k], expected)
        own = 1.0 - (x1 - x0) * (y1 - y0) / SIDE**2
        assert mix.share[k].item() == pytest.approx(own, abs=1e-6)


def test_both_take_turns() -> None:
    mix = draw(mixup_alpha=5.0, cutmix_alpha=5.0)
    num_cut = int(mix.boxes.any(dim=1).sum())
    assert 0.4 * NUM < num_cut < 0.6 * NUM


def test_same_generator_state_gives_the_same_mix() -> None:
    first, again, other = (draw(seed, mixup_alpha=0.4, cutmix_alpha=1.0) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.share, other.share)


def test_ages_are_never_averaged() -> None:
    # Half 20 and half 60: an answer of 40 is 20 years off either way, and so is 20, on average.
    truth = targets([20.0, 60.0], [-1, -1], [-1, -1])
    mix = blend([1, 0], [0.5, 0.5])
    for answer in (20.0, 40.0, 60.0):
        outputs = {"age": torch.full((2,), answer)}
        age = heads(tasks=("age",))
        loss, _ = multi_task_loss(age, outputs, truth, LossConfig(), label_counts(age, truth, mix), mix=mix)
        assert loss.item() == pytest.approx(20.0)


def test_labels_count_by_their_share_of_a_blend() -> None:
    truth = targets([33.0, 39.0], [1, 0], [0, 4])
    logits = torch.log(torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1], [0.2] * 5]))
    outputs = linear(torch.tensor([30.0, 40.0]), torch.tensor([0.0, 2.0]), logits)
    mix = blend([1, 0], [0.9, 0.25])
    loss, tasks = multi_task_loss(LINEAR, outputs, truth, LossConfig(), label_counts(LINEAR, truth, mix), mix=mix)
    age = (0.9 * 3 + 0.1 * 9) + (0.25 * 1 + 0.75 * 7)
    gender = math.log(2.0) + math.log(1 + math.exp(2.0)) - 0.75 * 2.0
    race = -(0.9 * math.log(0.6) + 0.1 * math.log(0.1)) + math.log(5.0)
    assert tasks.sums.tolist() == pytest.approx([age, gender, race], rel=1e-5)
    assert tasks.counts.tolist() == pytest.approx([2.0, 2.0, 2.0])
    assert loss.item() == pytest.approx(age / 2 + 0.5 * gender / 2 + 0.5 * race / 2, rel=1e-5)


def test_a_missing_label_in_a_blend_loses_its_share_of_the_weight() -> None:
    truth = targets([30.0, NAN, NAN], [-1, 1, 1], [-1, -1, -1])
    mix = blend([1, 0, 2], [0.75, 0.5, 0.1])
    counts = label_counts(LINEAR, truth, mix)
    # The age of row 0 is 0.75 of row 0 and 0.5 of row 1; the gender of row 1 is 0.25 and 0.5; row 2 is wholly its own.
    assert counts.tolist() == pytest.approx([1.25, 1.75, 0.0])
    outputs = linear(torch.tensor([28.0, 34.0, NAN]), torch.zeros(3), torch.full((3, len(UTKFACE.races)), NAN))
    loss, tasks = multi_task_loss(LINEAR, outputs, truth, LossConfig(gender_weight=1.0), counts, mix=mix)
    assert tasks.counts.tolist() == pytest.approx(counts.tolist())
    assert loss.item() == pytest.approx((0.75 * 2 + 0.5 * 4) / 1.25 + math.log(2.0))


def test_gradients_of_mixed_images_averaged_over_ranks_equal_those_of_one_process() -> None:
    features = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    truth = targets([20.0, NAN, 35.0, 50.0, 61.0, NAN, 70.0], [0, 1, -1, 1, 0, -1, -1], [0, 1, 2, -1, 4, 3, -1])
    # Partners are of the same rank: rows 0 to 4, and 5 and 6.
    mix = blend([2, 0, 1, 4, 3, 6, 5], [0.1, 0.9, 0.5, 0.3, 1.0, 0.8, 0.6])

    def gradients(first: int, last: int, counts: Tensor, world_size: int) -> Tensor:
        weights = torch.linspace(-1, 1, 4 * 7).view(4, -1).requires_grad_()
        age, gender, race = (features[first:last] @ weights).split([1, 1, 5], dim=1)
        outputs = linear(age.squeeze(1), gender.squeeze(1), race)
        share = rows_of(truth, slice(first, last))
        part = Mix(mix.partner[first:last] - first, mix.share[first:last], mix.boxes[first:last])
        loss, _ = multi_task_loss(LINEAR, outputs, share, LossConfig(), counts, world_size, mix=part)
        loss.backward()
        assert weights.grad is not None
        return weights.grad

    counts = label_counts(LINEAR, truth, mix)
    whole = gradients(0, 7, counts, 1)
    averaged = (gradients(0, 5, counts, 2) + gradients(5, 7, counts, 2)) / 2
    torch.testing.assert_close(averaged, whole, rtol=1e-5, atol=1e-5)

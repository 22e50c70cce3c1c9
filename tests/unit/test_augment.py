"""Crops to network input: cropping, resizing, and each random augmentation."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from agr_ray.config import AugmentConfig
from agr_ray.learn.augment import augment
from agr_ray.models.network_input import equalize_luminance, prepare_eval
from agr_ray.models.transform import Transform

PLAIN = AugmentConfig(flip_probability=0, rotation_degrees=0, scale=0, shift=0)
STORED = 48
SAME = Transform(image_size=40, crop_side_px=40)


def crops(num: int = 4, side: int = STORED) -> Tensor:
    """Return smooth images, (num, 3, side, side) uint8, in the memory order of NHWC arrays."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(3 * x + k) * np.cos(2 * y - k) for k in range(3 * num)]
    planes = np.stack(waves).reshape(num, 3, side, side).transpose(0, 2, 3, 1)
    return torch.from_numpy((127.5 + 120 * planes).astype(np.uint8)).permute(0, 3, 1, 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def denormalised(images: Tensor, transform: Transform = SAME) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (transform.mean, transform.std))
    return (images * std + mean) * 255


def test_evaluation_cuts_out_the_template_and_normalises() -> None:
    images = crops()
    prepared = prepare_eval(images, SAME)
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(denormalised(prepared), images[:, :, 4:44, 4:44].float(), rtol=0, atol=1e-3)


def test_evaluation_resizes_with_a_filter() -> None:
    stripes = torch.zeros(1, 3, STORED, STORED, dtype=torch.uint8)
    stripes[..., ::2] = 255  # finer than the input can show: must come out grey
    prepared = denormalised(prepare_eval(stripes, Transform(image_size=10, crop_side_px=40)))
    assert prepared.shape == (1, 3, 10, 10)
    assert (prepared[..., 2:-2] - 127.5).abs().max() < 20


def test_equalising_equals_opencvs_on_the_luminance() -> None:
    images = (crops(3).float() * 0.4 + 60).to(torch.uint8)  # of little contrast
    equalized = equalize_luminance(images)
    for image, ours in zip(images.permute(0, 2, 3, 1).numpy(), equalized.permute(0, 2, 3, 1).numpy(), strict=True):
        ycrcb = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
        ycrcb[..., 0] = cv2.equalizeHist(ycrcb[..., 0])
        theirs = cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2RGB)
        difference = np.abs(theirs.astype(int) - ours.astype(int))
        assert difference.mean() < 1.0  # OpenCV rounds Y, Cr and Cb
        assert difference.max() <= 4
    luma = (equalized * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1).flatten(1)
    assert luma.amin(dim=1).max() < 10  # colours that would leave 0 to 255 are cut off
    assert luma.amax(dim=1).min() > 245


def test_an_even_image_does_not_change() -> None:
    images = torch.full((2, 3, 8, 8), 90, dtype=torch.uint8)
    assert torch.equal(equalize_luminance(images), images)


def test_training_and_evaluation_equalise_alike() -> None:
    transform = dataclasses.replace(SAME, equalize=True)
    dark = (crops().float() * 0.3).to(torch.uint8)
    prepared = prepare_eval(dark, transform)
    torch.testing.assert_close(augment(dark, transform, PLAIN, generator()), prepared)
    torch.testing.assert_close(prepared, prepare_eval(equalize_luminance(dark), SAME))
    assert denormalised(prepared).max() > 200 > denormalised(prepare_eval(dark, SAME)).max()


def test_without_augmentation_training_and_evaluation_inputs_are_equal() -> None:
    torch.testing.assert_close(augment(crops(), SAME, PLAIN, generator()), prepare_eval(crops(), SAME))


@pytest.mark.parametrize("image_size", [40, 30, 56])
def test_resampling_without_movement_equals_the_evaluation_view(image_size: int) -> None:
    transform = Transform(image_size=image_size, crop_side_px=40)
    still = PLAIN.model_copy(update={"rotation_degrees": 1e-6})
    resampled = augment(crops(), transform, still, generator())
    difference = denormalised(resampled) - denormalised(prepare_eval(crops(), transform))
    assert difference[..., 2:-2, 2:-2].abs().max() < 3


def test_the_training_view_of_a_large_crop_is_filtered_too() -> None:
    stripes = torch.zeros(1, 3, STORED, STORED, dtype=torch.uint8)
    stripes[..., 1::4] = stripes[..., 2::4] = 255  # four columns to one of the input's
    turning = PLAIN.model_copy(update={"rotation_degrees": 1e-6})
    seen = denormalised(augment(stripes, Transform(image_size=10, crop_side_px=40), turning, generator()))
    assert (seen[..., 2:-2] - 127.5).abs().max() < 20


@pytest.mark.parametrize("rotation_degrees", [0.0, 1e-6])
def test_flip_mirrors_left_and_right(rotation_degrees: float) -> None:
    config = PLAIN.model_copy(update={"flip_probability": 1, "rotation_degrees": rotation_degrees})
    flipped = augment(crops(), SAME, config, generator())
    torch.testing.assert_close(flipped, prepare_eval(crops(), SAME).flip(-1), rtol=0, atol=1e-3)


def test_each_image_is_flipped_on_its_own() -> None:
    images = crops(1).expand(64, -1, -1, -1)
    flipped = augment(images, SAME, PLAIN.model_copy(update={"flip_probability": 0.5}), generator())
    is_plain = (flipped == prepare_eval(images, SAME)).flatten(1).all(dim=1)
    assert 16 < int(is_plain.sum()) < 48


def test_rotation_keeps_shape_and_stays_within_its_range() -> None:
    images = torch.zeros(200, 3, STORED, STORED, dtype=torch.uint8)
    images += torch.arange(STORED, dtype=torch.uint8) * 5
    config = PLAIN.model_copy(update={"rotation_degrees": 10.0})
    columns = denormalised(augment(images, SAME, config, generator()))[:, 0] / 5
    step_x = (columns[:, 20, 30] - columns[:, 20, 10]) / 20
    step_y = (columns[:, 30, 20] - columns[:, 10, 20]) / 20
    torch.testing.assert_close(step_x.square() + step_y.square(), torch.ones(200), rtol=0, atol=1e-2)
    degrees = torch.rad2deg(torch.atan2(step_y, step_x))
    assert -10.1 < degrees.min() < -9
    assert 9 < degrees.max() < 10.1


def test_a_shift_shows_pixels_of_the_margin() -> None:
    images = torch.zeros(200, 3, STORED, STORED, dtype=torch.uint8)
    images += torch.arange(STORED, dtype=torch.uint8) * 5  # brightness says which column is seen
    config = PLAIN.model_copy(update={"shift": 0.1})
    columns = denormalised(augment(images, SAME, config, generator()))[:, 0, 0, :] / 5
    assert columns[:, 0].min() >= -0.01  # 4 - 0.1 * 40
    assert columns[:, -1].max() <= 47.01
    shifts = columns[:, 20] - 24
    assert shifts.min() < -3.5
    assert shifts.max() > 3.5
    torch.testing.assert_close(columns[:, 30] - columns[:, 10], torch.full((200,), 20.0), rtol=0, atol=1e-2)


def test_zoom_stays_within_its_range() -> None:
    images = torch.zeros(200, 3, STORED, STORED, dtype=torch.uint8)
    images += torch.arange(STORED, dtype=torch.uint8) * 5
    config = PLAIN.model_copy(update={"scale": 0.2})
    columns = denormalised(augment(images, SAME, config, generator()))[:, 0, 0, :] / 5
    zooms = 20 / (columns[:, 30] - columns[:, 10])
    assert 0.8 <= zooms.min() < 0.83
    assert 1.17 < zooms.max() <= 1.2001


def test_border_is_reflected_and_never_black() -> None:
    images = torch.full((8, 3, STORED, STORED), 200, dtype=torch.uint8)
    config = PLAIN.model_copy(update={"rotation_degrees": 180.0, "shift": 0.5, "scale": 0.5})
    seen = denormalised(augment(images, SAME, config, generator()))
    torch.testing.assert_close(seen, torch.full_like(seen, 200), rtol=0, atol=1e-2)


def test_colour_changes_in_one_matrix_equal_separate_ones() -> None:
    images = crops(3)
    config = PLAIN.model_copy(update={"brightness": 0.2, "contrast": 0.2, "saturation": 0.2})
    seen = denormalised(augment(images, SAME, config, generator(5)))
    draws = generator(5)
    torch.rand(3, generator=draws)  # flips
    brightness, contrast, saturation = (0.8 + 0.4 * torch.rand(3, 1, 1, 1, generator=draws) for _ in range(3))
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    expected = images[:, :, 4:44, 4:44].float() * brightness
    grey = (expected * luma).sum(dim=1, keepdim=True)
    expected = grey + (expected - grey) * saturation
    mean_grey = (expected * luma).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    expected = mean_grey + (expected - mean_grey) * contrast
    torch.testing.assert_close(seen, expected.clamp(0, 255), rtol=0, atol=1e-2)


def test_erasing_fills_one_rectangle_with_the_mean() -> None:
    images = crops(64)
    plain = prepare_eval(images, SAME)
    erased = augment(images, SAME, PLAIN.model_copy(update={"erasing_probability": 1}), generator())
    changed = (erased != plain).any(dim=1)
    shares = changed.float().mean(dim=(1, 2))
    assert shares.min() > 0.01
    assert shares.max() < 0.22
    mean = plain.mean(dim=(2, 3))
    for k in range(8):
        inside = erased[k][:, changed[k]]
        torch.testing.assert_close(inside, mean[k, :, None].expand_as(inside))


def test_erasing_leaves_the_others_alone() -> None:
    erased = augment(crops(64), SAME, PLAIN.model_copy(update={"erasing_probability": 0.25}), generator())
    is_plain = (erased == prepare_eval(crops(64), SAME)).flatten(1).all(dim=1)
    assert 32 < int(is_plain.sum()) < 62


def test_low_resolution_keeps_the_mean_and_loses_detail() -> None:
    noisy = torch.randint(0, 256, (64, 3, STORED, STORED), dtype=torch.uint8, generator=generator())
    plain = denormalised(prepare_eval(noisy, SAME))
    config = PLAIN.model_copy(update={"low_resolution_probability": 0.5})
    shrunk = denormalised(augment(noisy, SAME, config, generator()))
    deviation = shrunk.std(dim=(1, 2, 3))
    is_plain = ((shrunk - plain).abs() < 1e-2).flatten(1).all(dim=1)
    assert 20 < int(is_plain.sum()) < 44
    assert deviation[~is_plain].max() < 0.9 * deviation[is_plain].min()
    torch.testing.assert_close(shrunk.mean(dim=(2, 3)), plain.mean(dim=(2, 3)), rtol=0.03, atol=0)


def test_noise_has_a_deviation_of_its_own_in_each_image() -> None:
    grey = torch.full((256, 3, STORED, STORED), 128, dtype=torch.uint8)
    config = PLAIN.model_copy(update={"noise_probability": 0.5})
    noisy = denormalised(augment(grey, SAME, config, generator())) / 255
    deviation = noisy.std(dim=(1, 2, 3))
    is_noisy = deviation > 1e-6
    assert 100 < int(is_noisy.sum()) < 156
    assert deviation.max() < 0.21
    torch.testing.assert_close(deviation[is_noisy].mean().item(), 0.1, rtol=0.2, atol=0)
    channels = noisy[is_noisy][0].flatten(1)
    assert torch.corrcoef(channels)[0, 1].abs() < 0.1


@pytest.mark.parametrize("name", ["low_resolution_probability", "noise_probability"])
def test_a_batch_in_which_no_image_is_chosen_does_not_change(name: str) -> None:
    changed = augment(crops(), SAME, PLAIN.model_copy(update={name: 1e-9}), generator())
    torch.testing.assert_close(changed, prepare_eval(crops(), SAME))


def test_same_generator_state_gives_the_same_images() -> None:
    config = AugmentConfig(
        scale=0.1,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        low_resolution_probability=0.5,
        noise_probability=0.5,
        erasing_probability=0.5,
        randaugment_ops=2,
    )
    first, again, other = (augment(crops(), SAME, config, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

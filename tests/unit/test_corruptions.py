"""Corruptions of aligned crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from agr_ray.data.rendered import render_chip
from agr_ray.vision.align import align_chip, align_face, landmarks_in_crop, stored_side_px, template_points_px
from agr_ray.vision.corruptions import CORRUPTIONS, SEVERITIES, _line_kernel, corrupt, image_rng

SIDE_PX = 100
GUIDE = Path(__file__).parents[2] / "docs" / "robustness.md"
CROP = align_chip(render_chip(0, 3).image_rgb, SIDE_PX)
EYES = template_points_px(SIDE_PX, len(CROP))[:2]
MOUTH = template_points_px(SIDE_PX, len(CROP))[3:].mean(axis=0)


def corrupted(
    name: str, severity: int, image_id: str = "a", seed: int = 0, crop: NDArray[np.uint8] = CROP
) -> NDArray[np.uint8]:
    return corrupt(crop, name, severity, image_rng(seed, name, image_id))


def at(rgb: NDArray[np.uint8], point: NDArray[np.floating]) -> list[int]:
    return rgb[int(point[1]), int(point[0])].tolist()


def changed(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(np.float64) - other).mean())


@pytest.mark.parametrize("side_px", [16, 32, 89, 224])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_and_type_stay_and_the_original_is_not_changed(name: str, side_px: int) -> None:
    crop = align_chip(render_chip(0, 3).image_rgb, side_px)
    before = crop.copy()
    for severity in SEVERITIES:
        result = corrupted(name, severity, crop=crop)
        assert (result.shape, result.dtype) == (crop.shape, np.uint8)
        np.testing.assert_array_equal(crop, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_changes_the_image_more_than_the_one_before(name: str) -> None:
    distances = [changed(corrupted(name, severity), CROP) for severity in SEVERITIES]

    assert distances[0] > 0.5
    assert distances == sorted(distances)
    assert len(set(distances)) == len(SEVERITIES)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_always_corrupted_in_the_same_way(name: str) -> None:
    np.testing.assert_array_equal(corrupted(name, 3), corrupted(name, 3))


@pytest.mark.parametrize("name", ["motion_blur", "noise", "webcam", "mask", "patch", "rotation"])
def test_random_choices_differ_between_images_and_seeds(name: str) -> None:
    assert len({corrupted(name, 3, image_id=f"image {k}").tobytes() for k in range(12)}) > 1
    assert len({corrupted(name, 3, seed=k).tobytes() for k in range(12)}) > 1


def test_a_face_is_reduced_to_the_pixels_of_the_level() -> None:
    stripes = np.zeros((192, 192, 3), np.uint8)
    stripes[:, ::2] = 255

    assert changed(corrupted("resolution", 5, crop=stripes), np.full_like(stripes, 128)) < 2
    small = align_chip(render_chip(0, 3).image_rgb, 16)
    np.testing.assert_array_equal(corrupted("resolution", 5, crop=small), small)


def test_sunglasses_cover_the_eyes_and_nothing_below_the_nose() -> None:
    for severity in SEVERITIES:
        result = corrupted("sunglasses", severity)
        assert max(at(result, EYES[0]) + at(result, EYES[1])) <= 20
        np.testing.assert_array_equal(result[75:], CROP[75:])


def test_sunglasses_follow_the_landmarks() -> None:
    points = template_points_px(SIDE_PX, len(CROP)) + np.array([0, 20])

    result = corrupt(CROP, "sunglasses", 1, image_rng(0, "sunglasses", "a"), points)

    assert max(at(result, points[0])) <= 20
    np.testing.assert_array_equal(result[:45], CROP[:45])
    without = corrupt(CROP, "sunglasses", 1, image_rng(0, "sunglasses", "a"), np.full((5, 2), np.nan))
    np.testing.assert_array_equal(without, corrupted("sunglasses", 1))


def test_a_mask_covers_the_mouth_and_not_the_eyes() -> None:
    for severity in SEVERITIES:
        result = corrupted("mask", severity)
        assert at(result, MOUTH) in ([225, 232, 236], [150, 190, 215], [35, 35, 38])
        np.testing.assert_array_equal(result[:50], CROP[:50])
    assert at(corrupted("mask", 4), (EYES.mean(axis=0) + MOUTH) / 2) == at(corrupted("mask", 4), MOUTH)


def test_a_patch_has_the_area_of_its_level_inside_the_template() -> None:
    for severity, area in zip(SEVERITIES, CORRUPTIONS["patch"].levels, strict=True):
        is_patch = (corrupted("patch", severity) != CROP).any(axis=2)
        assert is_patch.sum() == pytest.approx(area * SIDE_PX**2, rel=0.06)
        assert not is_patch[:10].any()
        assert not is_patch[-10:].any()


def test_exposure_is_in_linear_light() -> None:
    grey = np.full((40, 40, 3), 188, np.uint8)  # half of white's light

    assert corrupted("underexposure", 1, crop=grey)[0, 0].tolist() == [137] * 3  # a quarter
    assert corrupted("overexposure", 2, crop=grey)[0, 0].tolist() == [255] * 3
    assert corrupted("underexposure", 5, crop=np.zeros_like(grey)).max() == 0


def test_contrast_keeps_the_mean() -> None:
    for severity, share in zip(SEVERITIES, CORRUPTIONS["contrast"].levels, strict=True):
        result = corrupted("contrast", severity)
        assert result.mean() == pytest.approx(CROP.mean(), abs=0.5)
        assert result.std() == pytest.approx(share * CROP.std(), abs=0.5)


def test_noise_has_the_standard_deviation_of_its_level() -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)

    assert corrupted("noise", 2, crop=grey).std() == pytest.approx(0.06 * 255, rel=0.02)


@pytest.mark.parametrize(("angle", "width", "height"), [(0.0, 9, 1), (np.pi / 2, 1, 9)])
def test_motion_averages_along_a_line(angle: float, width: int, height: int) -> None:
    kernel = _line_kernel(8.0, angle)

    assert kernel.shape == (9, 9)
    assert kernel.sum() == pytest.approx(1.0)
    assert [int((kernel.sum(axis=axis) > 1e-3).sum()) for axis in (0, 1)] == [width, height]


def test_motion_of_less_than_a_pixel_changes_little() -> None:
    assert _line_kernel(0.1, 1.0).max() > 0.9


def test_landmarks_are_found_again_in_the_crop() -> None:
    points = np.array([[62.0, 70.0], [101.0, 81.0], [76.0, 99.0], [55.0, 110.0], [90.0, 119.0]])
    photograph = np.zeros((200, 200, 3), np.uint8)
    x, y = points[2].astype(int)
    photograph[y - 2 : y + 2, x - 2 : x + 2] = 255

    crop = align_face(photograph, points, SIDE_PX)
    found = landmarks_in_crop(points, SIDE_PX)

    rows, columns = np.nonzero(crop[..., 0] > 128)
    np.testing.assert_allclose(found[2], [columns.mean() + 0.5, rows.mean() + 0.5], atol=0.7)
    np.testing.assert_allclose(found, template_points_px(SIDE_PX, stored_side_px(SIDE_PX)), atol=12)
    assert np.isnan(landmarks_in_crop(np.full((5, 2), np.nan), SIDE_PX)).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_guide_gives_the_levels(name: str) -> None:
    (line,) = (line for line in GUIDE.read_text().splitlines() if line.startswith(f"| `{name}` |"))

    assert ", ".join(f"{level:g}" for level in CORRUPTIONS[name].levels) in line

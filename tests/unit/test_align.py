"""Alignment: landmarks land on the template, borders are reflected, large faces do not alias."""

from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from agr_ray.vision.align import (
    HAAR_SQUARE,
    TEMPLATE_POINTS,
    align,
    align_box,
    align_chip,
    align_face,
    similarity,
    stored_side_px,
)

TEMPLATE = np.asarray(TEMPLATE_POINTS)


def picture_with_dots(points: np.ndarray, side_px: int = 300, radius: float = 4.0) -> np.ndarray:
    """Return a black picture with a soft white dot at each point."""
    y, x = np.mgrid[:side_px, :side_px] + 0.5
    dots = [np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * radius**2)) for px, py in points]
    return np.repeat((255 * np.max(dots, axis=0)).astype(np.uint8)[..., None], 3, axis=2)


def brightest_near(rgb: np.ndarray, point: np.ndarray, reach_px: int = 8) -> np.ndarray:
    """Return the centre of mass of the light within `reach_px` of a point."""
    y, x = np.mgrid[: rgb.shape[0], : rgb.shape[1]] + 0.5
    near = np.hypot(x - point[0], y - point[1]) < reach_px
    light = rgb[..., 0].astype(float) * near
    return np.array([(x * light).sum(), (y * light).sum()]) / light.sum()


@pytest.mark.parametrize("angle", [-40.0, 0.0, 25.0])
@pytest.mark.parametrize("face_px", [60.0, 200.0])
def test_the_landmarks_land_on_the_template(angle: float, face_px: float) -> None:
    turn = cv2.getRotationMatrix2D((150.0, 150.0), angle, 1.0)
    landmarks = ((TEMPLATE - 0.5) * face_px + 150) @ turn[:, :2].T + turn[:, 2]
    crop = align_face(picture_with_dots(landmarks, radius=face_px / 50), landmarks, side_px=100, margin=0.1)
    assert crop.shape == (120, 120, 3)
    for point in TEMPLATE:
        expected = 10 + 100 * point
        assert brightest_near(crop, expected) == pytest.approx(expected, abs=0.3)


def test_a_similarity_is_found_exactly() -> None:
    affine = np.array([[0.6, -0.8, 3.0], [0.8, 0.6, -2.0]]) * 1.7
    target = TEMPLATE @ affine[:, :2].T + affine[:, 2]
    assert similarity(TEMPLATE, target) == pytest.approx(affine)


def test_a_similarity_never_mirrors() -> None:
    found = similarity(TEMPLATE * [-1, 1], TEMPLATE)
    assert np.linalg.det(found[:, :2]) > 0


@pytest.mark.parametrize("landmarks", [np.full((5, 2), np.nan), np.full((5, 2), 7.0)])
def test_impossible_landmarks_are_rejected(landmarks: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no similarity"):
        align_face(np.zeros((50, 50, 3), np.uint8), landmarks, 40)


def test_a_face_that_shrinks_eightfold_does_not_alias() -> None:
    noise = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (900, 900, 1)).repeat(3, axis=2)
    crop = align_face(noise, TEMPLATE * 800 + 50, side_px=100, margin=0.0)
    assert crop.std() < 30  # averages of 64 pixels: 16; samples of one to four: 64 and more


@pytest.mark.parametrize(("scale", "multiple"), [(2.0, 1), (0.76, 1), (0.74, 2), (0.38, 2), (0.37, 3)])
def test_a_face_is_averaged_from_three_quarters_of_its_size_or_more(
    scale: float, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    warp = Mock(wraps=cv2.warpAffine)
    monkeypatch.setattr(cv2, "warpAffine", warp)
    align_face(np.zeros((400, 400, 3), np.uint8), TEMPLATE * 50 / scale + 20, side_px=50, margin=0.1)
    assert [call.args[2] for call in warp.call_args_list] == [(60 * multiple, 60 * multiple)]


def test_a_chip_becomes_the_template_with_its_border_reflected() -> None:
    chip = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    crop = align_chip(chip, side_px=100, margin=0.1)
    assert (crop[10:110, 10:110] == chip).all()
    assert (crop[:10, 10:110] == chip[9::-1]).all()


def test_a_chip_that_is_not_square_keeps_its_shape() -> None:
    chip = np.random.default_rng(0).integers(0, 255, (100, 160, 3), dtype=np.uint8)
    assert (align_chip(chip, side_px=100, margin=0.0) == chip[:, 30:130]).all()


def test_a_box_is_cropped_as_the_stated_square() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    centre_x, centre_y, ratio = HAAR_SQUARE
    box_px = 100 / ratio
    x0, y0 = 90 - centre_x * box_px, 110 - centre_y * box_px
    crop = align_box(picture, np.array([x0, y0, x0 + box_px, y0 + box_px]), side_px=100, margin=0.0)
    assert np.abs(crop.astype(int) - picture[60:160, 40:140]).max() <= 1


def test_a_face_without_landmarks_is_cropped_by_its_box() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    box, nowhere = np.array([40.0, 40.0, 140.0, 140.0]), np.full((5, 2), np.nan)
    assert (align(picture, box, nowhere, 64) == align_box(picture, box, 64)).all()
    landmarks = TEMPLATE * 100 + 30
    assert (align(picture, box, landmarks, 64) == align_face(picture, landmarks, 64)).all()


@pytest.mark.parametrize(("side_px", "margin", "expected"), [(200, 0.1, 240), (88, 0.1, 106), (224, 0.0, 224)])
def test_the_margin_is_on_both_sides(side_px: int, margin: float, expected: int) -> None:
    assert stored_side_px(side_px, margin) == expected


@pytest.mark.parametrize("is_tall", [False, True])
@pytest.mark.parametrize("centre", [20, 20_000, 39_980])
def test_a_face_is_cropped_from_an_image_too_long_for_opencv(centre: int, *, is_tall: bool) -> None:
    short = np.random.default_rng(0).integers(0, 256, (60, 400, 3), np.uint8)
    first = min(max(centre - 200, 0), 40_000 - 400)
    long = np.zeros((60, 40_000, 3), np.uint8)
    long[:, first : first + 400] = short
    boxes = [np.array([x - 25.0, 5.0, x + 25.0, 55.0]) for x in (centre, centre - first)]
    images = [long, short]
    if is_tall:
        images = [np.ascontiguousarray(image.transpose(1, 0, 2)) for image in images]
        boxes = [box[[1, 0, 3, 2]] for box in boxes]

    crops = [align_box(image, box, side_px=48) for image, box in zip(images, boxes, strict=True)]

    np.testing.assert_array_equal(*crops)

"""Rendered faces are reproducible, evenly labelled, correctly located, and found by a real detector."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from facenet_pytorch import MTCNN

from agr_ray.data.rendered import (
    AGE_FIRST_YEARS,
    AGE_LAST_YEARS,
    MIN_FACE_WIDTH_PX,
    RenderedChip,
    RenderedFace,
    RenderedPhotograph,
    chip_labels_table,
    head_mask,
    iter_chips,
    photograph_labels_table,
    render_chip,
    render_photograph,
)
from agr_ray.data.rendered.traits import draw_labels
from agr_ray.labels import GENDERS, UTKFACE

BORDER_PX = 50
MIN_IOU = 0.5
MIN_FOUND = 0.95
MAX_LANDMARK_ERROR = 0.08
"""Mean over all landmarks, in distances between the eyes."""


def box_iou(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return float(shared / (areas - shared))


@pytest.fixture(scope="module")
def photographs() -> list[RenderedPhotograph]:
    return [render_photograph(3, index, 640, 480, num_faces) for index, num_faces in enumerate((1, 2, 4, 6))]


class _Found:
    """Detections of faces with known positions."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._detector = MTCNN(keep_all=True, min_face_size=40)
        self.num_true = 0
        self.landmark_errors: list[float] = []

    def look(self, image: npt.NDArray[np.uint8], faces: list[RenderedFace] | list[RenderedChip]) -> None:
        # A border, because facenet-pytorch misplaces faces that touch the edge of the image.
        framed = cv2.copyMakeBorder(image, *[BORDER_PX] * 4, cv2.BORDER_CONSTANT)
        boxes, _, landmarks = self._detector.detect(framed, landmarks=True)
        self.num_true += len(faces)
        if boxes is None:
            return
        for face in faces:
            overlaps = [box_iou(box - BORDER_PX, face.box_xyxy) for box in boxes.astype(np.float32)]
            best = int(np.argmax(overlaps))
            if overlaps[best] >= MIN_IOU:
                off = landmarks[best].astype(np.float32) - BORDER_PX - face.landmarks
                eyes = float(np.linalg.norm(face.landmarks[1] - face.landmarks[0]))
                self.landmark_errors.append(float(np.linalg.norm(off, axis=1).mean()) / eyes)


def test_the_same_arguments_give_the_same_chip() -> None:
    first, again = render_chip(5, 17, 96), render_chip(5, 17, 96)
    assert np.array_equal(first.image_rgb, again.image_rgb)
    assert np.array_equal(first.landmarks, again.landmarks)
    assert (first.age_years, first.gender, first.race) == (again.age_years, again.gender, again.race)


def test_a_chip_does_not_depend_on_the_chips_before_it() -> None:
    last = list(iter_chips(5, 4, 64))[-1]
    assert np.array_equal(last.image_rgb, render_chip(5, 3, 64).image_rgb)


def test_another_seed_or_index_gives_another_chip() -> None:
    images = [render_chip(seed, index, 64).image_rgb for seed, index in ((5, 0), (5, 1), (6, 0))]
    assert all(not np.array_equal(a, b) for a, b in combinations(images, 2))


def test_the_same_arguments_give_the_same_photograph() -> None:
    first, again = render_photograph(5, 2, 400, 300, 3), render_photograph(5, 2, 400, 300, 3)
    assert np.array_equal(first.image_rgb, again.image_rgb)
    assert [face.race for face in first.faces] == [face.race for face in again.faces]


def test_labels_cover_every_class_and_age_evenly() -> None:
    labels = [draw_labels(np.random.default_rng([1, index])) for index in range(4000)]
    pairs = Counter((one.gender, one.race) for one in labels)
    assert set(pairs) == {(gender, race) for gender in GENDERS for race in UTKFACE.races}
    assert min(pairs.values()) > 300  # 400 expected, deviation 19
    ages = [one.age_years for one in labels]
    assert min(ages) == AGE_FIRST_YEARS
    assert max(ages) == AGE_LAST_YEARS
    assert all(age == int(age) for age in ages)
    assert abs(float(np.mean(ages)) - (AGE_FIRST_YEARS + AGE_LAST_YEARS) / 2) < 2


def test_chip_labels_follow_the_drawn_labels() -> None:
    chips = [render_chip(2, index, 32) for index in range(60)]
    assert {chip.gender for chip in chips} == set(GENDERS)
    assert {chip.race for chip in chips} == set(UTKFACE.races)


def test_a_chip_is_framed_like_one_of_utkface() -> None:
    chips = [render_chip(2, index, 64) for index in range(60)]
    assert {chip.image_rgb.shape for chip in chips} == {(64, 64, 3)}
    assert {chip.image_rgb.dtype for chip in chips} == {np.dtype(np.uint8)}
    eyes = np.mean([chip.landmarks[:2] for chip in chips], axis=0) / 64
    assert eyes == pytest.approx(np.array([[0.30, 0.29], [0.70, 0.29]]), abs=0.02)


def test_faces_of_a_photograph_lie_inside_it_from_left_to_right(photographs: list[RenderedPhotograph]) -> None:
    for photograph in photographs:
        height, width = photograph.image_rgb.shape[:2]
        boxes = np.stack([face.box_xyxy for face in photograph.faces])
        assert (boxes >= 0).all()
        assert (boxes <= (width, height, width, height)).all()
        assert (np.diff(boxes[:, 0]) >= 0).all()


def test_faces_of_a_photograph_are_as_many_as_asked_for_and_wide_enough(photographs: list[RenderedPhotograph]) -> None:
    assert [len(photograph.faces) for photograph in photographs] == [1, 2, 4, 6]
    widths = [face.box_xyxy[2] - face.box_xyxy[0] for photograph in photographs for face in photograph.faces]
    assert min(widths) >= MIN_FACE_WIDTH_PX
    assert max(widths) > 1.5 * min(widths)


def test_heads_in_a_photograph_do_not_overlap(photographs: list[RenderedPhotograph]) -> None:
    for photograph in photographs:
        height, width = photograph.image_rgb.shape[:2]
        poses = [face.pose for face in photograph.faces]
        for first, second in combinations(poses, 2):
            both = head_mask([first], width, height) & head_mask([second], width, height)
            # The mask is wider than a head by a few pixels, so that neighbours' masks may meet at their rims.
            assert not cv2.erode(both.astype(np.uint8), np.ones((11, 11))).any()


def test_a_photograph_too_small_for_its_faces_is_rejected() -> None:
    with pytest.raises(ValueError, match="9 faces need more room than 200 x 200 px"):
        render_photograph(0, 0, 200, 200, 9)


def test_a_photograph_without_faces_is_a_background() -> None:
    photograph = render_photograph(0, 0, 120, 80, 0)
    assert photograph.faces == ()
    assert photograph.image_rgb.shape == (80, 120, 3)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_a_negative_seed_or_index_is_rejected(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}, index={index}"):
        render_chip(seed, index)


def test_label_tables_have_one_row_per_face(photographs: list[RenderedPhotograph]) -> None:
    chip = render_chip(1, 0, 64)
    assert chip_labels_table(["a.jpg"], [chip]).to_pylist() == [
        {"key": "a.jpg", "age": chip.age_years, "gender": chip.gender, "race": chip.race}
    ]
    table = photograph_labels_table([f"{number}.jpg" for number in range(4)], photographs)
    assert table.column_names == ["key", "box", "landmarks", "age", "gender", "race"]
    assert Counter(table["key"].to_pylist()) == {"0.jpg": 1, "1.jpg": 2, "2.jpg": 4, "3.jpg": 6}
    assert table["landmarks"][0].as_py() == pytest.approx(photographs[0].faces[0].landmarks.ravel().tolist())


def test_mtcnn_finds_the_faces_of_chips_in_their_places() -> None:
    found = _Found()
    for chip in iter_chips(4, 60):
        found.look(chip.image_rgb, [chip])
    assert len(found.landmark_errors) >= MIN_FOUND * found.num_true
    assert np.mean(found.landmark_errors) < MAX_LANDMARK_ERROR


def test_mtcnn_finds_the_faces_of_photographs_in_their_places(photographs: list[RenderedPhotograph]) -> None:
    found = _Found()
    for photograph in photographs:
        found.look(photograph.image_rgb, list(photograph.faces))
    assert found.num_true == 13
    assert len(found.landmark_errors) >= MIN_FOUND * found.num_true
    assert np.mean(found.landmark_errors) < MAX_LANDMARK_ERROR

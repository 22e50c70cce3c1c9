"""The labels of a rendered face change its face and hair, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from agr_ray.data.rendered import Labels, Pose, head_mask, render_chip, render_photograph
from agr_ray.labels import GENDERS, UTKFACE

WIDTH_PX, HEIGHT_PX = 120, 130
"""Photographs of one person: about half of the pixels are not of the head. (A chip is all head: nothing is left.)"""

NUM_TRAIN = 300
NUM_TEST = 400
FEATURE_SIDE_PX = 20
REACH = 2.3
"""How far the classifier sees from between the eyes, in distances between the eyes."""

SLACK = 0.05
"""The classifier may beat the majority guess by this much. With 400 test images the deviation of a guess
is 0.025 for gender and 0.020 for race, so that this is 2 and 2.5 of them."""

OPPOSITES = (Labels(6.0, "female", "white"), Labels(35.0, "male", "black"), Labels(95.0, "male", "asian"))


@dataclass(frozen=True)
class _Faces:
    """Small images with and without the head, as (num, features), and the codes of their labels."""

    whole: npt.NDArray[np.float64]
    blanked: npt.NDArray[np.float64]
    gender: npt.NDArray[np.int64]
    race: npt.NDArray[np.int64]


def features(image: npt.NDArray[np.uint8], pose: Pose) -> npt.NDArray[np.float64]:
    """Return a coarse view of the head and its surroundings, the eyes always at the same place."""
    corners = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
    target = corners * FEATURE_SIDE_PX / (2 * REACH) + FEATURE_SIDE_PX / 2
    matrix = cv2.getAffineTransform(pose.place(corners), target.astype(np.float32))
    soft = cv2.GaussianBlur(image, (0, 0), 1.5)
    small = cv2.warpAffine(soft, matrix, [FEATURE_SIDE_PX] * 2, borderMode=cv2.BORDER_CONSTANT, borderValue=[128] * 3)
    return (small.astype(np.float64) / 255 - 0.5).ravel()


@pytest.fixture(scope="module")
def faces() -> _Faces:
    whole, blanked, gender, race = [], [], [], []
    for index in range(NUM_TRAIN + NUM_TEST):
        photograph = render_photograph(8, index, WIDTH_PX, HEIGHT_PX, 1)
        (face,) = photograph.faces
        hidden = photograph.image_rgb.copy()
        hidden[head_mask([face.pose], WIDTH_PX, HEIGHT_PX)] = 128
        whole.append(features(photograph.image_rgb, face.pose))
        blanked.append(features(hidden, face.pose))
        gender.append(GENDERS.index(face.gender))
        race.append(UTKFACE.races.index(face.race))
    return _Faces(np.stack(whole), np.stack(blanked), np.array(gender), np.array(race))


def accuracy(images: npt.NDArray[np.float64], codes: npt.NDArray[np.int64], penalty: float) -> float:
    """Train a ridge classifier on the first `NUM_TRAIN` images and return its accuracy on the others."""
    targets = np.eye(codes.max() + 1)[codes]
    middle, mean = images[:NUM_TRAIN].mean(axis=0), targets[:NUM_TRAIN].mean(axis=0)
    inputs = images - middle
    train = inputs[:NUM_TRAIN]
    weights = train.T @ np.linalg.solve(train @ train.T + penalty * np.eye(NUM_TRAIN), targets[:NUM_TRAIN] - mean)
    guesses = (inputs[NUM_TRAIN:] @ weights + mean).argmax(axis=1)
    return float((guesses == codes[NUM_TRAIN:]).mean())


def majority(codes: npt.NDArray[np.int64]) -> float:
    return float((codes[NUM_TRAIN:] == np.bincount(codes[:NUM_TRAIN]).argmax()).mean())


@pytest.mark.parametrize("label", ["gender", "race"])
def test_labels_cannot_be_guessed_from_photographs_without_their_heads(faces: _Faces, label: str) -> None:
    codes = getattr(faces, label)
    for penalty in (0.3, 3.0, 30.0):
        assert accuracy(faces.blanked, codes, penalty) <= majority(codes) + SLACK


@pytest.mark.parametrize(("label", "least"), [("gender", 0.80), ("race", 0.70)])
def test_the_same_classifier_reads_labels_off_whole_photographs(faces: _Faces, label: str, least: float) -> None:
    assert accuracy(faces.whole, getattr(faces, label), 3.0) >= least


def _rendered_with(labels: Labels) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]]:
    for index in range(8):
        photograph = render_photograph(9, index, 320, 240, 2, labels)
        yield photograph.image_rgb, head_mask([face.pose for face in photograph.faces], 320, 240)


@pytest.mark.parametrize("other", OPPOSITES[1:])
def test_other_labels_change_no_pixel_outside_of_the_head(other: Labels) -> None:
    for (first, mask), (second, same_mask) in zip(_rendered_with(OPPOSITES[0]), _rendered_with(other), strict=True):
        assert np.array_equal(mask, same_mask)
        assert not mask.all()
        assert np.array_equal(first[~mask], second[~mask])
        assert not np.array_equal(first[mask], second[mask])


@pytest.mark.parametrize("label", ["age_years", "gender", "race"])
def test_a_label_changes_the_rendered_head(label: str) -> None:
    base = Labels(40.0, "female", "asian")
    values = {"age_years": 70.0, "gender": "male", "race": "indian"}
    changed = Labels(**{"age_years": base.age_years, "gender": base.gender, "race": base.race, label: values[label]})
    first, second = (render_chip(9, 0, 100, labels).image_rgb.astype(int) for labels in (base, changed))
    assert np.abs(first - second).mean() > 3

"""Head pose from projected points with known angles; sharpness falls with blur."""

import cv2
import numpy as np
import pytest

from agr_ray.vision.align import TEMPLATE_POINTS
from agr_ray.vision.pose import head_pose
from agr_ray.vision.quality import sharpness

# A frontal face: x to the viewer's right, y down, z away from the viewer; the nose stands out towards the viewer.
FACE = np.array([[-0.2, 0.29, 0], [0.2, 0.29, 0], [0, 0.53, -0.18], [-0.175, 0.69, -0.02], [0.175, 0.69, -0.02]])


def projected(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Turn the face and look at it from afar: pitch first, roll last."""
    (sp, sy, sr), (cp, cy, cr) = np.sin(np.radians([pitch, yaw, roll])), np.cos(np.radians([pitch, yaw, roll]))
    look_up = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])  # the nose, at negative z, goes to negative y
    turn_right = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])  # the nose goes to positive x
    tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])  # x goes to y, which is down: clockwise
    return 150 * (FACE @ (tilt @ turn_right @ look_up).T)[:, :2] + [400, 300]


@pytest.mark.parametrize("yaw", [-50.0, 0.0, 35.0])
@pytest.mark.parametrize("pitch", [-25.0, 0.0, 30.0])
@pytest.mark.parametrize("roll", [-100.0, -20.0, 0.0, 45.0])
def test_known_angles_are_found(yaw: float, pitch: float, roll: float) -> None:
    assert head_pose(projected(yaw, pitch, roll)) == pytest.approx((yaw, pitch, roll), abs=0.01)


def test_a_nose_to_the_viewers_right_is_a_positive_yaw() -> None:
    landmarks = np.asarray(TEMPLATE_POINTS) * 200
    landmarks[2, 0] += 15
    yaw, _, roll = head_pose(landmarks)
    assert yaw > 10
    assert abs(roll) < 5


def test_a_raised_nose_is_a_positive_pitch() -> None:
    landmarks = np.asarray(TEMPLATE_POINTS) * 200
    landmarks[2, 1] -= 15
    assert head_pose(landmarks)[1] > 10


def test_a_lower_right_eye_is_a_positive_roll() -> None:
    turn = cv2.getRotationMatrix2D((100.0, 100.0), -20.0, 1.0)  # OpenCV's positive angle is counter-clockwise
    landmarks = np.asarray(TEMPLATE_POINTS) * 200 @ turn[:, :2].T + turn[:, 2]
    assert landmarks[1, 1] > landmarks[0, 1]
    assert head_pose(landmarks)[2] == pytest.approx(20, abs=2)


def test_the_mean_face_looks_straight_ahead() -> None:
    assert np.abs(head_pose(np.asarray(TEMPLATE_POINTS))).max() < 5


def test_no_landmarks_give_no_pose() -> None:
    assert np.isnan(head_pose(np.full((5, 2), np.nan))).all()


def test_blur_lowers_the_sharpness() -> None:
    sharp = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    values = [sharpness(sharp), *(sharpness(cv2.GaussianBlur(sharp, (0, 0), sigma)) for sigma in (1, 2, 4))]
    assert values == sorted(values, reverse=True)
    assert values[0] > 10 * values[2]


def test_sharpness_is_comparable_between_sizes() -> None:
    rng = np.random.default_rng(0)
    small = cv2.resize(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8), (112, 112), interpolation=cv2.INTER_CUBIC)
    large = cv2.resize(small, (448, 448), interpolation=cv2.INTER_CUBIC)
    assert sharpness(large) == pytest.approx(sharpness(small), rel=0.25)


def test_a_flat_image_has_no_sharpness() -> None:
    assert sharpness(np.full((80, 80, 3), 90, np.uint8)) == 0.0

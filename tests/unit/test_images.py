"""What every job takes from a detection."""

from __future__ import annotations

import numpy as np

from agr_ray.runtime.images import landmark_columns


def test_landmarks_and_pose_are_columns() -> None:
    landmarks = np.array([[30, 29], [70, 29], [49, 53], [32, 69], [67, 69]], np.float32)

    columns = landmark_columns(landmarks)

    assert columns["landmarks"] == [30, 29, 70, 29, 49, 53, 32, 69, 67, 69]
    assert all(np.isfinite(columns[name]) for name in ("yaw", "pitch", "roll"))


def test_a_detector_without_landmarks_leaves_their_columns_null() -> None:
    assert landmark_columns(np.full((5, 2), np.nan, np.float32)) == {}

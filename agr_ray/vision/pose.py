"""Head pose from five landmarks."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

# A mean face in units of the crop's side: the alignment template, made symmetrical so that it looks straight ahead.
# x points to the viewer's right, y down, z away from the viewer. The eyes are 0.40 apart, 62 mm, so the tip of the nose
# is 28 mm in front of the pupils, and the corners of the mouth 3 mm.
_MEAN_FACE: Final = (
    (-0.200, 0.29, 0.0),
    (0.200, 0.29, 0.0),
    (0.000, 0.53, -0.18),
    (-0.175, 0.69, -0.02),
    (0.175, 0.69, -0.02),
)


def head_pose(landmarks: NDArray[np.floating]) -> tuple[float, float, float]:
    """Return yaw, pitch and roll in degrees, with the signs of `schema.QUALITY_FIELDS`; NaN for NaN landmarks.

    `landmarks` is (5, 2), x before y, in the order of `schema.LANDMARK_NAMES`. The head is modelled as a rigid mean
    face under weak perspective. Least squares gives its 2 x 3 projection; the nearest projection with orthogonal rows
    of equal length gives the rotation. Roll is applied last, so it is the tilt seen in the image. Noses differ, so yaw
    and pitch are only accurate to about ten degrees: enough to tell a frontal face from a turned one.

    Source: DeMenthon and Davis, "Model-based object pose in 25 lines of code", 1995 (the first step, POS).
    """
    points = np.asarray(landmarks, dtype=np.float64)
    if not np.isfinite(points).all():
        return float("nan"), float("nan"), float("nan")
    model = np.asarray(_MEAN_FACE)
    model = model - model.mean(axis=0)
    projection = np.linalg.lstsq(model, points - points.mean(axis=0), rcond=None)[0].T  # 2 x 3
    left, _, right = np.linalg.svd(projection, full_matrices=False)
    x_axis, y_axis = left @ right
    # The rows of Rz(roll) Ry(-yaw) Rx(-pitch), whose third is the cross product of the first two.
    z_axis = np.cross(x_axis, y_axis)
    yaw = np.arcsin(np.clip(z_axis[0], -1.0, 1.0))
    pitch = np.arctan2(-z_axis[1], z_axis[2])
    roll = np.arctan2(y_axis[0], x_axis[0])
    return float(np.degrees(yaw)), float(np.degrees(pitch)), float(np.degrees(roll))

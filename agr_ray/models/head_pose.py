"""Head pose as an input of the heads, beside the features of the image.

The row "CNN + head pose" of the paper's table 10 names no network. Here the heads see four more numbers: |yaw|, pitch
and |roll|, divided by 45 degrees, and 1 if the pose is known. Yaw and roll have no sign, because a mirror image must
get the same prediction. The pose of a face without landmarks is unknown: all four are 0.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_POSE_FEATURES: Final = 4
_UNIT_DEGREES: Final = 45.0


def pose_features(pose_degrees: Tensor | NDArray[np.float32] | None, like: Tensor) -> Tensor:
    """Return the four numbers of each face, (n, 4) float32, on the device of the features `like`, (n, ...).

    Args:
        pose_degrees: (n, 3) yaw, pitch and roll, with the signs of `schema.QUALITY_FIELDS`; NaN: unknown. None: all
            are unknown.
        like: features of the same n faces.
    """
    if pose_degrees is None:
        return torch.zeros(len(like), NUM_POSE_FEATURES, device=like.device)
    yaw, pitch, roll = torch.as_tensor(pose_degrees, dtype=torch.float32, device=like.device).unbind(dim=1)
    known = torch.isfinite(yaw) & torch.isfinite(pitch) & torch.isfinite(roll)
    angles = torch.stack([yaw.abs(), pitch, roll.abs()], dim=1) / _UNIT_DEGREES
    return torch.where(known[:, None], torch.cat([angles, torch.ones_like(angles[:, :1])], dim=1), 0.0)

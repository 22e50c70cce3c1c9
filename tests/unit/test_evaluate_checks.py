"""What evaluating refuses before it measures."""

from __future__ import annotations

import numpy as np
import pytest

from agr_ray.errors import JobError
from agr_ray.runtime.evaluate import _check_finite


def test_predictions_that_are_not_finite_are_counted_by_image() -> None:
    age = np.array([30, np.nan, 40, 50], np.float32)
    p_male = np.array([0.1, np.nan, np.inf, 0.5], np.float32)
    race_probs = np.full((4, 5), 0.2, np.float32)

    with pytest.raises(JobError, match=r"checkpoint c: its predictions for 2 of 4 images are not finite"):
        _check_finite({"age": age, "gender": p_male, "race": race_probs}, "c")
    _check_finite({"race": race_probs}, "c")

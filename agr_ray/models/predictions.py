"""What is predicted of faces."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Predictions(NamedTuple):
    """What is said of n faces, float32; None for a task without head."""

    age: NDArray[np.float32] | None
    """(n,) years, within the range that labels may have."""
    p_male: NDArray[np.float32] | None
    """(n,) probability of "male"; male if and only if it is over 0.5."""
    race_probs: NDArray[np.float32] | None
    """(n, len(RACES)), in the order of `RACES`; each row sums to 1."""

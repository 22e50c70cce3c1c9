"""The sharpness of a face."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

_SIDE_PX: Final = 112


def sharpness(rgb: NDArray[np.uint8]) -> float:
    """Return the variance of the Laplacian of the luminance (0 to 255) of an aligned face; higher is sharper.

    `rgb` is a square uint8 crop of any size. It is first resized to 112 x 112, so that crops of different sizes can be
    compared. A face that has to be enlarged scores as unsharp, which it is.

    Source: Pech-Pacheco, Cristobal, Chamorro-Martinez and Fernandez-Valdivia, "Diatom autofocusing in brightfield
    microscopy: a comparative study", 2000.
    """
    luminance = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    shrinks = luminance.shape[0] > _SIDE_PX
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(luminance, (_SIDE_PX, _SIDE_PX), interpolation=interpolation)
    return float(cv2.Laplacian(resized, cv2.CV_64F).var())

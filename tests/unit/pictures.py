"""Pictures of smooth random shapes, and copies of them."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def picture(seed: int, side: int = 200) -> NDArray[np.uint8]:
    """Return a grey picture."""
    noise = np.random.default_rng(seed).normal(size=(12, 12)).astype(np.float32)
    smooth = cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 45 * smooth, 0, 255).astype(np.uint8)


def encoded(grey: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Return a picture that was compressed and decompressed."""
    body = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(body, cv2.IMREAD_GRAYSCALE), np.uint8)

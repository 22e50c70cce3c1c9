"""The interface of a face detector, and the detectors by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from agr_ray.vision.faces import NO_FACES, Faces

DETECTORS: Final = ("mtcnn", "haar", "none")


class Detector(Protocol):
    """Finds faces. Its `name` is stored in each row."""

    @property
    def name(self) -> str:
        """Return the detector's stable name."""
        ...

    def detect(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Faces]:
        """Return the faces of each image (uint8, height x width x 3, sizes may differ), in pixels of that image."""
        ...


class NoDetector:
    """Finds no faces, so that labelled chips are used whole."""

    name: Final = "none"

    def detect(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Faces]:
        """Return no face for each image."""
        return [NO_FACES for _ in images_rgb]


def make_detector(
    name: str,
    *,
    min_face_px: float = 40.0,
    thresholds: tuple[float, float, float] = (0.6, 0.6, 0.5),
    min_score: float = 0.0,
    device: str = "cpu",
) -> Detector:
    """Build a detector by its name, one of `DETECTORS`.

    `min_face_px` is the size of the smallest face to find, in pixels of the images given to `detect`. `thresholds` are
    those of MTCNN's three nets. Faces with a score below `min_score` are dropped; the scale is the detector's own
    (MTCNN: a probability; Haar: the cascade's weight, mostly 3 to 12). `device` is MTCNN's torch device.

    Raises:
        ValueError: if no detector has that name.
    """
    # Imported here, so that a job with Haar or without a detector does not load torch.
    if name == "mtcnn":
        from agr_ray.vision.detectors.mtcnn import Mtcnn

        return Mtcnn(min_face_px=min_face_px, thresholds=thresholds, min_score=min_score, device=device)
    if name == "haar":
        from agr_ray.vision.detectors.haar import Haar

        return Haar(min_face_px=min_face_px, min_score=min_score)
    if name == "none":
        return NoDetector()
    raise ValueError(f"unknown detector {name!r}; choose one of: {', '.join(DETECTORS)}")

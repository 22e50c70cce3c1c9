"""The interface of a face detector, and the detectors by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from agr_ray.openvino_extra import check_installed
from agr_ray.vision.faces import NO_FACES, Faces

if TYPE_CHECKING:
    from agr_ray.vision.detectors.mtcnn_nets import Nets

DETECTORS: Final = ("mtcnn", "mtcnn_int8", "haar", "none")
CASCADES: Final = ("mtcnn", "mtcnn_int8")
"""Those that find landmarks, and whose scores are probabilities."""
_THRESHOLDS: Final = {"mtcnn": (0.6, 0.6, 0.5), "mtcnn_int8": (0.7, 0.6, 0.5)}
"""Lowest probabilities at which P-Net, R-Net and O-Net pass a candidate on, by detector."""


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


def check_detector(name: str) -> None:
    """Reject a detector whose package is not installed.

    Raises:
        ConfigError: it is not.
    """
    if name == "mtcnn_int8":
        check_installed(f"vision.detector {name}", "openvino")


def make_detector(name: str, *, min_face_px: float = 40.0, min_score: float = 0.0) -> Detector:
    """Build a detector by its name, one of `DETECTORS`.

    `min_face_px` is the size of the smallest face to find, in pixels of the images given to `detect`. Faces with a
    score below `min_score` are dropped; the scale is the detector's own (MTCNN: a probability; Haar: the cascade's
    weight, mostly 3 to 12).

    Raises:
        ConfigError: its package is not installed.
        ValueError: no detector has that name.
    """
    check_detector(name)
    # Imported here, so that a job with Haar or without a detector does not load torch.
    if name in CASCADES:
        from agr_ray.vision.detectors.mtcnn import Mtcnn

        nets: Nets
        if name == "mtcnn":
            from agr_ray.vision.detectors.mtcnn_nets import TorchNets

            nets = TorchNets()
        else:
            from agr_ray.vision.detectors.mtcnn_openvino import OpenVinoNets

            nets = OpenVinoNets()
        return Mtcnn(name, nets, min_face_px=min_face_px, thresholds=_THRESHOLDS[name], min_score=min_score)
    if name == "haar":
        from agr_ray.vision.detectors.haar import Haar

        return Haar(min_face_px=min_face_px, min_score=min_score)
    if name == "none":
        return NoDetector()
    raise ValueError(f"unknown detector {name!r}; choose one of: {', '.join(DETECTORS)}")

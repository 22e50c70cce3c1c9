"""What a face detector is and gives, and the detectors by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from agr_ray.schema import LANDMARK_NAMES

DETECTORS: Final = ("mtcnn", "haar", "none")


@dataclass(frozen=True)
class Faces:
    """The faces of one image, by descending score; n may be 0.

    `boxes_xyxy` is float32 (n, 4) in pixels of the image; boxes may reach beyond it. `scores` is float32 (n,), on the
    detector's own scale. `landmarks` is float32 (n, 5, 2) in the order of `schema.LANDMARK_NAMES`, x before y; NaN
    where the detector gives none.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    landmarks: NDArray[np.float32]

    def __len__(self) -> int:
        """Return how many faces there are."""
        return len(self.scores)

    @staticmethod
    def sorted_by_score(
        boxes_xyxy: NDArray[np.floating], scores: NDArray[np.floating], landmarks: NDArray[np.floating] | None = None
    ) -> Faces:
        """Build faces from unsorted arrays; `landmarks` None: the detector gives none."""
        order = np.argsort(-scores, kind="stable")
        if landmarks is None:
            landmarks = np.full((len(scores), len(LANDMARK_NAMES), 2), np.nan)
        return Faces(
            boxes_xyxy[order].astype(np.float32).reshape(-1, 4),
            scores[order].astype(np.float32),
            landmarks[order].astype(np.float32).reshape(-1, len(LANDMARK_NAMES), 2),
        )

    def scaled(self, factor: float) -> Faces:
        """Return the same faces in an image `factor` times as large: `DecodedImage.scale` leads to original pixels."""
        scale = np.float32(factor)
        return Faces(self.boxes_xyxy * scale, self.scores, self.landmarks * scale)

    def nearest_centre(self, width: float, height: float) -> int:
        """Return the index of the face whose box's centre is nearest the centre of a `width` x `height` image.

        Raises:
            ValueError: if there is no face.
        """
        centres = (self.boxes_xyxy[:, :2] + self.boxes_xyxy[:, 2:]) / 2
        return int(np.hypot(centres[:, 0] - width / 2, centres[:, 1] - height / 2).argmin())


NO_FACES: Final = Faces.sorted_by_score(np.zeros((0, 4)), np.zeros(0))


class Detector(Protocol):
    """Finds faces. `name` goes into every row that comes of it."""

    @property
    def name(self) -> str:
        """Return the detector's stable name."""
        ...

    def detect(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Faces]:
        """Find the faces of each image (uint8, height x width x 3, of any sizes), in the pixels of that image."""
        ...


class NoDetector:
    """Finds no face, so that a labelled chip is used whole."""

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

    `min_face_px` is the smallest face that is looked for, in pixels of the images given to `detect`. `thresholds` are
    those of MTCNN's three nets. Faces of a score below `min_score`, on the detector's own scale (MTCNN: a probability;
    Haar: the cascade's weight, mostly 3 to 12), are dropped. `device` is torch's, for MTCNN.

    Raises:
        ValueError: if no detector has that name.
    """
    # Imported here, so that a job with Haar or with no detector does not load torch.
    if name == "mtcnn":
        from agr_ray.vision.mtcnn import Mtcnn

        return Mtcnn(min_face_px=min_face_px, thresholds=thresholds, min_score=min_score, device=device)
    if name == "haar":
        from agr_ray.vision.haar import Haar

        return Haar(min_face_px=min_face_px, min_score=min_score)
    if name == "none":
        return NoDetector()
    raise ValueError(f"no detector is named {name!r}; there are: {', '.join(DETECTORS)}")

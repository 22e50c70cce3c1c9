"""The faces that a detector finds in an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.schema import LANDMARK_NAMES


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
        """Return the number of faces."""
        return len(self.scores)

    @staticmethod
    def sorted_by_score(
        boxes_xyxy: NDArray[np.floating], scores: NDArray[np.floating], landmarks: NDArray[np.floating] | None = None
    ) -> Faces:
        """Build faces from unsorted arrays; `landmarks` is None if the detector gives none."""
        order = np.argsort(-scores, kind="stable")
        if landmarks is None:
            landmarks = np.full((len(scores), len(LANDMARK_NAMES), 2), np.nan)
        return Faces(
            boxes_xyxy[order].astype(np.float32).reshape(-1, 4),
            scores[order].astype(np.float32),
            landmarks[order].astype(np.float32).reshape(-1, len(LANDMARK_NAMES), 2),
        )

    def scaled(self, factor: float) -> Faces:
        """Return the faces in an image `factor` times as large; with `DecodedImage.scale`, in original pixels."""
        scale = np.float32(factor)
        return Faces(self.boxes_xyxy * scale, self.scores, self.landmarks * scale)

    def turned_back(self, degrees: int, width: float, height: float) -> Faces:
        """Undo the rotation of an image: return the faces in pixels of the unrotated image of `width` x `height`.

        `degrees` is the clockwise rotation with which the faces were found: 0, 90, 180 or 270.
        """
        boxes = _turned_back(self.boxes_xyxy.reshape(-1, 2, 2), degrees, width, height)
        boxes_xyxy = np.concatenate([boxes.min(axis=1), boxes.max(axis=1)], axis=1)
        return Faces(boxes_xyxy, self.scores, _turned_back(self.landmarks, degrees, width, height))

    def nearest_centre(self, width: float, height: float) -> int:
        """Return the index of the face whose box centre is nearest to the centre of a `width` x `height` image.

        Raises:
            ValueError: if there is no face.
        """
        centres = (self.boxes_xyxy[:, :2] + self.boxes_xyxy[:, 2:]) / 2
        return int(np.hypot(centres[:, 0] - width / 2, centres[:, 1] - height / 2).argmin())


def _turned_back(points: NDArray[np.float32], degrees: int, width: float, height: float) -> NDArray[np.float32]:
    """Rotate points (..., 2) counter-clockwise by `degrees`, into an image of `width` x `height`."""
    x, y = points[..., 0], points[..., 1]
    rotated = {0: (x, y), 90: (y, height - x), 180: (width - x, height - y), 270: (width - y, x)}
    return np.stack(rotated[degrees], axis=-1).astype(np.float32)


NO_FACES: Final = Faces.sorted_by_score(np.zeros((0, 4)), np.zeros(0))

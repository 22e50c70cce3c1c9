"""Image file -> photograph -> faces: boxes, landmarks, pose, sharpness and aligned crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agr_ray.config import VisionConfig
from agr_ray.schema import Status
from agr_ray.stopwatch import Stopwatch
from agr_ray.vision.align import DEFAULT_MARGIN, align, align_chip
from agr_ray.vision.decode import DecodedImage, ImageError, decode_image
from agr_ray.vision.detect import CASCADES, make_detector
from agr_ray.vision.faces import Faces
from agr_ray.vision.pose import head_pose
from agr_ray.vision.quality import sharpness

MIB: Final = 2**20
_MAX_DECODED_PIXELS: Final = 16_000_000
"""48 MB of RGB: a dozen photographs at the default `vision.max_side_px`."""


@dataclass(frozen=True)
class Photograph:
    """A decoded image and its faces."""

    image: DecodedImage
    turned_rgb: NDArray[np.uint8]
    """`image.rgb`, rotated clockwise by `rotation_degrees`; crops are cut from it."""
    faces: Faces
    """In pixels of `turned_rgb`."""
    rotation_degrees: int
    """Rotation in which faces were found: 0, 90, 180 or 270; 0 if no faces were found."""

    @property
    def original_faces(self) -> Faces:
        """Return the faces in pixels of the original image, in the orientation of `image` (EXIF applied)."""
        height, width = self.image.rgb.shape[:2]
        return self.faces.turned_back(self.rotation_degrees, width, height).scaled(self.image.scale)


@dataclass(frozen=True)
class Reject:
    """Why an image could not be used."""

    status: Status
    error: str
    may_pass: bool = False
    """Whether storage, not the image, is at fault, so that a second request may succeed."""


class AlignedFace(NamedTuple):
    """One face of a photograph."""

    crop: NDArray[np.uint8]
    """(S, S, 3), RGB, aligned; S is the side of the template and its margins."""
    columns: dict[str, Any]
    """Columns of schema.FACE and schema.CROPS: box, detector_score, landmarks, yaw, pitch and roll (if the detector
    gives landmarks), sharpness. Boxes and landmarks are in pixels of the original image."""


class FaceFinder:
    """Decodes, detects and aligns: the first half of `FaceModel`.

    Args:
        vision: settings of the steps.
        crop_side_px: side of the alignment template.
        margin: of the crops, as a share of the template's side.
        stopwatch: measures the stages.
    """

    def __init__(
        self,
        vision: VisionConfig,
        crop_side_px: int,
        margin: float = DEFAULT_MARGIN,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self._vision = vision
        self._crop_side_px = crop_side_px
        self._margin = margin
        self._stopwatch = stopwatch or Stopwatch()
        # Haar's scores are not probabilities.
        min_score = vision.min_score if vision.detector in CASCADES else 0.0
        self._detector = make_detector(vision.detector, min_face_px=vision.min_face_px, min_score=min_score)

    @property
    def detector_name(self) -> str:
        """Return the detector's name, which is written into every row."""
        return self._detector.name

    def find(self, bodies: Sequence[bytes | Reject]) -> Iterator[Photograph | Reject]:
        """Yield, in order, each image with its faces, or a `Reject`. A `Reject` in `bodies` stays as it is.

        Images are detected in batches of at most `_MAX_DECODED_PIXELS`; a larger image is a batch of its own.
        """
        ahead: list[DecodedImage | Reject] = []
        num_pixels = 0
        for body in bodies:
            with self._stopwatch.stage("decode"):
                each = body if isinstance(body, Reject) else self._decode(body)
            size = 0 if isinstance(each, Reject) else each.rgb.shape[0] * each.rgb.shape[1]
            if num_pixels + size > _MAX_DECODED_PIXELS:
                yield from self._found(ahead)
                ahead, num_pixels = [], 0
            ahead.append(each)
            num_pixels += size
        yield from self._found(ahead)

    def _found(self, decoded: Sequence[DecodedImage | Reject]) -> Iterator[Photograph | Reject]:
        with self._stopwatch.stage("detect"):
            photographs = iter(self._detect([image for image in decoded if isinstance(image, DecodedImage)]))
        return (next(photographs) if isinstance(each, DecodedImage) else each for each in decoded)

    def faces(self, photograph: Photograph) -> list[AlignedFace]:
        """Return all faces from left to right."""
        order = np.argsort(photograph.original_faces.boxes_xyxy[:, 0], kind="stable")
        return [self.face(photograph, index) for index in order.tolist()]

    def face(self, photograph: Photograph, index: int) -> AlignedFace:
        """Return one face, by its index in `photograph.faces`."""
        faces, original = photograph.faces, photograph.original_faces
        with self._stopwatch.stage("align"):
            crop = align(
                photograph.turned_rgb,
                faces.boxes_xyxy[index],
                faces.landmarks[index],
                self._crop_side_px,
                self._margin,
            )
            columns = {
                "box": original.boxes_xyxy[index].tolist(),
                "detector_score": float(original.scores[index]),
                **landmark_columns(original.landmarks[index]),
                "sharpness": sharpness(crop),
            }
        return AlignedFace(crop, columns)

    def chip(self, photograph: Photograph) -> AlignedFace:
        """Return the whole image as a face, for a labelled chip in which no face was found."""
        crop = align_chip(photograph.turned_rgb, self._crop_side_px, self._margin)
        return AlignedFace(crop, {"sharpness": sharpness(crop)})

    def _detect(self, images: Sequence[DecodedImage]) -> list[Photograph]:
        """Find the faces of each image; if there are none upright, try the other rotations if configured.

        Of these, the one whose best face has the highest score is used.
        """
        faces = self._detector.detect([image.rgb for image in images])
        photographs = [Photograph(image, image.rgb, found, 0) for image, found in zip(images, faces, strict=True)]
        if not self._vision.try_rotations:
            return photographs
        faceless = [index for index, found in enumerate(faces) if not len(found)]
        for degrees in (90, 180, 270):
            rotated = [np.ascontiguousarray(np.rot90(images[index].rgb, -degrees // 90)) for index in faceless]
            for index, rgb, found in zip(faceless, rotated, self._detector.detect(rotated), strict=True):
                if len(found) and found.scores[0] > max(photographs[index].faces.scores, default=-np.inf):
                    photographs[index] = Photograph(images[index], rgb, found, degrees)
        return photographs

    def _decode(self, body: bytes) -> DecodedImage | Reject:
        try:
            return decode_image(
                body,
                max_bytes=self._vision.max_mib * MIB,
                max_pixels=self._vision.max_pixels,
                max_side_px=None if self._vision.small_faces else self._vision.max_side_px,
            )
        except ImageError as error:
            return Reject(error.status, str(error))


def landmark_columns(landmarks: NDArray[np.float32]) -> dict[str, Any]:
    """Return landmarks (5, 2) and the head pose computed from them as columns; none if they are NaN."""
    if not np.isfinite(landmarks).all():
        return {}
    yaw, pitch, roll = head_pose(landmarks)
    return {"landmarks": landmarks.ravel().tolist(), "yaw": yaw, "pitch": pitch, "roll": roll}

"""The one way from a URI to the faces of a photograph, for labelled sets and for scoring alike."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from agr_ray.config import VisionConfig
from agr_ray.memory import keep_freed_memory
from agr_ray.schema import Status
from agr_ray.stopwatch import Stopwatch
from agr_ray.storage import ServerFailed, Storage, StorageError
from agr_ray.vision.decode import DecodedImage, ImageError, decode_image
from agr_ray.vision.detect import make_detector
from agr_ray.vision.faces import Faces
from agr_ray.vision.pose import head_pose

MIB = 2**20
NUM_DOWNLOADS = 8
"""Objects that one worker reads at a time: storage is slow to answer and costs no CPU."""


@dataclass(frozen=True)
class Photograph:
    """A decoded image and its faces."""

    image: DecodedImage
    upright_rgb: NDArray[np.uint8]
    """`image.rgb`, rotated clockwise by `rotation_degrees`; crops are cut from it."""
    faces: Faces
    """In pixels of `upright_rgb`."""
    rotation_degrees: int
    """Rotation in which faces were found: 0, 90, 180 or 270; 0 if no faces were found."""

    @property
    def original_faces(self) -> Faces:
        """Return the faces in pixels of the original image, in the orientation of `image` (EXIF applied)."""
        height, width = self.image.rgb.shape[:2]
        return self.faces.turned_back(self.rotation_degrees, width, height).scaled(self.image.scale)


@dataclass(frozen=True)
class Reject:
    """Why an image gave no photograph."""

    status: Status
    error: str
    may_pass: bool = False
    """Whether it was storage that failed, and not the image: asked again, it may give it."""


def landmark_columns(landmarks: NDArray[np.float32]) -> dict[str, Any]:
    """Return landmarks (5, 2) and the head pose seen in them as columns; none where the detector gives none (NaN)."""
    if not np.isfinite(landmarks).all():
        return {}
    yaw, pitch, roll = head_pose(landmarks)
    return {"landmarks": landmarks.ravel().tolist(), "yaw": yaw, "pitch": pitch, "roll": roll}


class ImageReader:
    """Download, decode and detect, a batch at a time. Build one in each worker process, which it claims whole.

    Each worker has one CPU, so OpenCV and torch are told to use one thread here.
    """

    def __init__(self, storage: Storage, vision: VisionConfig, stopwatch: Stopwatch | None = None) -> None:
        cv2.setNumThreads(1)
        torch.set_num_threads(1)
        keep_freed_memory()
        self._stopwatch = stopwatch or Stopwatch()
        self._storage = storage
        self._vision = vision
        self._downloads = ThreadPoolExecutor(NUM_DOWNLOADS)
        # Haar's scores are no probabilities.
        min_score = vision.min_score if vision.detector == "mtcnn" else 0.0
        self._detector = make_detector(vision.detector, min_face_px=vision.min_face_px, min_score=min_score)

    @property
    def detector_name(self) -> str:
        """Return the name that goes into every row."""
        return self._detector.name

    def fetch(self, uris: Sequence[str], etags: Sequence[str | None]) -> list[Future[bytes | Reject]]:
        """Begin to download, without waiting: whoever fetches a batch ahead never waits for storage."""
        return [self._downloads.submit(self._download, *each) for each in zip(uris, etags, strict=True)]

    def read(self, fetched: Sequence[Future[bytes | Reject]]) -> list[Photograph | Reject]:
        """Return, in order, each image with its faces, or why there is none. Only storage that is down raises."""
        with self._stopwatch.stage("wait for storage"):
            bodies = [each.result() for each in fetched]
        with self._stopwatch.stage("decode"):
            decoded = [body if isinstance(body, Reject) else self._decode(body) for body in bodies]
        images = [image for image in decoded if isinstance(image, DecodedImage)]
        with self._stopwatch.stage("detect"):
            photographs = iter(self._detect(images))
        return [next(photographs) if isinstance(each, DecodedImage) else each for each in decoded]

    def _detect(self, images: Sequence[DecodedImage]) -> list[Photograph]:
        """Find the faces of each image; if it has none upright, use the rotation whose best face scores highest."""
        faces = self._detector.detect([image.rgb for image in images])
        photographs = [Photograph(image, image.rgb, found, 0) for image, found in zip(images, faces, strict=True)]
        if not self._vision.try_rotations:
            return photographs
        faceless = [index for index, found in enumerate(faces) if not len(found)]
        for degrees in (90, 180, 270):
            turned = [np.ascontiguousarray(np.rot90(images[index].rgb, -degrees // 90)) for index in faceless]
            for index, rgb, found in zip(faceless, turned, self._detector.detect(turned), strict=True):
                if len(found) and found.scores[0] > max(photographs[index].faces.scores, default=-np.inf):
                    photographs[index] = Photograph(images[index], rgb, found, degrees)
        return photographs

    def _download(self, uri: str, etag: str | None) -> bytes | Reject:
        try:
            return self._storage.read(uri, etag=etag, max_bytes=self._vision.max_mib * MIB)
        except StorageError as error:
            # A local name that is not UTF-8 does not fit into a table.
            said = str(error).encode(errors="replace").decode()
            return Reject(error.status, said, may_pass=isinstance(error, ServerFailed))

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

"""A checkpoint ready for use: the only way from a photograph to faces, and from crops to attributes.

    bytes -> FaceFinder: decode, detect, align -> crops -> AttributePredictor: network, calibration -> attributes

The halves can run in different processes. Scoring does so with GPUs: finders on CPUs, predictors on GPUs. Evaluation
runs the second half alone, on the crops of a prepared set.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Final, Self, TypeAlias, overload

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from agr_ray.config import GatesConfig, VisionConfig
from agr_ray.config.pipeline import DEFAULT_PIPELINE, Pipeline
from agr_ray.data.crops import read_pose
from agr_ray.models.checkpoint_files import local_checkpoint
from agr_ray.models.checkpoint_network import given_network
from agr_ray.predict.attributes import AttributePredictor
from agr_ray.predict.columns import attribute_columns
from agr_ray.predict.downloads import NUM_DOWNLOADS, read_image
from agr_ray.predict.face_finder import MIB, AlignedFace, FaceFinder, Photograph, Reject
from agr_ray.predict.flags import flags
from agr_ray.predict.photo import Face, Photo
from agr_ray.predict.resolve import Resolved, resolve
from agr_ray.schema import QUALITY_FIELDS, Status
from agr_ray.storage import Storage
from agr_ray.vision.decode import DECODING_ERRORS, DecodedImage, ImageError, decode_image

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"
_DRAWN_SIDE_PX: Final = 4096
_PNG_MODES: Final = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
_BATCH_SIZE: Final = 8
"""Maximum photographs in memory at a time."""


class FaceModel:
    """Finds the faces of photographs and predicts their attributes.

    Args:
        finder: the first half.
        predictor: the second half, for crops of the finder's side and margin.
        resolved: the settings of both halves, and the calibration.
        gates: limits beyond which a face is flagged.
        storage: reads photographs that are given as a path or URI.
    """

    def __init__(
        self,
        finder: FaceFinder,
        predictor: AttributePredictor,
        resolved: Resolved,
        gates: GatesConfig,
        storage: Storage,
    ) -> None:
        self.finder = finder
        self.predictor = predictor
        self.resolved = resolved
        self.gates = gates
        self._storage = storage
        self._threads = ThreadPoolExecutor(NUM_DOWNLOADS)

    @classmethod
    def load(
        cls,
        uri: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        overrides: Pipeline = DEFAULT_PIPELINE,
        allow_uncalibrated: bool = False,
        gates: GatesConfig | None = None,
        storage: Storage | None = None,
    ) -> Self:
        """Load a checkpoint.

        Args:
            uri: path or URI of its directory.
            device: of the network; detection stays on the CPU.
            overrides: settings to use instead of the checkpoint's. Only fields that were set explicitly count, as in
                `Pipeline(vision=VisionConfig(min_face_px=20))`.
            allow_uncalibrated: allow overrides that the calibration depends on, and discard it if there are any.
            gates: limits beyond which a face is flagged; None: no limits.
            storage: reads the checkpoint and the photographs; None: storage with default settings.

        Raises:
            ConfigError: there is no such checkpoint, or an override is rejected.
        """
        storage, uri = storage or Storage(), os.fspath(uri)
        with local_checkpoint(storage, uri, "checkpoint") as checkpoint:
            network = given_network(checkpoint, uri, "checkpoint")
            on_gpu = torch.device(device).type != "cpu"
            resolved = resolve(
                checkpoint, overrides, key="checkpoint", on_gpu=on_gpu, allow_uncalibrated=allow_uncalibrated
            )
        pipeline, transform = resolved.pipeline, checkpoint.transform
        finder = FaceFinder(pipeline.vision, transform.crop_side_px, transform.margin)
        model = network.to(device)
        predictor = AttributePredictor(model, transform, pipeline.predict, resolved.calibration, checkpoint.int8)
        calibration = resolved.calibration
        rounding = "" if calibration is None else calibration.precision_warning([predictor.precision])
        for warning in (checkpoint.untrained, checkpoint.rendered, rounding):
            if warning:
                warnings.warn(f"checkpoint {uri}: {warning}", stacklevel=2)
        return cls(finder, predictor, resolved, gates or GatesConfig(), storage)

    @overload
    def predict(self, images: ImageLike, *, strict: bool = False) -> Photo: ...

    @overload
    def predict(self, images: list[Any] | tuple[Any, ...], *, strict: bool = False) -> list[Photo]: ...

    def predict(self, images: ImageLike | list[Any] | tuple[Any, ...], *, strict: bool = False) -> Photo | list[Photo]:
        """Find the faces of one photograph or several, and predict their attributes.

        Args:
            images: a path, a URI, the bytes of an image file, a PIL image, or an RGB array (h, w, 3) uint8; or a list
                of these, which gives a list in the same order. EXIF orientation is applied.
            strict: raise if an image can't be read. Otherwise its `Photo` has a status, an error and no faces.

        Raises:
            ImageError: `strict`, and an image can't be read.
            StorageUnavailable: the S3 server can't be reached.
            TypeError: an argument is not one of these types.
            ValueError: an array has another shape or dtype, or is empty.
        """
        if isinstance(images, list | tuple):
            batches = (images[start : start + _BATCH_SIZE] for start in range(0, len(images), _BATCH_SIZE))
            return [photo for batch in batches for photo in self._predict(batch, strict=strict)]
        return self._predict([images], strict=strict)[0]

    def _predict(self, images: Sequence[ImageLike], *, strict: bool) -> list[Photo]:
        readers = [self._reader(image) for image in images]
        bodies = [each.result() for each in [self._threads.submit(reader) for reader in readers]]
        photos: list[Photo] = []
        found: list[list[AlignedFace]] = []
        for image, reader, seen in zip(images, readers, self.finder.find(bodies), strict=True):
            if isinstance(seen, Reject) and strict:
                raise ImageError(seen.status, f"{_source(image) or 'the image'}: {seen.error}")
            found.append([] if isinstance(seen, Reject) else self.finder.faces(seen))
            photos.append(self._photo(_source(image), reader, seen))
        every_face = [face for faces in found for face in faces]
        if not every_face:
            return photos
        crops = np.stack([face.crop for face in every_face])
        columns = pa.Table.from_pylist([face.columns for face in every_face], schema=pa.schema(QUALITY_FIELDS))
        predicted = self.predictor.attributes(crops, read_pose(columns))
        attributes = iter(pa.table(attribute_columns(predicted, len(crops), self.predictor.space)).to_pylist())
        rows = [
            [face.columns | next(attributes) | {"flags": flags(face.columns, self.gates)} for face in faces]
            for faces in found
        ]
        return [
            replace(photo, status=Status.OK, faces=tuple(map(Face.from_row, faces))) if faces else photo
            for photo, faces in zip(photos, rows, strict=True)
        ]

    def _photo(self, source: str, reader: Callable[[], bytes | Reject], seen: Photograph | Reject) -> Photo:
        """Return a photograph without its faces."""
        open_again = partial(_decoded, reader, self.resolved.pipeline.vision)
        if isinstance(seen, Reject):
            return Photo(source, seen.status, seen.error, None, None, None, (), open_again)
        size = seen.image.width_px, seen.image.height_px
        return Photo(source, Status.NO_FACE, None, *size, seen.rotation_degrees, (), open_again)

    def _reader(self, image: ImageLike) -> Callable[[], bytes | Reject]:
        """Return a function that reads the image as the bytes of a file."""
        if isinstance(image, str | os.PathLike):
            uri = self._storage.absolute(os.fspath(image))
            return partial(read_image, self._storage, uri, None, self.resolved.pipeline.vision.max_mib * MIB)
        if isinstance(image, bytes | bytearray | memoryview):
            return partial(bytes, image)
        if isinstance(image, Image.Image):
            return partial(_encoded, image)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(
                    f"an array must be RGB, (height, width, 3) uint8, and not empty; this one is {image.shape} "
                    f"{image.dtype}"
                )
            return partial(_encoded, Image.fromarray(image))
        raise TypeError(
            f"expected a path, URI, bytes, PIL image or RGB array, or a list of these, not {type(image).__name__}"
        )


load = FaceModel.load


def _source(image: ImageLike) -> str:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else ""


def _decoded(reader: Callable[[], bytes | Reject], vision: VisionConfig) -> DecodedImage:
    """Read a photograph again, for drawing.

    Raises:
        ImageError: it can't be read.
    """
    body = reader()
    if isinstance(body, Reject):
        raise ImageError(body.status, body.error)
    side_px = max(_DRAWN_SIDE_PX, vision.max_side_px)
    return decode_image(
        body,
        max_bytes=vision.max_mib * MIB,
        max_pixels=vision.max_pixels,
        max_side_px=None if vision.small_faces else side_px,
    )


def _encoded(image: Image.Image) -> bytes | Reject:
    """Return an upright PNG, so that images in memory are processed like files."""
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in _PNG_MODES:
            upright = upright.convert("RGB")
        with io.BytesIO() as buffer:
            upright.save(buffer, "PNG", compress_level=1)
            return buffer.getvalue()
    except DECODING_ERRORS as error:  # PIL decodes a file only when its pixels are needed
        return Reject(Status.UNREADABLE, f"{image.format or 'image'}: {error}")

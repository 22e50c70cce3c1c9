"""A preparing worker: manifest rows of a labelled source -> crop rows. Each image is downloaded, hashed and cropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from agr_ray.config import PrepareConfig, VisionConfig
from agr_ray.data.manifest import content_hash
from agr_ray.predict.downloads import Downloads, use_one_cpu
from agr_ray.predict.face_finder import FaceFinder, Photograph, Reject
from agr_ray.schema import CROPS, MANIFEST, TEMPLATE, Status
from agr_ray.storage.parts import Attempts, Parts
from agr_ray.vision.decode import encode_jpeg
from agr_ray.vision.perceptual_hash import perceptual_hash
from agr_ray.vision.thumbnail import thumbnail

Row = dict[str, Any]


class CropMaker:
    """Makes and writes the crop rows of parts. Each worker process has its own."""

    def __init__(self, parts: Parts, vision: VisionConfig, config: PrepareConfig) -> None:
        use_one_cpu()
        self._parts = parts
        self._downloads = Downloads(parts.storage, vision.max_mib, config.batch_size, parts.outage_s)
        self._finder = FaceFinder(vision, config.crop_side_px)
        self._config = config

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, list[str]]]:
        """Make the parts numbered in `part`; yield the statuses of the rows of each, in the column `status`."""
        for number in batch["part"].tolist():
            yield {"status": self.make(number)["status"].to_pylist()}

    def make(self, number: int) -> pa.Table:
        """Write a part's crop rows, in the order of its manifest, and return them.

        Their group_id and split are null unless the source gives them: deriving them needs the hashes of all images.
        """
        rows = self._parts.rows(number).select(MANIFEST.names).to_pylist()
        table = pa.Table.from_pylist(self.crop_rows(rows, self._parts.begin(number)), schema=CROPS)
        self._parts.write(number, table)
        return table

    def crop_rows(self, rows: Sequence[Row], attempts: Attempts) -> list[Row]:
        """Return a row of schema.CROPS for each row, in order; rows that are not ok stay as they are.

        Args:
            rows: of schema.MANIFEST.
            attempts: the attempts record of their part.
        """
        filled = [*rows]
        places = [place for place, row in enumerate(rows) if row["status"] == Status.OK]
        for batch in self._downloads.read([rows[place] for place in places], attempts):
            crops = self.crops([each.body for each in batch])
            for each, columns in zip(batch, crops, strict=True):
                filled[places[each.place]] = rows[places[each.place]] | columns
        return filled

    def crops(self, bodies: Sequence[bytes | Reject]) -> Iterator[Row]:
        """Yield, in order, the columns that each image adds to its row."""
        for body, photograph in zip(bodies, self._finder.find(bodies), strict=True):
            yield {"content_hash": None if isinstance(body, Reject) else content_hash(body)} | self._crop(photograph)

    def _crop(self, photograph: Photograph | Reject) -> Row:
        """Return the columns of one image except content_hash. The face nearest to the centre is the labelled one."""
        if isinstance(photograph, Reject):
            return {"status": str(photograph.status), "error": photograph.error}
        faces = photograph.faces
        if len(faces):
            height, width = photograph.turned_rgb.shape[:2]
            status, face = Status.OK, self._finder.face(photograph, faces.nearest_centre(width, height))
        else:
            status, face = Status.FALLBACK, self._finder.chip(photograph)
        return face.columns | {
            "status": str(status),
            "crop": encode_jpeg(face.crop, self._config.jpeg_quality),
            "template": TEMPLATE,
            "detector": self._finder.detector_name,
            "num_faces": len(faces),
            "rotation_degrees": photograph.rotation_degrees,
            **_fingerprint(face.crop, self._config.crop_side_px),
        }


def _fingerprint(crop: NDArray[np.uint8], side_px: int) -> Row:
    """Return the columns of schema.FINGERPRINT_FIELDS of an aligned crop, without its margin.

    The margin is left out because it shows less of a picture that was cropped.
    """
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    middle = (crop.shape[0] - 1) / 2  # the margin may be half a pixel more than a whole number
    face = np.asarray(cv2.getRectSubPix(grey, (side_px, side_px), (middle, middle)), np.uint8)
    return {"perceptual_hash": int(perceptual_hash(face)) or None, "thumbnail": thumbnail(face).tobytes()}

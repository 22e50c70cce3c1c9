"""Rows of a labelled source -> crop rows, in one worker: each image is downloaded once, hashed and cropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from agr_ray.config import PrepareConfig, VisionConfig
from agr_ray.data.manifest import content_hash
from agr_ray.predict.downloads import Downloads, use_one_cpu
from agr_ray.predict.face_finder import FaceFinder, Photograph, Reject
from agr_ray.schema import CROPS, MANIFEST, TEMPLATE, Status
from agr_ray.storage.parts import KILLED_ITS_WORKER, Parts
from agr_ray.storage.retry import Retry
from agr_ray.vision.decode import encode_jpeg

Row = dict[str, Any]
Download = Future[bytes | Reject]


class CropMaker:
    """Makes the crop rows of parts and writes them. Each worker process has its own."""

    def __init__(self, parts: Parts, vision: VisionConfig, config: PrepareConfig) -> None:
        use_one_cpu()
        self._parts = parts
        self._downloads = Downloads(parts.storage, vision.max_mib)
        self._finder = FaceFinder(vision, config.crop_side_px)
        self._config = config
        self._retry = Retry(parts.outage_s)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, list[str]]]:
        """Make the parts numbered in `part`; yield the statuses of the rows of each, in the column `status`."""
        for number in batch["part"].tolist():
            yield {"status": self.make(number)["status"].to_pylist()}

    def make(self, number: int) -> pa.Table:
        """Write a part's crop rows, in the order of its manifest, and return them.

        Group and split are null, or the source's own: they need the hashes of all images. If an earlier attempt at the
        part died, images are processed one at a time, and one that has killed its worker too often becomes `failed`.
        """
        rows = self._parts.rows(number).select(MANIFEST.names).to_pylist()
        attempts = self._parts.begin(number)
        made: list[Row] = []
        if attempts.has_died:
            for row in rows:
                if attempts.is_given_up(row["image_id"]):
                    made.append(row | {"status": str(Status.FAILED), "error": KILLED_ITS_WORKER})
                    continue
                attempts.suspect(row["image_id"])
                made += self.crop_rows([row])
        else:
            size = self._config.batch_size
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
            ahead = self._fetch(batches[0])
            for batch, following in zip(batches, [*batches[1:], []], strict=True):
                fetched, ahead = ahead, self._fetch(following)  # downloads continue while this batch is cropped
                made += self.crop_rows(batch, fetched)
        table = pa.Table.from_pylist(made, schema=CROPS)
        self._parts.write(number, table)
        return table

    def crop_rows(self, rows: Sequence[Row], fetched: Sequence[Download] | None = None) -> list[Row]:
        """Return a row of schema.CROPS for each of schema.MANIFEST, in order; one that is not ok stays as it is.

        Args:
            rows: of schema.MANIFEST.
            fetched: downloads of the rows that are ok, if they have started.
        """
        begun = [self._fetch(rows) if fetched is None else fetched]

        def read() -> list[Row]:
            return self._read(begun.pop() if begun else self._fetch(rows))  # again, after storage was unavailable

        made = iter(self._retry.call(read))
        return [row | next(made) if row["status"] == Status.OK else row for row in rows]

    def _fetch(self, rows: Sequence[Row]) -> list[Download]:
        readable = [row for row in rows if row["status"] == Status.OK]
        return self._downloads.fetch([row["uri"] for row in readable], [row["etag"] for row in readable])

    def _read(self, fetched: Sequence[Download]) -> list[Row]:
        bodies = [each.result() for each in fetched]
        hashes = [None if isinstance(body, Reject) else content_hash(body) for body in bodies]
        crops = [self._crop(seen) for seen in self._finder.find(bodies)]
        return [{"content_hash": digest} | crop for digest, crop in zip(hashes, crops, strict=True)]

    def _crop(self, seen: Photograph | Reject) -> Row:
        """Return the columns that an image adds to its row. The face nearest the centre is the labelled one."""
        if isinstance(seen, Reject):
            return {"status": str(seen.status), "error": seen.error}
        if len(seen.faces):
            height, width = seen.upright_rgb.shape[:2]
            status, face = Status.OK, self._finder.face(seen, seen.faces.nearest_centre(width, height))
        else:
            status, face = Status.FALLBACK, self._finder.chip(seen)
        return face.columns | {
            "status": str(status),
            "crop": encode_jpeg(face.crop, self._config.jpeg_quality),
            "template": TEMPLATE,
            "detector": self._finder.detector_name,
            "num_faces": len(seen.faces),
            "rotation_degrees": seen.rotation_degrees,
        }

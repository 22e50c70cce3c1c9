"""A scoring worker: a part of a run's manifest -> photographs -> faces -> attributes -> image rows.

`PartFinder` runs on CPUs, `RowPredictor` preferably on a GPU. Without a GPU, both run in one process. With a GPU,
each `PartScorer` sends its crops to a predictor in another process, at most `MAX_PENDING` + 1 batches at a time.

The driver imports this module too, so it does not import torch: its classes do when they are used.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from agr_ray.config import GatesConfig, PredictConfig, VisionConfig
from agr_ray.data.crops import read_pose
from agr_ray.data.rejects import reject_reasons
from agr_ray.evaluation.calibration import Calibration
from agr_ray.models.checkpoint_files import unpacked_checkpoint
from agr_ray.models.transform import Transform
from agr_ray.predict.columns import attribute_columns
from agr_ray.predict.downloads import Download, Downloads, use_one_cpu
from agr_ray.predict.face_finder import FaceFinder, Photograph, Reject
from agr_ray.predict.flags import flags
from agr_ray.schema import FACE, IMAGES, SCORE_MANIFEST, SCORED_STATUSES, Status
from agr_ray.stopwatch import Stopwatch
from agr_ray.storage import Storage
from agr_ray.storage.parts import Parts
from agr_ray.vision.align import stored_side_px
from agr_ray.vision.face_hash import face_hash

MAX_CROPS: Final = 128
"""Faces that are predicted together, unless one photograph has more: 28 MB of 224-pixel crops with margins. The network
takes them in batches of one size, the last of which is padded, so few faces at a time would waste its time."""
MAX_PENDING: Final = 2
"""Maximum batches of faces that wait for a prediction while a worker detects the next, which keeps a GPU busy."""

SUMMARY: Final = pa.schema(
    [
        pa.field("part", pa.int64()),
        pa.field("num_faces", pa.int64()),
        pa.field("statuses", pa.map_(pa.string(), pa.int64())),  # images by status
        pa.field("reasons", pa.map_(pa.string(), pa.int64())),  # rejected images by reason
        pa.field("precisions", pa.list_(pa.string())),  # distinct values of the rows
        pa.field("worker_s", pa.map_(pa.string(), pa.float64())),  # seconds of the worker by stage
    ]
)
"""One row for each part that was scored."""

_Row = tuple[int, dict[str, Any]]
"""A row's index in the part, and the row."""


@dataclass(frozen=True)
class Scoring:
    """Settings of a run that every worker gets."""

    storage: Storage
    work: str
    """Work folder of the plan (`storage.parts`)."""
    vision: VisionConfig
    gates: GatesConfig
    predict: PredictConfig
    attributes: tuple[str, ...]
    batch_size: int
    outage_s: float
    transform: Transform
    checkpoint: Mapping[str, bytes]
    calibration: Calibration | None
    provenance: Mapping[str, Any]
    """Columns that all rows share: run_id, model_digest, config_digest, schema_version."""
    use_gpu: bool
    hashes_faces: bool = False
    """Whether to hash the pixels of each face."""

    @property
    def parts(self) -> Parts:
        """Return the parts of the run's plan."""
        return Parts(self.storage, self.work, self.outage_s)

    @property
    def stored_side_px(self) -> int:
        """Return the side of an aligned crop, its margins included."""
        return stored_side_px(self.transform.crop_side_px, self.transform.margin)


class Found(NamedTuple):
    """Photographs of one part and their faces."""

    positions: NDArray[np.int64]
    """(n,) indices of the rows in the part."""
    images: pa.Table
    """(n rows) schema.IMAGES; attributes are null."""
    crops: NDArray[np.uint8]
    """(faces, S, S, 3): the faces of all images, in order; S is the template's side with its margins."""


class Predictor(Protocol):
    """Predicts the attributes of detected faces, in this process or another."""

    def submit(self, found: Found) -> Callable[[], pa.Table]:
        """Start predicting; return a function that waits for the image rows with attributes, in the same order."""
        ...


class PartScorer:
    """Turns parts into image rows and writes them. Each worker process has its own."""

    def __init__(self, scoring: Scoring, predictor: Predictor | None = None) -> None:
        """If `predictor` is None, predict attributes in this process."""
        self._scoring = dataclasses.replace(scoring, checkpoint={})  # frees the memory once the network is loaded
        self._finder = PartFinder(self._scoring)
        self._predictor = predictor or RowPredictor(scoring, self._finder.stopwatch)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[pa.Table]:
        """Score the parts numbered in `part`; yield a `SUMMARY` row for each."""
        for part in batch["part"].tolist():
            yield pa.Table.from_pylist([self.score(part)], SUMMARY)

    def score(self, part: int) -> dict[str, Any]:
        """Score and write one part, with rows in manifest order; return its `SUMMARY` row.

        At most `MAX_PENDING` + 1 batches of crops are in memory, however many faces the part has.
        """
        positions: list[NDArray[np.int64]] = []
        filled: list[pa.Table] = []
        pending: deque[Callable[[], pa.Table]] = deque()
        for found in self._finder.find(part):
            positions.append(found.positions)
            pending.append(self._predictor.submit(found))
            if len(pending) > MAX_PENDING:
                filled.append(self._wait(pending.popleft()))
        filled += [self._wait(each) for each in pending]
        # Rows that storage refused at first were retried at the end.
        in_order = np.argsort(np.concatenate(positions), kind="stable")
        return self._write(part, pa.concat_tables(filled).take(in_order))

    def _wait(self, predicted: Callable[[], pa.Table]) -> pa.Table:
        with self._finder.stopwatch.stage("wait for predictions"):
            return predicted()

    def _write(self, part: int, images: pa.Table) -> dict[str, Any]:
        """Write a part's rows, delete its attempts record, and return its `SUMMARY` row."""
        with self._finder.stopwatch.stage("write"):
            self._scoring.parts.write(part, images)
        return {
            "part": part,
            "num_faces": len(images["faces"].combine_chunks().flatten()),
            "statuses": Counter(images["status"].to_pylist()),
            "reasons": reject_reasons(images, SCORED_STATUSES),
            "precisions": pc.unique(images["precision"].drop_null()).to_pylist(),
            "worker_s": self._finder.stopwatch.take(),
        }


class PartFinder:
    """Downloads the photographs of a part and finds their faces. Each worker has its own."""

    def __init__(self, scoring: Scoring) -> None:
        use_one_cpu()
        self.stopwatch = Stopwatch()
        self._scoring = scoring
        self._downloads = Downloads(
            scoring.storage, scoring.vision.max_mib, scoring.batch_size, scoring.outage_s, self.stopwatch
        )
        transform = scoring.transform
        self._finder = FaceFinder(scoring.vision, transform.crop_side_px, transform.margin, self.stopwatch)

    def find(self, part: int) -> Iterator[Found]:
        """Find the faces of all images of a part, `MAX_CROPS` or few more at a time; killers of workers are given up.

        Each row of the part is yielded once, mostly in manifest order; rows that storage refuses at first come last.
        If a worker dies before an image's attributes are predicted, the image counts as the cause.
        """
        parts = self._scoring.parts
        rows = parts.rows(part).select(SCORE_MANIFEST.names).to_pylist()
        attempts = parts.begin(part)
        images: list[_Row] = []
        crops: list[NDArray[np.uint8]] = []
        for batch in self._downloads.read(rows, attempts):
            for row, aligned in self._find_batch(rows, batch):
                images.append(row)
                crops += aligned
                if len(crops) >= MAX_CROPS:
                    yield self._found(images, crops)
                    images, crops = [], []
            if images and attempts.has_died:  # the batch is one image, which is suspected until it is predicted
                yield self._found(images, crops)
                images, crops = [], []
        if images:
            yield self._found(images, crops)

    def _find_batch(
        self, rows: Sequence[dict[str, Any]], batch: Sequence[Download]
    ) -> Iterator[tuple[_Row, list[NDArray[np.uint8]]]]:
        """Yield the row of each image of a batch, and the crops of its faces."""
        common = self._common()
        for (place, _), each in zip(batch, self._finder.find([body for _, body in batch]), strict=True):
            columns, aligned = (_rejected(each), []) if isinstance(each, Reject) else self._faces(each)
            yield (place, rows[place] | common | columns), aligned

    def _found(self, rows: Sequence[_Row], crops: Sequence[NDArray[np.uint8]]) -> Found:
        side_px = self._scoring.stored_side_px
        stacked = np.stack(crops) if crops else np.empty((0, side_px, side_px, 3), np.uint8)
        positions = np.array([position for position, _ in rows], np.int64)
        return Found(positions, pa.Table.from_pylist([row for _, row in rows], schema=IMAGES), stacked)

    def _common(self) -> dict[str, Any]:
        return {
            **self._scoring.provenance,
            "calibrated": self._scoring.calibration is not None,
            "detector": self._finder.detector_name,
            "scored_at": datetime.datetime.now(datetime.UTC),
        }

    def _faces(self, photograph: Photograph) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:
        """Return the columns that a photograph adds to its row, and the crops of its faces, from left to right."""
        found = self._finder.faces(photograph)
        faces = [face.columns | {"flags": flags(face.columns, self._scoring.gates)} for face in found]
        if self._scoring.hashes_faces:
            with self.stopwatch.stage("hash"):
                for row, face in zip(faces, found, strict=True):
                    row["perceptual_hash"] = face_hash(face.crop, self._scoring.transform.crop_side_px)
        return {
            "status": str(Status.OK if faces else Status.NO_FACE),
            "width_px": photograph.image.width_px,
            "height_px": photograph.image.height_px,
            "rotation_degrees": photograph.rotation_degrees,
            "faces": faces,
        }, [face.crop for face in found]


class RowPredictor:
    """Fills attributes into image rows, in this process. Each worker has its own."""

    def __init__(self, scoring: Scoring, stopwatch: Stopwatch | None = None) -> None:
        from agr_ray.predict.attributes import AttributePredictor  # imports torch

        with unpacked_checkpoint(dict(scoring.checkpoint)) as directory:
            device = "cuda" if scoring.use_gpu else "cpu"
            self._predictor = AttributePredictor.load(directory, scoring.predict, scoring.calibration, device)
        self._attributes = scoring.attributes
        self._stopwatch = stopwatch or Stopwatch()

    def submit(self, found: Found) -> Callable[[], pa.Table]:
        """Predict immediately, so that the crops can be freed."""
        filled = self.fill(found)
        return lambda: filled

    def fill(self, found: Found) -> pa.Table:
        """Return the image rows with the attributes of their faces."""
        num_faces = len(found.crops)
        if not num_faces:
            return found.images
        faces = found.images["faces"].combine_chunks()
        fields = {field.name: faces.flatten().field(field.name) for field in FACE}
        with self._stopwatch.stage("predict"):
            predicted = self._predictor.attributes(found.crops, read_pose(fields))
            fields |= attribute_columns(predicted, num_faces, self._predictor.space, self._attributes)
        filled = pa.StructArray.from_arrays(list(fields.values()), fields=list(FACE))
        lists = pa.ListArray.from_arrays(faces.offsets, filled)
        has_faces = pc.greater(pc.list_value_length(lists), 0)
        columns = {"faces": lists, "precision": pc.if_else(has_faces, self._predictor.precision, None)}
        return pa.table({name: columns.get(name, found.images[name]) for name in IMAGES.names}, schema=IMAGES)


def _rejected(reject: Reject) -> dict[str, Any]:
    return {"status": str(reject.status), "error": reject.error, "faces": []}

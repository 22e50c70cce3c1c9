"""What a scoring worker does: a part of a run's manifest -> photographs -> faces -> attributes -> image rows.

`FaceFinder` runs on CPUs, `AttributePredictor` preferably on a GPU. Without a GPU, both run in one process. With a GPU,
each `PartScorer` sends its crops to a predictor in another process, a few batches ahead.
"""

from __future__ import annotations

import datetime
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from agr_ray.config import GatesConfig, PredictConfig, VisionConfig
from agr_ray.data.rejects import reject_reasons
from agr_ray.evaluation.calibration import CalibratedPredictions, Calibration
from agr_ray.evaluation.terms import predicted_gender
from agr_ray.models.checkpoint import load_checkpoint
from agr_ray.models.checkpoint_files import unpacked_checkpoint
from agr_ray.models.predictions import Predictions, class_probs_column
from agr_ray.models.transform import Transform
from agr_ray.predict.forward import predict
from agr_ray.predict.inference import for_inference
from agr_ray.predict.photographs import ImageReader, Photograph, Reject, landmark_columns
from agr_ray.schema import FACE, IMAGES, SCORE_MANIFEST, SCORED_STATUSES, Status
from agr_ray.stopwatch import Stopwatch
from agr_ray.storage import Storage, StorageUnavailable
from agr_ray.storage.parts import KILLED_ITS_WORKER, Attempts, Parts
from agr_ray.storage.retry import Retry
from agr_ray.vision.align import align, crop_side_px
from agr_ray.vision.quality import sharpness

PREDICT_BATCH: Final = {"cpu": 32, "cuda": 256}
"""Faces that go through the network at a time, at most: what a CPU's cache holds, and what fills a GPU."""
MAX_CROPS: Final = 256
"""Maximum faces in a batch, unless one photograph has more: 56 MB of 224-pixel crops with margins."""
MAX_PENDING: Final = 2
"""Maximum batches of faces in flight: a worker keeps detecting while it waits for these, which keeps a GPU busy."""

SUMMARY: Final = pa.schema(
    [
        pa.field("part", pa.int64()),
        pa.field("num_faces", pa.int64()),
        pa.field("statuses", pa.map_(pa.string(), pa.int64())),  # images by status
        pa.field("reasons", pa.map_(pa.string(), pa.int64())),  # rejected images by reason
        pa.field("worker_s", pa.map_(pa.string(), pa.float64())),  # seconds of the worker by stage
    ]
)
"""One row for each part that was scored."""

_Row = tuple[int, dict[str, Any]]
"""A row and its place in the part."""


@dataclass(frozen=True)
class Scoring:
    """What every worker of a run is told."""

    storage: Storage
    work: str
    """Folder of the run's work, with its `parts`."""
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

    @property
    def parts(self) -> Parts:
        """Return the parts of the run's plan."""
        return Parts(self.storage, self.work, self.outage_s)

    @property
    def stored_side_px(self) -> int:
        """Return the side of an aligned crop, its margins included."""
        return crop_side_px(self.transform.crop_side_px, self.transform.margin)


class Found(NamedTuple):
    """Photographs of one part and their faces."""

    positions: NDArray[np.int64]
    """(n,) the rows' places in the part, from 0."""
    images: pa.Table
    """(n rows) schema.IMAGES; attributes are null."""
    crops: NDArray[np.uint8]
    """(faces of all images in their order, S, S, 3), S being the template's side and its margins."""


class Predictor(Protocol):
    """Predicts the attributes of detected faces, in this process or another."""

    def submit(self, found: Found) -> Callable[[], pa.Table]:
        """Start predicting; return a function that waits for the image rows with attributes, in the same order."""
        ...


class PartScorer:
    """Turns parts into image rows and writes them. Each worker process has its own."""

    def __init__(self, scoring: Scoring, predictor: Predictor | None = None) -> None:
        """If `predictor` is None, predict attributes in this process."""
        self._scoring = scoring
        self._finder = FaceFinder(scoring)
        self._predictor = predictor or AttributePredictor(scoring, self._finder.stopwatch)

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
            "worker_s": self._finder.stopwatch.take(),
        }


class FaceFinder:
    """Downloads, decodes, detects and aligns. One worker's own."""

    def __init__(self, scoring: Scoring) -> None:
        self.stopwatch = Stopwatch()
        self._scoring = scoring
        self._reader = ImageReader(scoring.storage, scoring.vision, self.stopwatch)
        self._retry = Retry(scoring.outage_s)

    def find(self, part: int) -> Iterator[Found]:
        """Find the faces of all images of a part, a batch at a time; one that kills its worker is given up.

        Each row of the part is yielded once, mostly in manifest order. A server that has just restarted may refuse
        requests that succeed a moment later. So refused photographs are requested once more, after all others, once
        the part's manifest can be read again.

        That the part is begun is noted in storage until it is written. Where an earlier attempt at it has died, images
        are taken one at a time, and which one is at work is noted beforehand: an image that has killed its worker
        `storage.parts.MAX_DEATHS` times, before its attributes were there, is given up.
        """
        parts = self._scoring.parts
        rows = list(enumerate(parts.rows(part).select(SCORE_MANIFEST.names).to_pylist()))
        attempts = parts.begin(part)
        find = partial(self._find_carefully, attempts) if attempts.has_died else self._find
        refused: list[_Row] = []
        yield from find(rows, refused)
        if refused:
            parts.rows(part)
            yield from find(refused, None)

    def _find(self, rows: Sequence[_Row], refused: list[_Row] | None) -> Iterator[Found]:
        size = self._scoring.batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        ahead = self._fetch(batches[0])
        for index, batch in enumerate(batches):
            fetched = ahead
            if index + 1 < len(batches):
                ahead = self._fetch(batches[index + 1])
            yield from self._find_batch(batch, fetched, refused)

    def _find_carefully(self, attempts: Attempts, rows: Sequence[_Row], refused: list[_Row] | None) -> Iterator[Found]:
        for position, row in rows:
            if attempts.is_given_up(row["image_id"]):
                reject = Reject(Status.FAILED, KILLED_ITS_WORKER)
                yield self._found([(position, row | self._common() | _rejected(reject))], [])
                continue
            attempts.suspect(row["image_id"])
            yield from self._find_batch([(position, row)], self._fetch([(position, row)]), refused)
        attempts.suspect("")

    def _fetch(self, rows: Sequence[_Row]) -> Any:
        return self._reader.fetch([row["uri"] for _, row in rows], [row["etag"] for _, row in rows])

    def _find_batch(self, rows: Sequence[_Row], fetched: Any, refused: list[_Row] | None) -> Iterator[Found]:
        """Find the faces of a batch, in pieces of about `MAX_CROPS` faces.

        If `refused` is given, rows worth retrying are appended to it instead of being yielded.
        """
        try:
            seen = self._reader.read(fetched)
        except StorageUnavailable:
            seen = self._retry.call(lambda: self._reader.read(self._fetch(rows)))
        common = self._common()
        images: list[_Row] = []
        crops: list[NDArray[np.uint8]] = []
        for (position, row), each in zip(rows, seen, strict=True):
            if isinstance(each, Reject) and each.may_pass and refused is not None:
                refused.append((position, row))
                continue
            if isinstance(each, Reject):
                columns = _rejected(each)
            else:
                with self.stopwatch.stage("align"):
                    columns, aligned = self._faces(each)
                crops += aligned
            images.append((position, row | common | columns))
            if len(crops) >= MAX_CROPS:
                yield self._found(images, crops)
                images, crops = [], []
        yield self._found(images, crops)

    def _found(self, rows: Sequence[_Row], crops: Sequence[NDArray[np.uint8]]) -> Found:
        side_px = self._scoring.stored_side_px
        stacked = np.stack(crops) if crops else np.empty((0, side_px, side_px, 3), np.uint8)
        positions = np.array([position for position, _ in rows], np.int64)
        return Found(positions, pa.Table.from_pylist([row for _, row in rows], schema=IMAGES), stacked)

    def _common(self) -> dict[str, Any]:
        return {
            **self._scoring.provenance,
            "calibrated": self._scoring.calibration is not None,
            "detector": self._reader.detector_name,
            "scored_at": datetime.datetime.now(datetime.UTC),
        }

    def _faces(self, photograph: Photograph) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:
        """Return what a photograph adds to its row, and its faces' crops, both from left to right."""
        original = photograph.original_faces
        transform = self._scoring.transform
        faces, crops = [], []
        for index in np.argsort(original.boxes_xyxy[:, 0], kind="stable").tolist():
            box, landmarks = photograph.faces.boxes_xyxy[index], photograph.faces.landmarks[index]
            crop = align(photograph.upright_rgb, box, landmarks, transform.crop_side_px, transform.margin)
            face = {
                "box": original.boxes_xyxy[index].tolist(),
                "detector_score": float(original.scores[index]),
                **landmark_columns(original.landmarks[index]),
                "sharpness": sharpness(crop),
            }
            faces.append(face | {"flags": flags(face, self._scoring.gates)})
            crops.append(crop)
        return {
            "status": str(Status.OK if faces else Status.NO_FACE),
            "width_px": photograph.image.width_px,
            "height_px": photograph.image.height_px,
            "rotation_degrees": photograph.rotation_degrees,
            "faces": faces,
        }, crops


class AttributePredictor:
    """Predicts and calibrates in this process. Each worker has its own."""

    def __init__(self, scoring: Scoring, stopwatch: Stopwatch | None = None) -> None:
        self._device = "cuda" if scoring.use_gpu else "cpu"
        with unpacked_checkpoint(dict(scoring.checkpoint)) as directory:
            loaded = load_checkpoint(directory, device=self._device)
        self._model = for_inference(loaded.model, scoring.predict.precision)
        self._scoring = scoring
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
            fields |= self._attributes(found.crops)
        filled = pa.StructArray.from_arrays(list(fields.values()), fields=list(FACE))
        lists = pa.ListArray.from_arrays(faces.offsets, filled)
        return found.images.set_column(IMAGES.get_field_index("faces"), IMAGES.field("faces"), lists)

    def _attributes(self, crops: NDArray[np.uint8]) -> dict[str, pa.Array]:
        """Return the columns of each face's attributes: of those that are asked for and that the network has."""
        size = PREDICT_BATCH[self._device]
        batches = [
            predict(self._model, crops[start : start + size], self._scoring.transform, self._scoring.predict)
            for start in range(0, len(crops), size)
        ]
        columns_of_batches = zip(*batches, strict=True)
        predictions = Predictions(*(None if each[0] is None else np.concatenate(each) for each in columns_of_batches))
        calibration = self._scoring.calibration
        made = uncalibrated(predictions) if calibration is None else calibration.apply(predictions)
        asked = self._scoring.attributes
        columns: dict[str, pa.Array] = {}
        abstained: dict[str, NDArray[np.bool_]] = {}
        if made.age is not None and "age" in asked:
            columns["age"] = pa.array(made.age, pa.float32())
            if made.age_low is not None:
                columns["age_low"] = pa.array(made.age_low, pa.float32())
                columns["age_high"] = pa.array(made.age_high, pa.float32())
        if made.p_male is not None and "gender" in asked:
            is_nan = np.asarray(np.isnan(made.p_male))
            columns["p_male"] = pa.array(made.p_male, pa.float32())
            columns["gender"] = pa.array(
                np.asarray(self._model.space.genders)[predicted_gender(made.p_male)], mask=is_nan
            )
            abstained["gender"] = is_nan if made.abstain_gender is None else is_nan | made.abstain_gender
        if made.race_probs is not None and "race" in asked:
            races = self._model.space.races
            columns["race_probs"] = class_probs_column(made.race_probs, races)
            is_nan = np.asarray(np.isnan(made.race_probs).any(axis=1))
            columns["race"] = pa.array(np.asarray(races)[made.race_probs.argmax(axis=1)], mask=is_nan)
            abstained["race"] = is_nan if made.abstain_race is None else is_nan | made.abstain_race
        names = [[name for name, chosen in abstained.items() if chosen[face]] for face in range(len(crops))]
        columns["abstain"] = pa.array(names, pa.list_(pa.string()))
        return columns


def flags(face: Mapping[str, Any], gates: GatesConfig) -> list[str]:
    """Return which of schema.FLAGS a face has, in their order. Without landmarks it is never `turned`."""
    x0, y0, x1, y1 = face["box"]
    turn = max(abs(face.get("yaw") or 0.0), abs(face.get("pitch") or 0.0))
    found = {
        "small": min(x1 - x0, y1 - y0) < gates.min_side_px,
        "blurred": face["sharpness"] < gates.min_sharpness,
        "turned": turn > gates.max_turn_degrees,
        "unsure": face["detector_score"] < gates.min_detector_score,
    }
    return [name for name, holds in found.items() if holds]


def uncalibrated(predictions: Predictions) -> CalibratedPredictions:
    """Return predictions as they are: without intervals, and never abstaining."""
    return CalibratedPredictions(
        age=predictions.age,
        age_low=None,
        age_high=None,
        p_male=predictions.p_male,
        race_probs=predictions.race_probs,
        abstain_gender=None,
        abstain_race=None,
    )


def _rejected(reject: Reject) -> dict[str, Any]:
    return {"status": str(reject.status), "error": reject.error, "faces": []}

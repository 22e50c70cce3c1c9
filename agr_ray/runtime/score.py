"""Photographs below a folder or bucket prefix -> one Parquet row an image, with every face in it.

Work in progress lies in OUT-work/RUN/ and is copied to OUT/images/run=RUN/ when every row is there; `_SUCCESS.json`
with the counts comes last. The run is named by model and configuration: a run that was killed is gone on with, and
one that is published is scored again only where photographs have come since.
"""

from __future__ import annotations

import datetime
import json
import time
from collections import Counter
from functools import partial
from itertools import islice
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from agr_ray.config import ConfigError, PredictConfig, ScoreJob, VisionConfig, digest
from agr_ray.data.manifest import IMAGE_SUFFIXES, image_id
from agr_ray.learn.metrics import predicted_gender
from agr_ray.learn.predict import predict
from agr_ray.models.checkpoint import load_checkpoint, model_digest, read_meta
from agr_ray.runtime.checkpoints import local_checkpoint, portable_checkpoint, unpacked_checkpoint
from agr_ray.runtime.cluster import check_fits, cluster, worker_count
from agr_ray.runtime.images import ImageReader, Photograph, Reject, landmark_columns
from agr_ray.runtime.parts import finished_ids, keep_only, print_failed, read_parts, without, write_parts
from agr_ray.schema import GENDERS, IMAGES, RACES, SCHEMA_VERSION, SCORE_MANIFEST, Status
from agr_ray.storage import Storage
from agr_ray.vision.align import align
from agr_ray.vision.quality import sharpness

SUCCESS: Final = "_SUCCESS.json"


def score(job: ScoreJob) -> str:
    """Score what is not scored yet, publish, and return the folder of the image rows.

    Raises:
        ConfigError: there is no such checkpoint, nothing to score, or the plan can't fit.
        StorageUnavailable: input or output can't be reached.
    """
    console = Console()
    storage = Storage.from_config(job.storage)
    out = storage.absolute(job.score.out).rstrip("/")
    if job.vision.detector == "none":
        raise ConfigError("vision.detector 'none' finds no face in a photograph; allowed in scoring: mtcnn, haar")
    with local_checkpoint(storage, job.score.checkpoint, "score.checkpoint") as directory:
        checkpoint, model, meta = portable_checkpoint(directory), model_digest(directory), read_meta(directory)
    settings = digest(job.vision, job.predict)
    run_id = f"{model[:12]}-{settings}"
    provenance: dict[str, Any] = {
        "run_id": run_id,
        "model_digest": model,
        "config_digest": settings,
        "schema_version": SCHEMA_VERSION,
    }
    detector = meta["data"].get("detector")
    if detector not in (None, job.vision.detector):
        console.print(f"warning: trained on crops found by {detector}, scoring with {job.vision.detector}")

    manifest = _manifest(storage, job)
    published = storage.join(out, "images", f"run={run_id}")
    work = storage.join(f"{out}-work", run_id, "images")
    todo = without(without(manifest, finished_ids(storage, published)), finished_ids(storage, work))
    console.print(f"{manifest.num_rows:,} photographs, {todo.num_rows:,} to do", highlight=False)
    started = time.perf_counter()
    if todo.num_rows:
        keep_only(storage, work, finished_ids(storage, work))
        with cluster(job.cluster):
            num_workers = worker_count(job.score.num_workers)
            check_fits("score.num_workers", num_workers, 1.0)
            started = time.perf_counter()
            write_parts(
                todo,
                partial(FaceScorer, storage, job.vision, job.predict, checkpoint, provenance),
                storage=storage,
                folder=work,
                num_workers=num_workers,
                batch_size=job.score.batch_size,
                max_rows_per_part=job.score.rows_per_file,
                label="scoring",
                console=console,
            )
    elapsed_s = time.perf_counter() - started
    _publish(storage, work, published)
    rows = storage.read_table(published, columns=["image_id", "status", "faces"])
    num_lost = without(manifest, rows["image_id"].combine_chunks()).num_rows
    if num_lost:
        raise RuntimeError(f"{published} lacks the rows of {num_lost} photographs")
    counts = dict(sorted(Counter(rows["status"].to_pylist()).items()))
    record = provenance | {"rows": rows.num_rows, "counts": counts, "input": storage.absolute(job.score.input)}
    storage.write(storage.join(published, SUCCESS), (json.dumps(record, indent=2) + "\n").encode())
    _print_summary(console, rows, counts, published)
    if todo.num_rows:
        console.print(f"{todo.num_rows:,} photographs in {elapsed_s:.1f} s: {todo.num_rows / elapsed_s:.1f} images/s")
    return published


class FaceScorer:
    """Rows of schema.SCORE_MANIFEST -> rows of schema.IMAGES. One worker's own."""

    def __init__(
        self,
        storage: Storage,
        vision: VisionConfig,
        config: PredictConfig,
        checkpoint: dict[str, bytes],
        provenance: dict[str, Any],
    ) -> None:
        self._reader = ImageReader(storage, vision)
        with unpacked_checkpoint(checkpoint) as directory:
            loaded = load_checkpoint(directory)
        self._model, self._transform = loaded.model, loaded.transform
        self._config = config
        self._provenance = provenance | {"detector": self._reader.detector_name}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return a row for each of `batch`, in order, whatever happened to the image."""
        rows = batch.select(SCORE_MANIFEST.names).to_pylist()
        seen = self._reader.read([row["uri"] for row in rows], [row["etag"] for row in rows])
        scored = iter(self._score_faces([each for each in seen if isinstance(each, Photograph)]))
        common = self._provenance | {"scored_at": datetime.datetime.now(datetime.UTC)}
        made = [
            row | common | (_rejected(each) if isinstance(each, Reject) else next(scored))
            for row, each in zip(rows, seen, strict=True)
        ]
        return pa.Table.from_pylist(made, schema=IMAGES)

    def _score_faces(self, photographs: list[Photograph]) -> list[dict[str, Any]]:
        """Return what each photograph adds to its row. The faces of all go through the network together."""
        side_px = self._transform.crop_side_px
        crops = [
            align(photograph.image.rgb, box, landmarks, side_px, self._transform.margin)
            for photograph in photographs
            for box, landmarks in zip(photograph.faces.boxes_xyxy, photograph.faces.landmarks, strict=True)
        ]
        attributes = iter(self._attributes(crops))
        made = []
        for photograph in photographs:
            original = photograph.faces.scaled(photograph.image.scale)
            faces = [
                {
                    "box": box.tolist(),
                    "detector_score": float(detector_score),
                    **landmark_columns(landmarks),
                    "flags": [],
                    **next(attributes),
                }
                for box, detector_score, landmarks in zip(
                    original.boxes_xyxy, original.scores, original.landmarks, strict=True
                )
            ]
            made.append(
                {
                    "status": str(Status.OK if faces else Status.NO_FACE),
                    "width_px": photograph.image.width_px,
                    "height_px": photograph.image.height_px,
                    "faces": sorted(faces, key=lambda face: face["box"][0]),
                }
            )
        return made

    def _attributes(self, crops: list[Any]) -> list[dict[str, Any]]:
        """Return sharpness and predictions of each crop; a task without a head is null."""
        if not crops:
            return []
        made = predict(self._model, np.stack(crops), self._transform, self._config)
        attributes: list[dict[str, Any]] = [{"sharpness": sharpness(crop)} for crop in crops]
        for index, face in enumerate(attributes):
            if made.age is not None:
                face["age"] = float(made.age[index])
            if made.p_male is not None:
                face["p_male"] = float(made.p_male[index])
                face["gender"] = GENDERS[int(predicted_gender(made.p_male[index : index + 1])[0])]
            if made.race_probs is not None:
                face["race_probs"] = made.race_probs[index].tolist()
                face["race"] = RACES[int(made.race_probs[index].argmax())]
        return attributes


def _rejected(reject: Reject) -> dict[str, Any]:
    return {"status": str(reject.status), "error": reject.error, "faces": []}


def _manifest(storage: Storage, job: ScoreJob) -> pa.Table:
    listed = islice(storage.list(storage.absolute(job.score.input), IMAGE_SUFFIXES), job.score.limit)
    records = [
        {
            "image_id": image_id(f"{info.uri}\n{info.etag}"),
            "uri": info.uri,
            "etag": info.etag,
            "size_bytes": info.size_bytes,
        }
        for info in listed
    ]
    if not records:
        raise ConfigError(
            f"score.input {job.score.input}: no photograph below it: no key ends in {', '.join(IMAGE_SUFFIXES)}"
        )
    return pa.Table.from_pylist(records, schema=SCORE_MANIFEST)


def _publish(storage: Storage, work: str, published: str) -> None:
    """Copy the finished parts to where readers look, then delete the work. Doing it twice changes nothing.

    Published rows that failed give way to those of their next try.
    """
    if not storage.exists(work):
        return
    storage.delete(storage.join(published, SUCCESS))  # not whole while parts are added
    made = read_parts(storage, work)["image_id"].combine_chunks()
    keep_only(storage, published, without(read_parts(storage, published), made)["image_id"].combine_chunks())
    for part in list(storage.list(work, (".parquet",))):
        storage.write(storage.join(published, part.key), storage.read(part.uri))
    storage.delete_tree(work)


def _print_summary(console: Console, rows: pa.Table, counts: dict[str, int], published: str) -> None:
    num_faces = pc.sum(pc.list_value_length(rows["faces"])).as_py() or 0
    table = Table("status", "photographs", title=published)
    for status, count in counts.items():
        table.add_row(status, f"{count:,}")
    console.print(table)
    console.print(f"{rows.num_rows:,} rows, {num_faces:,} faces", highlight=False)
    print_failed(console, counts)

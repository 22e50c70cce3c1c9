"""Labelled photographs -> a prepared set: manifest, splits and aligned crops.

Nothing is remembered but the set itself: a run that was killed sees which rows the parts hold, and makes the rest.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from agr_ray.config import PrepareConfig, PrepareJob, SourceConfig, VisionConfig
from agr_ray.console import make_console, make_table
from agr_ray.data.manifest import SourceRow, build_manifest, content_hashes, labels_digest
from agr_ray.data.prepared import FORMAT_VERSION, PreparedSet, find_prepared
from agr_ray.data.sources import folder, utkface
from agr_ray.data.sources.label_table import LabelTableError, find_labels
from agr_ray.data.splits import SplitLeakError, assign_splits, check_no_leak, split_digest, split_manifest_text
from agr_ray.data.standing import apply_edits, find_standing
from agr_ray.errors import ConfigError, JobError
from agr_ray.predict.photographs import MIB, ImageReader, Photograph, Reject, landmark_columns
from agr_ray.progress import print_failed, progress
from agr_ray.runtime.cluster import check_fits, cluster, worker_count
from agr_ray.runtime.parts import without, write_parts
from agr_ray.schema import CROP_STATUSES, CROPS, MANIFEST, SPLITS, TEMPLATE, Status
from agr_ray.storage import Storage
from agr_ray.storage.lock import RunLock, run_lock
from agr_ray.tables.rejects import reject_reasons
from agr_ray.vision.align import DEFAULT_MARGIN, align, align_chip
from agr_ray.vision.decode import encode_jpeg
from agr_ray.vision.quality import sharpness

LOCK: Final = "lock.json"
"""Lock file that keeps two jobs from writing the same set."""
SPLIT_MEMORY: Final = "split_memory.parquet"
"""Splits of all content that the set has ever held."""


def prepare(job: PrepareJob) -> PreparedSet:
    """Make the prepared set that the job describes, or finish it; of one that is whole, do nothing again.

    If the source has changed since, the set is updated: new images are added, deleted images are removed, replaced
    images are cropped again, and corrected labels are copied into the crops' rows. Images keep their split.

    Raises:
        ConfigError: the folder holds a set with other settings, the labels are unusable, no image is usable, another
            job is working on the set, or the cluster is too small for the plan.
        LockLost: another job has taken over the set.
        StorageUnavailable: source or output can't be reached.
    """
    console = make_console()
    storage = Storage.from_config(job.storage)
    out = storage.absolute(job.prepare.out).rstrip("/")
    storage.probe(job.source.uri, "source.uri")
    storage.probe(out, "prepare.out", write=True)
    lock_uri = storage.join(out, LOCK)
    owner = f"jobs/prepare.py from {job.source.uri}"
    _check_out(storage, out, _settings(job))  # before the lock file is created there
    try:
        with run_lock(storage, lock_uri, owner, expiry_s=job.prepare.lock_expiry_s, console=console) as lock:
            return _prepare(job, storage, out, lock, console)
    finally:
        storage.delete_if_empty(out)  # the lock made the folder; a job that is refused leaves nothing


def _prepare(job: PrepareJob, storage: Storage, out: str, lock: RunLock, console: Console) -> PreparedSet:
    """Make or finish the set; the caller holds the lock."""
    settings = _settings(job)
    earlier = _check_out(storage, out, settings)
    table = _manifest(job, storage, earlier, lock.check, console)
    split_text = split_manifest_text(table)
    prepared = PreparedSet(
        format_version=FORMAT_VERSION,
        finished=False,
        settings=settings,
        split_manifest_sha256=split_digest(split_text),
        labels_sha256=labels_digest(table),
        splits={name: table.filter(pc.equal(table["split"], name)).num_rows for name in SPLITS},
        counts={},
        uri=out,
    )
    crops = prepared.crops(storage)
    standing = find_standing(storage, crops, table)
    # In the order of the ids, which are hashes: the parts are well mixed, whatever the order of the keys means.
    todo = without(table, standing.image_ids).sort_by("image_id")
    console.print(f"{table.num_rows:,} images: {len(standing.image_ids):,} done before, {todo.num_rows:,} to do")
    if standing.edits:
        console.print(
            f"the source has changed: {standing.num_relabelled:,} rows get new labels or another split, "
            f"{standing.num_dropped:,} rows are dropped because their images are gone or must be read again"
        )
    started = time.perf_counter()
    is_same = earlier is not None and earlier.finished and prepared.digest == earlier.digest
    if todo.num_rows or standing.edits or not is_same:
        lock.check()
        prepared.write(storage)
        _remember(storage, out, table)
        storage.write_table(table, prepared.manifest(storage))
        storage.write(storage.join(out, "splits.tsv"), split_text.encode())
        apply_edits(storage, standing, table, lock.check)
    if todo.num_rows:
        with cluster(job.cluster):
            num_workers = worker_count(job.prepare.num_workers)
            check_fits("prepare.num_workers", num_workers, 1.0)
            started = time.perf_counter()
            write_parts(
                todo,
                partial(CropMaker, storage, job.vision, job.prepare),
                storage=storage,
                folder=crops,
                num_workers=num_workers,
                batch_size=job.prepare.batch_size,
                max_rows_per_part=job.prepare.rows_per_file,
                label="cropping",
                console=console,
                check=lock.check,
            )
    elapsed_s = time.perf_counter() - started

    lock.check()
    rows = storage.read_table(crops, columns=["image_id", "uri", "status", "error"])
    if sorted(rows["image_id"].to_pylist()) != sorted(table["image_id"].to_pylist()):
        raise JobError(
            f"{crops} holds {rows.num_rows:,} rows for {table.num_rows:,} images, so another job has written there; "
            "run the same command again"
        )
    counts = dict(sorted(Counter(rows["status"].to_pylist()).items()))
    prepared = prepared.model_copy(update={"finished": True, "counts": counts})
    _check_usable(job, rows, CROP_STATUSES)
    if not is_same or todo.num_rows or standing.edits:
        prepared.write(storage)
    _print_summary(console, prepared, rows)
    if todo.num_rows:
        console.print(f"{todo.num_rows:,} images in {elapsed_s:.0f} s: {todo.num_rows / elapsed_s:.1f} images/s")
    return prepared


def _check_usable(job: PrepareJob, rows: pa.Table, usable: Sequence[str]) -> None:
    """Reject a source with no usable images, or with most images refused by storage for the same reason.

    Args:
        job: the job, whose source is named in errors.
        rows: columns uri, status and error.
        usable: statuses of usable images.

    Raises:
        ConfigError: the source is rejected; the message quotes the most frequent reason.
    """
    reasons = reject_reasons(rows, usable)
    if not reasons:
        return
    ((reason, number),) = reasons.most_common(1)
    where = f"source.uri {job.source.uri}"
    if reasons.total() == rows.num_rows:
        raise ConfigError(
            f"{where}: none of its {rows.num_rows:,} images is usable; most frequent reason ({number:,}): {reason}"
        )
    refused = {each: count for each, count in reasons.items() if each.startswith(f"{Status.FAILED}:")}
    reason, number = max(refused.items(), key=lambda each: each[1], default=("", 0))
    if number > rows.num_rows / 2:
        raise ConfigError(
            f"{where}: storage refuses {number:,} of its {rows.num_rows:,} images for the same reason: {reason}; "
            "fix the cause and run the same command again"
        )


class CropMaker:
    """Manifest rows -> crop rows. Reads every column of MANIFEST and adds those of CROPS. One worker's own."""

    def __init__(self, storage: Storage, vision: VisionConfig, config: PrepareConfig) -> None:
        self._reader = ImageReader(storage, vision)
        self._config = config

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return a table of schema.CROPS with a row for each of `batch`, in order."""
        rows = batch.select(MANIFEST.names).to_pylist()
        readable = [row for row in rows if row["status"] == Status.OK]
        fetched = self._reader.fetch([row["uri"] for row in readable], [row["etag"] for row in readable])
        seen = iter(self._reader.read(fetched))
        made = [row | self._crop(next(seen)) if row["status"] == Status.OK else row for row in rows]
        return pa.Table.from_pylist(made, schema=CROPS)

    def _crop(self, seen: Photograph | Reject) -> dict[str, Any]:
        """Return what an image adds to its row. The face nearest the centre is the labelled one."""
        if isinstance(seen, Reject):
            return {"status": str(seen.status), "error": seen.error}
        rgb, faces = seen.upright_rgb, seen.faces
        found: dict[str, Any] = {"status": str(Status.FALLBACK)}
        if len(faces):
            index = faces.nearest_centre(rgb.shape[1], rgb.shape[0])
            crop = align(rgb, faces.boxes_xyxy[index], faces.landmarks[index], self._config.crop_side_px)
            original = seen.original_faces
            found = {
                "status": str(Status.OK),
                "detector_score": float(original.scores[index]),
                "box": original.boxes_xyxy[index].tolist(),
                **landmark_columns(original.landmarks[index]),
            }
        else:
            crop = align_chip(rgb, self._config.crop_side_px)
        return found | {
            "crop": encode_jpeg(crop, self._config.jpeg_quality),
            "template": TEMPLATE,
            "detector": self._reader.detector_name,
            "num_faces": len(faces),
            "rotation_degrees": seen.rotation_degrees,
            "sharpness": sharpness(crop),
        }


def _manifest(
    job: PrepareJob, storage: Storage, earlier: PreparedSet | None, check: Callable[[], None], console: Console
) -> pa.Table:
    """Return the source's manifest with its splits. Content that already had a split keeps it.

    Raises:
        ConfigError: there is no usable image, the labels are unusable, or images that must share a split were assigned
            to different splits before.
    """
    # A run killed at its very start has left prepare.json and no manifest.
    has_manifest = earlier is not None and storage.exists(earlier.manifest(storage))
    before = storage.read_table(earlier.manifest(storage)) if earlier and has_manifest else None
    try:
        with progress(console, "listing and hashing", None) as update:

            def report(done: int, total: int) -> None:
                check()
                update(done, f"of {total:,}")

            table = build_manifest(
                _source_rows(job.source, storage, console),
                source=job.source.name or job.source.kind,
                storage=storage,
                max_bytes=job.vision.max_mib * MIB,
                known_hashes=content_hashes(before) if before is not None else None,
                progress=report,
            )
        if not table.num_rows:
            raise ConfigError(f"source.uri {job.source.uri}: there is no image below it")
        _check_usable(job, table, [Status.OK])
        if before is not None:
            _check_not_another_source(job, before, table)
        table = _with_earlier_splits(table, _remembered(storage, job.prepare.out))
        drawn = None if before is None else _drawn(table, before)
        table = assign_splits(table, job.split.fractions, job.split.seed, job.split.sample, drawn)
        check_no_leak(table)
    except SplitLeakError as error:
        more = (
            ""
            if before is None
            else f"; the groups have changed; prepare the source into a new folder, not {job.prepare.out}"
        )
        raise ConfigError(f"source.uri {job.source.uri}: {error}{more}") from error
    except LabelTableError as error:
        raise ConfigError(str(error)) from error
    return table


def _source_rows(source: SourceConfig, storage: Storage, console: Console) -> Iterator[SourceRow]:
    uri = storage.absolute(source.uri)
    if source.kind == "utkface":
        return utkface.source_rows(storage, uri)
    return folder.source_rows(
        storage,
        uri,
        storage.absolute(source.labels) if source.labels else find_labels(storage, uri),
        key_column=source.key_column,
        gender_codes=source.gender_codes,
        race_codes=source.race_codes,
        missing_values=source.missing_values,
        note=console.print,
    )


def _settings(job: PrepareJob) -> dict[str, Any]:
    """Return what must stay the same while a prepared set grows."""
    return {
        "source": job.source.model_dump(mode="json", exclude={"uri", "labels"}),
        "split": job.split.model_dump(mode="json"),
        "vision": job.vision.model_dump(mode="json"),
        "crop_side_px": job.prepare.crop_side_px,
        "crop_margin": DEFAULT_MARGIN,
        "jpeg_quality": job.prepare.jpeg_quality,
        "template": TEMPLATE,
    }


def _check_out(storage: Storage, out: str, settings: dict[str, Any]) -> PreparedSet | None:
    """Return the set that is at `out` already, None if there is nothing.

    Raises:
        ConfigError: what is there was made with other settings, or is no prepared set.
    """
    earlier = find_prepared(storage, out, "prepare.out")
    if earlier is None:
        if storage.exists(out) and any(info.key != LOCK for info in storage.list(out)):
            raise ConfigError(f"prepare.out {out}: exists and is no prepared set; choose another folder")
        return None
    old, new = _flat(earlier.settings), _flat(settings)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"prepare.out {out}: was prepared with {key} = {old.get(key)!r}, not {new.get(key)!r}; "
                "choose another folder"
            )
    return earlier


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _drawn(table: pa.Table, before: pa.Table) -> dict[str, bool]:
    """Return whether the earlier manifest gave a split to each group that shares content with it."""
    known = before.filter(pc.is_valid(before["content_hash"]))
    splits = zip(known["content_hash"].to_pylist(), known["split"].to_pylist(), strict=True)
    was_drawn = {content: split is not None for content, split in splits}
    drawn: dict[str, bool] = {}
    for group, content in zip(table["group_id"].to_pylist(), table["content_hash"].to_pylist(), strict=True):
        if group is not None and content in was_drawn:
            drawn[group] = drawn.get(group, False) or was_drawn[content]
    return drawn


def _remembered(storage: Storage, out: str) -> dict[str, str]:
    """Return the split of each content that ever had one in this set, by content hash.

    The manifest alone would forget images that are away for a while: mislabelled, unreadable or deleted.
    """
    uri = storage.join(out, SPLIT_MEMORY)
    if not storage.exists(uri):
        return {}
    table = storage.read_table(uri)
    return dict(zip(table["content_hash"].to_pylist(), table["split"].to_pylist(), strict=True))


def _remember(storage: Storage, out: str, table: pa.Table) -> None:
    """Add the splits of a manifest to those that are remembered; write this before the manifest."""
    rows = table.filter(pc.is_valid(table["split"]))
    now = dict(zip(rows["content_hash"].to_pylist(), rows["split"].to_pylist(), strict=True))
    split_of = dict(sorted((_remembered(storage, out) | now).items()))
    memory = pa.table({"content_hash": [*split_of], "split": [*split_of.values()]})
    storage.write_table(memory, storage.join(out, SPLIT_MEMORY))


def _with_earlier_splits(table: pa.Table, split_of: dict[str, str]) -> pa.Table:
    """Assign content that had a split to it again, unless the source assigns one itself."""
    values = pa.array([split_of.get(each) for each in table["content_hash"].to_pylist()], pa.string())
    index = table.schema.get_field_index("split")
    return table.set_column(index, MANIFEST.field("split"), pc.coalesce(table["split"], values))


def _check_not_another_source(job: PrepareJob, before: pa.Table, table: pa.Table) -> None:
    """Fail if most images of the prepared set are no longer in the source: it is probably another source.

    Raises:
        ConfigError: it says how many are there.
    """
    known, now = (each.filter(pc.equal(each["status"], str(Status.OK)))["content_hash"] for each in (before, table))
    num_left = pc.sum(pc.is_in(known, value_set=now.combine_chunks())).as_py() or 0
    if num_left < len(known) / 2 and not job.prepare.allow_shrink:
        raise ConfigError(
            f"source.uri {job.source.uri}: has {num_left:,} of the {len(known):,} images that {job.prepare.out} was "
            "prepared from; choose another prepare.out, or drop the others from it with --prepare.allow_shrink true"
        )


def _print_summary(console: Console, prepared: PreparedSet, rows: pa.Table) -> None:
    console.print(prepared.uri)
    summary = make_table("status", "images", "first reasons")
    for status, count in prepared.counts.items():
        errors = Counter(rows.filter(pc.equal(rows["status"], status))["error"].drop_null().to_pylist())
        summary.add_row(status, f"{count:,}", "\n".join(f"{n} x {error}" for error, n in errors.most_common(3)))
    console.print(summary)
    print_failed(console, prepared.counts)
    shares = ", ".join(f"{name} {count:,}" for name, count in prepared.splits.items())
    console.print(f"splits: {shares}; split manifest SHA-256 {prepared.split_manifest_sha256}")

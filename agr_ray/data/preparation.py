"""The steps from labelled photographs to a prepared set, independent of the kind of workers.

    OUT/lock.json               one job at a time
    OUT/work/PLAN/              images to read, in numbered parts (`storage.parts`), and their crop rows
    OUT/                        the prepared set: `data.prepared`

Each image is downloaded once, by a worker, which hashes and crops it. Groups and splits need the hashes of all images.
So the crop rows are staged in work/. Once all are there, the driver assigns splits, checks the set, and writes the rows
with their splits to OUT/crops/.

These files are the only state. After a kill, the same command finds in crops/ and work/ which rows are valid
(`data.standing`), and makes the rest. A job that is rejected leaves the set as it was.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from agr_ray.config import PrepareJob
from agr_ray.config.section import first_difference
from agr_ray.console import make_table, print_next
from agr_ray.data.crops import read_labels
from agr_ray.data.manifest import build_manifest, in_key_order, labels_digest
from agr_ray.data.prepared import FORMAT_VERSION, NEAR_DUPLICATES_FILE, PreparedSet, find_prepared
from agr_ray.data.rejects import reject_reasons
from agr_ray.data.set_splits import Splits, assigned_splits, remember, remembered
from agr_ray.data.sources.label_table import LabelTableError
from agr_ray.data.sources.registry import check_codes, label_space, source_rows
from agr_ray.data.splits import SplitLeakError, contradicting_subjects, split_digest, split_manifest_text
from agr_ray.data.standing import StandingPart, contents, find_standing, standing_rows, write_crop_rows
from agr_ray.errors import ConfigError, JobError
from agr_ray.json_log import name_run
from agr_ray.progress_bar import print_failed, progress
from agr_ray.schema import CROP_STATUSES, LABEL_COLUMNS, MANIFEST, SPLITS, TEMPLATE, Status
from agr_ray.storage import Storage
from agr_ray.storage.lock import RunLock, run_lock
from agr_ray.storage.parts import Parts, read_plan, write_manifest
from agr_ray.storage.retry import Retry
from agr_ray.vision.align import DEFAULT_MARGIN
from agr_ray.vision.detect import check_detector

LOCK: Final = "lock.json"
"""Lock file that keeps two jobs from writing the same set."""
_SAME_PLAN: Final = ("image_id", "etag", "status", "error")
"""Columns by which a killed job's plan is recognised."""
_NUM_READS: Final = 8
"""Parts of a plan that are read at a time."""


class Workers(Protocol):
    """Whoever makes crop rows: Ray's workers, or this process."""

    def session(self) -> AbstractContextManager[int]:
        """Keep the workers running until the block ends; yield their number."""
        ...

    def crop(self, parts: Parts, numbers: Sequence[int]) -> Iterator[list[str]]:
        """Make the crop rows of parts, in any order; yield the statuses of the rows of each part, or of several."""
        ...


def prepare_set(job: PrepareJob, workers: Workers, console: Console) -> PreparedSet:
    """Make the prepared set that the job describes, or finish it; if it is complete and unchanged, redo nothing.

    If the source has changed since, the set is updated: new images are added, deleted images are removed, replaced
    images are cropped again, and corrected labels are copied into the crops' rows. Images keep their split.

    Raises:
        ConfigError: the detector's package is not installed, the folder holds a set with other settings, the labels are
            unusable, no image is usable, another job is working on the set, or the cluster is too small for the plan.
        LockLost: another job has taken over the set.
        StorageUnavailable: source or output can't be reached.
    """
    storage = Storage.from_config(job.storage)
    out = storage.absolute(job.prepare.out).rstrip("/")
    check_detector(job.vision.detector)
    storage.probe(job.source.uri, "source.uri")
    storage.probe(out, "prepare.out", write=True)
    name_run(out)
    lock_uri = storage.join(out, LOCK)
    owner = f"agr-ray prepare from {job.source.uri}"
    check_codes(job.source, job.labels)  # first: whoever is told to delete a set must not find out later
    _check_out(storage, out, _settings(job))  # before the lock file is created there
    try:
        with run_lock(storage, lock_uri, owner, expiry_s=job.prepare.lock_expiry_s, console=console) as lock:
            return _Preparation(job, storage, out, lock, console).run(workers)
    finally:
        storage.delete_if_empty(out)  # the lock created the folder; a job that is rejected leaves nothing


class _Preparation:
    """One job's work on a set; the caller holds the lock."""

    def __init__(self, job: PrepareJob, storage: Storage, out: str, lock: RunLock, console: Console) -> None:
        self._job = job
        self._storage = storage
        self._retry = Retry(job.prepare.outage_s)
        self._check = partial(self._retry.call, lock.check)
        self._console = console
        self._work = storage.join(out, "work")
        settings = _settings(job)
        earlier = _check_out(storage, out, settings)
        self._earlier = earlier or PreparedSet(
            format_version=FORMAT_VERSION,
            finished=False,
            settings=settings,
            split_manifest_sha256="",
            labels_sha256="",
            splits={},
            counts={},
            uri=out,
        )
        self._has_record = earlier is not None
        self._crops = self._earlier.crops(storage)

    def run(self, workers: Workers) -> PreparedSet:
        """Make or finish the set."""
        storage, console = self._storage, self._console
        source = self._job.source.name or self._job.source.kind
        try:
            space = label_space(self._job.source, self._job.labels)
            rows = in_key_order(source_rows(self._job.source, space, storage, console.print), source)
            listing = build_manifest(rows, source, {})
        except LabelTableError as error:
            raise ConfigError(str(error)) from error
        if not rows:
            raise ConfigError(f"source.uri {self._job.source.uri}: there is no image below it")
        self._check_usable(listing, [Status.OK])
        standing = find_standing(storage, listing, self._parquet_uris(self._crops), self._staged())
        valid = standing_rows(standing)
        # In the order of the ids, which are hashes, so that the parts are well mixed whatever the order of the keys.
        todo = _not_among(listing, valid["image_id"]).sort_by("image_id")
        console.print(f"{len(rows):,} images: {valid.num_rows:,} done before, {todo.num_rows:,} to do")
        if todo.num_rows:
            new_parts = self._make(todo, workers)
            standing += self._retry.call(lambda: find_standing(storage, listing, staged=new_parts, retry_failed=False))
            valid = standing_rows(standing)
        self._check_usable(valid, CROP_STATUSES)
        manifest = build_manifest(rows, source, dict(contents(valid)))
        return self._publish(self._retry.call(lambda: self._with_splits(manifest, standing)), standing)

    def _staged(self) -> list[str]:
        """Return the URIs of crop rows that killed or rejected jobs have left."""
        return [uri for uri in self._parquet_uris(self._work) if "/parts/" in uri.removeprefix(self._work)]

    def _parquet_uris(self, folder: str) -> list[str]:
        storage = self._storage
        return [info.uri for info in storage.list(folder, (".parquet",))] if storage.exists(folder) else []

    def _make(self, todo: pa.Table, workers: Workers) -> list[str]:
        """Have workers make crop rows for these rows of the listing; return the URIs of the new parts."""
        if not self._has_record:
            self._check()
            # From now on, the staged crops must not be mixed with those of other settings.
            self._retry.call(lambda: self._earlier.write(self._storage))
        counts: Counter[str] = Counter()
        started = time.perf_counter()
        with workers.session() as num_workers:
            parts, numbers = self._retry.call(lambda: self._planned(todo, num_workers))
            with progress(self._console, "reading and cropping", todo.num_rows) as update:
                for statuses in workers.crop(parts, numbers):
                    self._check()
                    counts.update(statuses)
                    by_status = ", ".join(f"{status} {count:,}" for status, count in sorted(counts.items()))
                    update(counts.total(), by_status)
        elapsed_s = time.perf_counter() - started
        self._console.print(f"{todo.num_rows:,} images in {elapsed_s:.0f} s: {todo.num_rows / elapsed_s:.1f} images/s")
        return [parts.uri(number) for number in numbers]

    def _planned(self, todo: pa.Table, num_workers: int) -> tuple[Parts, list[int]]:
        """Return a plan and the numbers of its parts that hold these rows: a killed job's plan, or a new one."""
        storage, config = self._storage, self._job.prepare
        self._check()
        folders = storage.list(self._work, ("plan.json",)) if storage.exists(self._work) else ()
        for plan_id in sorted({info.key.partition("/")[0] for info in folders}):
            parts = Parts(storage, storage.join(self._work, plan_id), config.outage_s)
            record = read_plan(storage, parts.manifest)
            missing = sorted({*range(record["num_parts"] if record else 0)} - {*parts.finished()})
            with ThreadPoolExecutor(_NUM_READS) as pool:
                rows = list(pool.map(lambda number, parts=parts: parts.rows(number).select(_SAME_PLAN), missing))
            if rows and pa.concat_tables(rows).equals(todo.select(_SAME_PLAN)):
                return parts, missing
        # A kill costs each worker at most one part. If rows are few, parts are smaller, so each worker has several.
        part_rows = max(1, min(config.rows_per_file, -(-todo.num_rows // (4 * num_workers))))
        num_parts = -(-todo.num_rows // part_rows)
        parts = Parts(storage, storage.join(self._work, uuid.uuid4().hex[:12]), config.outage_s)
        record = {"num_parts": num_parts, "part_rows": part_rows, "num_rows": todo.num_rows}
        write_manifest(storage, parts.manifest, todo.to_batches(), MANIFEST, part_rows, record)
        return parts, list(range(num_parts))

    def _with_splits(self, manifest: pa.Table, standing: Sequence[StandingPart]) -> Splits:
        """Assign splits. Content that already had a split keeps it.

        Raises:
            ConfigError: most images of the set are no longer in the source, or images that must share a split were
                assigned to different splits before.
        """
        job, storage = self._job, self._storage
        uri = self._earlier.manifest(storage)
        before = storage.read_table(uri) if storage.exists(uri) else None
        if before is not None:
            _check_not_another_source(job, before, manifest)
        try:
            return assigned_splits(job, manifest, before, remembered(storage, self._earlier.uri), standing)
        except SplitLeakError as error:
            more = (
                ""
                if before is None
                else f"; the groups have changed; prepare the source into a new folder, not {job.prepare.out}"
            )
            raise ConfigError(f"source.uri {job.source.uri}: {error}{more}") from error

    def _publish(self, splits: Splits, standing: Sequence[StandingPart]) -> PreparedSet:
        """Write manifest, splits and crop rows, and mark the set as finished."""
        storage, manifest = self._storage, splits.final
        split_text = split_manifest_text(manifest)
        prepared = self._earlier.model_copy(
            update={
                "finished": False,
                "recipe": self._job.recipe,
                "split_manifest_sha256": split_digest(split_text),
                "labels_sha256": labels_digest(manifest),
                "splits": {name: manifest.filter(pc.equal(manifest["split"], name)).num_rows for name in SPLITS},
                "counts": {},
                "near_duplicates": {
                    name: splits.crossings.filter(pc.equal(splits.crossings["split"], name)).num_rows
                    for name in SPLITS[:-1]
                },
            }
        )
        published = [part for part in standing if not part.is_staged]
        num_changed = sum(int(part.differs(manifest).sum()) for part in published)
        num_dropped = sum(int((~part.keeps).sum()) for part in published)
        if num_changed or num_dropped:
            self._console.print(
                f"the source has changed: {num_changed:,} rows get new labels or another split, {num_dropped:,} rows "
                "are dropped because their images are gone or must be read again"
            )
        is_same = self._earlier.finished and prepared.digest == self._earlier.digest
        is_same = is_same and not num_changed and not num_dropped and len(published) == len(standing)
        is_same = is_same and prepared.near_duplicates == self._earlier.near_duplicates
        self._check()

        def write_splits() -> None:
            prepared.write(storage)
            remember(storage, prepared.uri, splits.assigned)
            storage.write_table(splits.crossings, storage.join(prepared.uri, NEAR_DUPLICATES_FILE))
            storage.write_table(manifest, prepared.manifest(storage))
            storage.write(storage.join(prepared.uri, "splits.tsv"), split_text.encode())

        if not is_same:
            self._retry.call(write_splits)
            write_crop_rows(storage, self._crops, standing, manifest, self._check, self._retry)
        columns = ["image_id", "uri", "status", "error", "split", *LABEL_COLUMNS]
        rows = self._retry.call(lambda: storage.read_table(self._crops, columns))
        if sorted(rows["image_id"].to_pylist()) != sorted(manifest["image_id"].to_pylist()):
            raise JobError(
                f"{self._crops} holds {rows.num_rows:,} rows for {manifest.num_rows:,} images, so another job has "
                "written there; run the same command again"
            )
        counts = dict(sorted(Counter(rows["status"].to_pylist()).items()))
        finished = prepared.model_copy(update={"finished": True, "counts": counts})
        if not is_same:
            self._check()
            self._retry.call(lambda: finished.write(storage))
        self._retry.call(lambda: storage.delete_tree(self._work))
        _print_summary(self._console, finished, rows, splits, self._job.recipe)
        return finished

    def _check_usable(self, rows: pa.Table, usable: Sequence[str]) -> None:
        """Reject a source with no usable images, or with most images refused by storage for the same reason.

        Args:
            rows: columns uri, status and error.
            usable: statuses of usable images.

        Raises:
            ConfigError: the source is rejected; the message quotes the most frequent reason.
        """
        reasons = reject_reasons(rows, usable)
        if not reasons:
            return
        ((reason, number),) = reasons.most_common(1)
        where = f"source.uri {self._job.source.uri}"
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


def _not_among(table: pa.Table, ids: pa.ChunkedArray) -> pa.Table:
    """Return the rows whose `image_id` is not among `ids`."""
    return table.filter(pc.invert(pc.is_in(table["image_id"], value_set=ids.combine_chunks())))


def _settings(job: PrepareJob) -> dict[str, Any]:
    """Return the settings that must stay the same while a prepared set grows."""
    return {
        "source": job.source.model_dump(mode="json", exclude={"uri", "labels"}),
        "label_space": label_space(job.source, job.labels).to_json(),
        "split": job.split.model_dump(mode="json"),
        "vision": job.vision.model_dump(mode="json"),
        "crop_side_px": job.prepare.crop_side_px,
        "crop_margin": DEFAULT_MARGIN,
        "jpeg_quality": job.prepare.jpeg_quality,
        "template": TEMPLATE,
    }


def _check_out(storage: Storage, out: str, settings: dict[str, Any]) -> PreparedSet | None:
    """Return the existing set at `out`, or None if there is none.

    Raises:
        ConfigError: `out` holds a set with other settings, or something else.
    """
    earlier = find_prepared(storage, out, "prepare.out")
    if earlier is None:
        if storage.exists(out) and any(info.key != LOCK for info in storage.list(out)):
            raise ConfigError(f"prepare.out {out}: exists and is not a prepared set; choose another folder")
        return None
    difference = first_difference(earlier.settings, settings)
    if difference is not None:
        key, theirs, ours = difference
        raise ConfigError(
            f"prepare.out {out}: was prepared with {key} = {theirs!r}, not {ours!r}; "
            "choose another folder, or delete this one"
        )
    return earlier


def _check_not_another_source(job: PrepareJob, before: pa.Table, table: pa.Table) -> None:
    """Fail if most images of the prepared set are no longer in the source: it is probably another source.

    Raises:
        ConfigError: most images are missing; the message says how many remain.
    """
    known, now = (each.filter(pc.equal(each["status"], str(Status.OK)))["content_hash"] for each in (before, table))
    num_left = pc.sum(pc.is_in(known, value_set=now.combine_chunks())).as_py() or 0
    if num_left < len(known) / 2 and not job.prepare.allow_shrink:
        raise ConfigError(
            f"source.uri {job.source.uri}: has {num_left:,} of the {len(known):,} images that {job.prepare.out} was "
            "prepared from; choose another prepare.out, or remove the others from it with --prepare.allow_shrink true"
        )


def _print_summary(console: Console, prepared: PreparedSet, rows: pa.Table, splits: Splits, recipe: str) -> None:
    console.print(prepared.uri)
    summary = make_table("status", "images", "most frequent reasons")
    for status, count in prepared.counts.items():
        errors = Counter(rows.filter(pc.equal(rows["status"], status))["error"].drop_null().to_pylist())
        summary.add_row(status, f"{count:,}", "\n".join(f"{n} x {error}" for error, n in errors.most_common(3)))
    console.print(summary)
    print_failed(console, prepared.counts)
    rows = rows.filter(pc.field("split").is_valid() & pc.field("status").isin([str(each) for each in CROP_STATUSES]))
    num_ages, num_ranges = (len(rows) - rows[name].null_count for name in ("age", "age_low"))
    ages = f"age labels: {num_ages:,}"
    if num_ranges:
        in_none = pc.is_valid(rows["age_low"]).to_numpy() & (read_labels(rows, prepared.label_space).age_group < 0)
        spanning = (
            f", of which {int(in_none.sum()):,} span several age groups and count in none" if in_none.any() else ""
        )
        ages += f"; age ranges: {num_ranges:,}{spanning}"
    console.print(ages)
    for name in ("gender", "race"):
        classes = Counter(rows[name].drop_null().to_pylist())
        counts = ", ".join(f"{label} {count:,}" for label, count in sorted(classes.items()))
        console.print(f"{name} labels: {classes.total():,}" + (f" ({counts})" if counts else ""))
    _print_contradictions(console, splits.final)
    num_crops = Counter(rows["split"].to_pylist())
    shares = ", ".join(f"{name} {num_crops[name]:,}" for name in prepared.splits)
    console.print(f"crops by split: {shares}; split manifest SHA-256 {prepared.split_manifest_sha256}")
    num_without = sum(prepared.splits.values()) - num_crops.total()
    if num_without:
        console.print(f"images with a split but no crop: {num_without:,}; nothing uses them")
    _print_crossings(console, prepared, splits.crossings)
    words = ("--config", recipe) if recipe else ()
    print_next(console, "train on it", "train", *words, "--data", prepared.uri)


def _print_contradictions(console: Console, manifest: pa.Table) -> None:
    """Print how many subjects have images that differ in gender or race, if there are any."""
    subjects = contradicting_subjects(manifest)
    if subjects:
        (name, keys), *_ = subjects
        console.print(
            f"warning: subjects whose images differ in gender or race: {len(subjects):,}, such as {name!r} in "
            f"{' and '.join(keys)}; check these labels and the column subject"
        )


def _print_crossings(console: Console, prepared: PreparedSet, crossings: pa.Table) -> None:
    """Print how many images have a near-duplicate in a split that is held out from theirs, if there are any."""
    if crossings.num_rows:
        excluded = prepared.settings["split"]["near_duplicates"] == "exclude"
        names = {"train": "training", "val": "validation"}
        counts = " and ".join(f"{num:,} {names[split]}" for split, num in prepared.near_duplicates.items() if num)
        first = crossings.slice(0, 1).to_pylist()[0]
        action = "left out" if excluded else "kept; --split.near_duplicates exclude leaves them out"
        console.print(
            f"{counts} images are near-copies of held-out images, such as {first['key']} ({first['split']}) and "
            f"{first['near_key']} ({first['near_split']}); they are {action}; {NEAR_DUPLICATES_FILE} lists all"
        )

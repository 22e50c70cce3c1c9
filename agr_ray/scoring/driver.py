"""The steps of a scoring job, from its configuration to a published run, for any kind of workers.

    OUT-work/lock.json                   lock: one job at a time
    OUT-work/CONFIGURATION/plan.json     names the unpublished plan, at most one for each configuration and model
    OUT-work/CONFIGURATION/PLAN/
        manifest/ parts/ attempts/       `storage.parts`: photographs to score, listed by `planning`, and image rows
        staged/                          files to publish: `publish`
    OUT/                                 published files: `publish`

The manifest never changes once plan.json names its plan. So after any kill, the same command knows from the names of
the parts which ones are missing, and a part that is scored twice overwrites itself. Each job publishes under its own
run id, so a suspended job that wakes up after losing its lock cannot touch another job's files in OUT.

This module does not import torch, and neither may anything else in the driver's process: only workers predict, and
another process checks that they will be able to (`check_network`).
"""

from __future__ import annotations

import datetime
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Final, Protocol

import numpy as np
from rich.console import Console

from agr_ray.config import ScoreConfig, ScoreJob, digest
from agr_ray.console import print_next
from agr_ray.data.rejects import reject_reasons
from agr_ray.errors import ConfigError
from agr_ray.models.check_network import check_network
from agr_ray.models.checkpoint_files import local_checkpoint
from agr_ray.progress_bar import progress
from agr_ray.schema import SCHEMA_VERSION, SCORED_STATUSES, Status
from agr_ray.scoring.checks import checked_key, probe
from agr_ray.scoring.lakehouse import commit_runs
from agr_ray.scoring.loaded_model import ModelFiles, read_model, short_digest, written_attributes
from agr_ray.scoring.messages import print_nothing_new, print_plan, print_shift, print_summary, print_timings
from agr_ray.scoring.publish import (
    MAX_FACES,
    Counts,
    Publication,
    add_counts,
    delete_unpublished,
    distinct_faces,
    publish,
    published_runs,
    stage_demographics,
    withdraw_waiting,
)
from agr_ray.scoring.record import compared_faces, key_id, run_record, totals_of
from agr_ray.scoring.refusals import Refusals, TooManyRefused
from agr_ray.scoring.scorer import Scoring
from agr_ray.scoring.unpublished import Planned, keep_for_later, new_id, now, replan, resume
from agr_ray.stopwatch import Stopwatch
from agr_ray.storage import Storage, StorageError, StorageUnavailable
from agr_ray.storage.lock import LockLost, RunLock, run_lock
from agr_ray.storage.parts import KILLED_ITS_WORKER
from agr_ray.storage.retry import Retry
from agr_ray.tables.duplicates import DistinctFaces

_RESOURCE_KNOBS: Final = {
    "checkpoint",  # the model's digest identifies it better
    "num_workers",
    "use_gpu",
    "batch_size",
    "rows_per_file",
    "outage_s",
    "lock_expiry_s",
    "max_refused",
    "allow_empty",
    "allow_uncalibrated",  # the settings and the calibration show its effect
    "attributes",  # config_digest includes them
    "table",
    "iceberg_catalog",
    "iceberg_namespace",
}
_PATHS: Final = ("input", "out", "metadata", "ledger", "pseudonymise")


class Workers(Protocol):
    """Scores parts and writes the files to publish, in Ray workers or in other processes of this machine."""

    def session(self, num_photographs: int) -> AbstractContextManager[None]:
        """Keep workers for so many photographs running until the block ends."""
        ...

    def score(self, scoring: Scoring, parts: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """Score the parts in any order; yield the `scorer.SUMMARY` row of each part."""
        ...

    def stage(self, publication: Publication) -> Iterator[Counts]:
        """Write the files of all parts; yield the counts of each."""
        ...

    @property
    def num_workers(self) -> int:
        """Number of workers that score in parallel."""
        ...

    def finished(self, record: Mapping[str, Any]) -> None:
        """Note that all photographs are scored. `record` is of the last published run, which may be an earlier one."""
        ...


def score_input(job: ScoreJob, workers: Workers, console: Console) -> dict[str, Any]:
    """Score all new photographs, publish, and return the run's record, `_SUCCESS/run=ID.json`.

    If none is new, publish nothing, and return the record of the latest run with the same model and settings.

    Raises:
        ConfigError: the checkpoint or the input does not exist, the checkpoint can't be used, the input has no
            photographs, most of them are rejected for the same reason, another job holds the lock, or the cluster is
            too small.
        JobError: the process that checks the checkpoint was killed.
        LockLost: another job has taken over the output.
        StorageError: a table (`score.table`) can't be used.
        StorageUnavailable: input or output can't be reached.
    """
    storage = Storage.from_config(job.storage)
    out = storage.absolute(job.score.out).rstrip("/")
    key = checked_key(job, storage, out)
    probe(job.score, storage, out)
    if job.score.min_cell and not job.score.aggregate_only:
        console.print("warning: score.min_cell hides table cells, but images/ and faces/ still hold every face")
    with local_checkpoint(storage, job.score.checkpoint, "score.checkpoint") as checkpoint:
        check_network(checkpoint, job.score.checkpoint, "score.checkpoint")
        model = read_model(checkpoint, job, console)
    attributes = written_attributes(job.score, model.tasks)
    settings = digest(model.pipeline, job.gates)
    config_digest = short_digest([settings, attributes, model.calibration_digest])
    identity = short_digest([model.digest, config_digest, _selection(job.score, storage), key_id(key), SCHEMA_VERSION])
    plans = storage.join(f"{out}-work", identity)
    lock_uri = storage.join(f"{out}-work", "lock.json")
    retry = Retry(job.score.outage_s)
    held = run_lock(storage, lock_uri, identity, expiry_s=job.score.lock_expiry_s, console=console)
    with _no_empty_folder(storage, f"{out}-work"), held as lock, _lost_lock_first(lock):

        def check() -> None:
            retry.call(lock.check)

        left: list[str] = []
        retry.call(lambda: withdraw_waiting(storage, out))
        try:
            left = delete_unpublished(storage, out)
        except (StorageError, StorageUnavailable) as error:
            check()
            console.print(f"warning: unpublished files of a killed job in {out} can't be deleted: {error}")
        if left:
            console.print(f"deleted unpublished files of killed jobs: {', '.join(left)}")
        records = published_runs(storage, out)
        # Runs of a job that was killed between publishing and its commit, or of earlier jobs without score.table.
        retry.call(lambda: commit_runs(storage, job.score, out, records, lock.check, console))
        earlier = _scored_runs(records, storage, out, job, model, config_digest, key)
        skipped = list(earlier)
        planned = resume(storage, plans, skipped, job.score.max_refused, console)
        if planned is None:
            planned = replan(job, storage, plans, skipped, key, check, console)
        if planned.plan.num_scored and not planned.plan.num_to_do:
            latest = list(earlier.values())[-1]
            print_nothing_new(job.score, planned.plan, latest["run_id"], console)
            workers.finished(records[-1])
            _delete_plans(storage, plans, lock, console)
            return latest
        run_id = new_id(now())
        print_plan(job.score, planned.plan, run_id, console)
        work = storage.join(plans, planned.plan_id)
        scoring = Scoring(
            storage=storage,
            work=work,
            vision=model.pipeline.vision,
            gates=job.gates,
            predict=model.pipeline.predict,
            attributes=attributes,
            batch_size=job.score.batch_size,
            outage_s=job.score.outage_s,
            transform=model.transform,
            checkpoint=model.checkpoint,
            calibration=model.calibration,
            provenance={
                "run_id": planned.plan_id,  # a placeholder: staging writes the run's id
                "model_digest": model.digest,
                "config_digest": config_digest,
                "schema_version": SCHEMA_VERSION,
            },
            use_gpu=job.score.use_gpu,
            hashes_faces=job.score.near_duplicates != "off",
        )
        publication = Publication(
            storage=storage,
            work=work,
            out=out,
            run_id=run_id,
            started_at=datetime.datetime.fromisoformat(planned.started_at),
            num_parts=planned.plan.num_parts,
            attributes=attributes,
            space=model.space,
            group_by=job.score.group_by,
            aggregate_only=job.score.aggregate_only,
            ledger=storage.absolute(job.score.ledger) if job.score.ledger else "",
            key=key,
            outage_s=job.score.outage_s,
            reference=None if model.calibration is None else model.calibration.reference,
            near_duplicates=job.score.near_duplicates,
        )
        with workers.session(planned.plan.num_to_do) if planned.plan.num_parts else nullcontext():
            try:
                timings, precisions = _score_parts(job, scoring, planned, workers, check, console)
            except TooManyRefused as error:
                retry.call(lambda error=error: keep_for_later(job.score, scoring, plans, error.reason))  # type: ignore[misc]
                raise
            check()
            warning = model.calibration.precision_warning(precisions) if model.calibration else ""
            if warning:
                console.print(f"warning: {warning}")
            started = time.perf_counter()
            counts = _stage_files(publication, workers, check, console)
        distinct = _find_distinct(publication, counts, check, console)
        retry.call(lambda: stage_demographics(publication, counts, model.calibration, job.score.min_cell, distinct))
        shift = compared_faces(job, model, counts)
        totals = totals_of(counts, distinct, planned.plan)
        timings |= {"plan_s": planned.plan_s, "publish_s": time.perf_counter() - started}
        record = run_record(job, publication, model, config_digest, precisions, timings, totals, shift)
        retry.call(lambda: publish(publication, record, lock.check))
        _delete_plans(storage, plans, lock, console)
        workers.finished(record)
        title = f"{out} run={run_id}"
        if job.score.min_cell:
            console.print(f"published {title}; score.min_cell withholds its totals")
        else:
            print_summary(console, totals, title)
        if model.calibration is not None:
            print_shift(console, shift)
        print_timings(console, timings)
        try:
            retry.call(lambda: commit_runs(storage, job.score, out, [record], lock.check, console))
        except (StorageError, StorageUnavailable) as error:
            raise type(error)(
                f"{error}; run={run_id} is published, and the same command commits it to the {job.score.table} tables"
            ) from None
        print_next(console, "see who is in the photographs", "report", out)
    return record


def _delete_plans(storage: Storage, plans: str, lock: RunLock, console: Console) -> None:
    """Delete the work folder; a failure is a warning, because later runs do not need it to be gone."""
    try:
        lock.check()
        storage.delete_tree(plans)
    except (LockLost, StorageError, StorageUnavailable) as error:
        console.print(f"warning: the run's work folder {plans} can't be deleted: {error}")


@contextmanager
def _no_empty_folder(storage: Storage, uri: str) -> Iterator[None]:
    """Delete the folder at the end if it is empty: the lock creates it."""
    try:
        yield
    finally:
        storage.delete_if_empty(uri)


@contextmanager
def _lost_lock_first(lock: RunLock) -> Iterator[None]:
    """Turn any error after a lost lock into LockLost, because another job may have deleted the work folder."""
    try:
        yield
    except Exception:
        with suppress(StorageError, StorageUnavailable):
            lock.check()
        raise


def _selection(config: ScoreConfig, storage: Storage) -> dict[str, Any]:
    """Return the settings that determine the run's results, with absolute paths."""
    selection = config.model_dump(mode="json", exclude=_RESOURCE_KNOBS)
    paths = {name: storage.absolute(selection[name]).rstrip("/") for name in _PATHS if selection[name]}
    return selection | paths


def _scored_runs(
    records: Sequence[dict[str, Any]],
    storage: Storage,
    out: str,
    job: ScoreJob,
    model: ModelFiles,
    config_digest: str,
    key: bytes,
) -> dict[str, dict[str, Any]]:
    """Return the runs with the same model, configuration and key, whose images need not be scored again.

    They are in order: folder of the scored images -> record.
    """
    wanted = {"model_digest": model.digest, "config_digest": config_digest, "key_id": key_id(key)}
    runs = {}
    for record in records:
        if all(record[name] == value for name, value in wanted.items()):
            if record["aggregate_only"] and not job.score.aggregate_only:
                raise ConfigError(
                    f"score.out {job.score.out}: its run={record['run_id']} is aggregate_only; keep using "
                    "score.aggregate_only and its score.ledger, or choose another score.out"
                )
            root = storage.absolute(job.score.ledger) if record["aggregate_only"] else storage.join(out, "images")
            folder = storage.join(root, f"run={record['run_id']}")
            if record["aggregate_only"] and not storage.exists(folder):
                raise ConfigError(
                    f"score.ledger {job.score.ledger}: has no run={record['run_id']}, which is published in {out}; "
                    "without it, its photographs would be scored and counted again"
                )
            runs[folder] = record
    return runs


# The run


def _score_parts(
    job: ScoreJob, scoring: Scoring, planned: Planned, workers: Workers, check: Callable[[], None], console: Console
) -> tuple[dict[str, Any], set[str]]:
    """Score the missing parts; return timings, and the `precision` values of all rows.

    Raises:
        TooManyRefused: most photographs are rejected for the same reason.
    """
    refusals = Refusals(job.score, planned.plan)
    precisions: set[str] = set()
    done = _finished_parts(scoring, refusals, precisions, check)
    todo = [part for part in range(planned.plan.num_parts) if part not in done]
    if done:
        console.print(f"resuming: {len(done)} of {planned.plan.num_parts} parts are done")
    if not todo:
        refusals.check(at_end=True)
        return {"score_s": 0.0, "num_workers": 0, "worker_s": {}}, precisions
    # In random order, so that the first parts are a sample of all, and an expensive folder is spread over all workers.
    random.Random(planned.plan_id).shuffle(todo)
    counts: Counter[str] = Counter()
    stopwatch = Stopwatch()
    num_faces = 0
    started = time.perf_counter()
    total = sum(planned.plan.rows_of(part) for part in todo)
    hides_totals = bool(job.score.min_cell)  # a suppressed cell could be computed from them
    num_parts = 0
    with progress(console, "scoring", len(todo) if hides_totals else total) as update:
        for each in workers.score(scoring, todo):
            check()
            counts.update(each["statuses"])
            precisions.update(each["precisions"])
            stopwatch.add(each["worker_s"])
            num_faces += each["num_faces"]
            refusals.add(each["reasons"], sum(each["statuses"].values()))
            refusals.check(at_end=False)
            by_status = ", ".join(f"{status} {count:,}" for status, count in sorted(counts.items()))
            num_parts += 1
            update(*((num_parts, "parts") if hides_totals else (counts.total(), f"{num_faces:,} faces; {by_status}")))
    refusals.check(at_end=True)
    score_s = time.perf_counter() - started
    if not hides_totals:
        console.print(f"{total:,} photographs in {score_s:.1f} s: {total / score_s:.1f} images/s")
    return {"score_s": score_s, "num_workers": workers.num_workers, "worker_s": stopwatch.take()}, precisions


def _finished_parts(scoring: Scoring, refusals: Refusals, precisions: set[str], check: Callable[[], None]) -> set[int]:
    """Return the parts that earlier jobs finished, count their rejected rows, and add to the `precision` values.

    Parts with photographs that storage refused are not counted as finished, because storage may serve them now.
    """
    retry = Retry(scoring.outage_s)
    done, columns = set(), ["uri", "status", "error", "precision"]
    for number in scoring.parts.finished():
        uri = scoring.parts.uri(number)
        images = retry.call(lambda uri=uri: scoring.storage.read_table(uri, columns))  # type: ignore[misc]
        check()
        rows = zip(images["status"].to_pylist(), images["error"].to_pylist(), strict=True)
        if not any(status == Status.FAILED and error != KILLED_ITS_WORKER for status, error in rows):
            refusals.add(reject_reasons(images, SCORED_STATUSES), images.num_rows)
            precisions.update(images["precision"].drop_null().to_pylist())
            done.add(number)
    return done


def _stage_files(publication: Publication, workers: Workers, check: Callable[[], None], console: Console) -> Counts:
    """Write all files to publish, except the demographics; return their counts."""
    if not publication.num_parts:
        return publication.stage_file(0)
    counts: list[Counts] = []
    with progress(console, "publishing", publication.num_files) as update:
        for each in workers.stage(publication):
            check()
            counts.append(each)
            update(len(counts), "files")
    return add_counts(counts, publication.group_by)


def _find_distinct(
    publication: Publication, counts: Counts, check: Callable[[], None], console: Console
) -> DistinctFaces | None:
    """Return which faces are near-duplicates; None if that is not asked for, or needs too much memory."""
    if publication.near_duplicates == "off":
        return None
    num_faces = int(np.sum(counts.groups["num_faces"].to_numpy()))
    if num_faces > MAX_FACES:
        console.print(
            f"warning: n_unique is null: the run has more than {MAX_FACES:,} faces, and the driver needs about 100 "
            "bytes of memory for each; score parts of the bucket into outputs of their own"
        )
        return None
    with progress(console, "near-duplicates", publication.num_files) as update:

        def report(done: int) -> None:
            check()
            update(done, "files")

        return distinct_faces(publication, counts.groups, report)

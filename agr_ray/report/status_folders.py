"""What is published, running and stuck in a folder of results, from the records, locks and work files in it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

from agr_ray.data.prepared import find_prepared
from agr_ray.learn.history import best_row
from agr_ray.redact import redacted
from agr_ray.schema import SCORED_STATUSES
from agr_ray.scoring.planning import read_counts
from agr_ray.scoring.publish import TABLES, published_runs, run_folders
from agr_ray.storage import MissingObject, Storage
from agr_ray.storage.lock import LockRecord, lock_holder
from agr_ray.storage.parts import read_plan
from agr_ray.tuning.trials import best_trial, read_trials

LOCK: Final = "lock.json"
_RESUMES: Final = "the same command resumes it"
_PLAN: Final = "plan.json"


@dataclass(frozen=True)
class Work:
    """Unfinished work, of a job that is running or has ended."""

    what: str
    done: int
    total: int
    unit: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def progress(self) -> str:
        """Return how much is done, without the details."""
        return f"{self.what}: {self.done:,} of {self.total:,} {self.unit} done"

    def __str__(self) -> str:
        details = (f", {key.replace('_', ' ')} {value}" for key, value in self.details.items() if value is not None)
        return self.progress + "".join(details)


@dataclass
class Status:
    """What is known about a folder of results. `agr-ray status --json` prints these fields."""

    kind: str
    """`scores`, `training run`, `sweep`, `comparison`, `cross-validation` or `prepared set`."""
    uri: str
    published: list[dict[str, Any]] = field(default_factory=list)
    """Finished results, oldest first."""
    running: dict[str, Any] | None = None
    """The holder of the lock, if it is alive."""
    unfinished: list[Work] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    """What needs a person or another run of the command, a sentence each."""

    def add_lock(self, lock: LockRecord | None) -> None:
        """Add the holder of a lock: it is running or, if the lock has expired, stuck."""
        if lock is None:
            return
        if lock.is_expired:
            self.stuck.append(
                f"its lock has expired: {redacted(str(lock))}; the next command takes it over after watching it"
            )
            return
        self.running = {
            "owner": redacted(lock.owner),
            "host": lock.host,
            "pid": lock.pid,
            "since": lock.acquired_at.isoformat(timespec="seconds"),
            "last_heartbeat": lock.heartbeat_at.isoformat(timespec="seconds"),
        }

    def add_work(self, work: Work, *, is_running: bool) -> None:
        """Add unfinished work, which is stuck unless a job is working on it."""
        self.unfinished.append(work)
        if not is_running:
            self.stuck.append(f"{work.progress}, and nothing works on it; {_RESUMES}")


def read_status(storage: Storage, uri: str) -> Status | None:
    """Return the status of a folder; None: it holds no output of a command that this module knows.

    While the files are read one after another, a job may begin, progress or end, so that they do not fit each other.
    So what looks stuck is read again, and is stuck only if it looks the same then.

    Raises:
        ConfigError: a lock or a prepared set's record is damaged.
        StorageFailed, StorageUnavailable: the folder can't be read.
    """
    status = _read(storage, uri)
    if status is None or not status.stuck:
        return status
    again = _read(storage, uri)
    if again is not None:
        again.stuck = [sentence for sentence in again.stuck if sentence in status.stuck]
    return again


def _read(storage: Storage, uri: str) -> Status | None:
    """Return the status as it looks in one pass over the files."""
    for marker, read in (
        ("sweep.json", _sweep),
        ("comparison.json", _comparison),
        ("cross-validation.json", _cross_validation),
        ("run.json", _training),
        ("prepare.json", _prepared),
    ):
        if storage.exists(storage.join(uri, marker)):
            return read(storage, uri)
    if storage.exists(storage.join(uri, "_SUCCESS")) or storage.exists(f"{uri}-work"):
        return _scores(storage, uri)
    lock = lock_holder(storage, storage.join(uri, LOCK))
    if lock is None:
        return None
    # A job that is starting, or died while it was.
    kinds = ("sweep", "comparison", "cross-validation", "training run")
    owners = {f"{kind} ": kind for kind in kinds} | {"agr-ray prepare ": "prepared set"}
    status = Status(next((kind for owner, kind in owners.items() if lock.owner.startswith(owner)), "unknown"), uri)
    status.add_lock(lock)
    return status


# Scores


def _scores(storage: Storage, out: str) -> Status:
    records = published_runs(storage, out)
    status = Status("scores", out, [_run(record) for record in records])
    work = f"{out}-work"
    lock = lock_holder(storage, storage.join(work, LOCK))
    status.add_lock(lock)
    # A job works on the plan that its lock names.
    running = lock.owner if lock is not None and status.running else ""
    hides = any(record["min_cell"] for record in records)
    files = _files_by_folder(storage, work)
    for identity in sorted({folder.partition("/")[0] for folder in files} - {"", "publishing"}):
        if _PLAN in files[identity]:
            _add_plan(storage, status, work, identity, files, hides=hides, is_running=identity == running)
        elif identity != running:
            status.stuck.append(f"{work}/{identity}: a job was stopped while it planned; the same command plans again")
    if not running:
        found = {run_id for table in TABLES for run_id in run_folders(storage, out, table)}
        left = sorted(found - {record["run_id"] for record in records})
        if left or files["publishing"]:
            names = f" ({', '.join(left)})" if left else ""
            status.stuck.append(
                f"a job was stopped while it published{names}; {_RESUMES}, and views.sql hides its files"
            )
    return status


def _run(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a published run's record says; numbers are None if score.min_cell withholds them."""
    counts = record.get("counts")
    return {
        "run": record["run_id"],
        "published_at": record["published_at"],
        "images": record.get("num_images"),
        "faces": record.get("num_faces"),
        "rejects": None
        if counts is None
        else sum(counts.values()) - sum(counts.get(each, 0) for each in SCORED_STATUSES),
        "model": record["model_digest"],
    }


def _add_plan(
    storage: Storage,
    status: Status,
    work: str,
    identity: str,
    files: dict[str, list[str]],
    *,
    hides: bool,
    is_running: bool,
) -> None:
    """Add the plan of a configuration; with `hides` or its own score.min_cell, without the number of photographs."""
    try:
        record = json.loads(storage.read(storage.join(work, identity, _PLAN)))
        hides = hides or bool(record["min_cell"])
        folder = f"{identity}/{record['plan_id']}"
        plan = read_counts(storage, storage.join(work, folder, "manifest"))
    except MissingObject:  # it was published meanwhile
        return
    if plan is None:
        return
    done = _numbers(files[f"{folder}/parts"])
    details = {
        "started": record["started_at"],
        "photographs_done": None if hides else sum(map(plan.rows_of, done)),
        "photographs": None if hides else plan.num_to_do,
        "parts_begun": len(files[f"{folder}/attempts"]),
    }
    status.add_work(
        Work(f"scoring with configuration {identity}", len(done), plan.num_parts, "parts", details),
        is_running=is_running,
    )
    if "rejected_above" in record:
        status.stuck.append(
            f"configuration {identity}: most photographs were rejected for the same reason, more than "
            f"score.max_refused {record['rejected_above']:g} allows"
        )


def _numbers(names: Sequence[str]) -> list[int]:
    """Return the numbers of parts, given the names of their files."""
    return [int(PurePosixPath(name).stem.removeprefix("part-")) for name in names]


def _files_by_folder(storage: Storage, uri: str) -> dict[str, list[str]]:
    """Return the names of all files by their folder below `uri`, which need not exist; "" is `uri` itself."""
    files: dict[str, list[str]] = defaultdict(list)
    if storage.exists(uri):
        for info in storage.list(uri):
            folder, _, name = info.key.rpartition("/")
            files[folder].append(name)
    return files


# Training


def _training(storage: Storage, uri: str) -> Status:
    status = Status("training run", uri)
    status.add_lock(lock_holder(storage, storage.join(uri, LOCK)))
    record = json.loads(storage.read(storage.join(uri, "run.json")))
    history = storage.join(uri, "history.parquet")
    rows = storage.read_table(history).to_pylist() if storage.exists(history) else []
    best = best_row(rows)
    epochs = {
        "best_epoch": None if best is None else best["epoch"],
        "best_objective": None if best is None else best["val_objective"],
        "last_train_loss": rows[-1]["train_loss"] if rows else None,
    }
    if record["finished"]:
        checkpoint = storage.join(uri, "best")
        status.published.append(
            {"checkpoint": checkpoint, "ended_by": record["finished"], "epochs": len(rows)} | epochs
        )
        return status
    total = record["config"]["train"]["epochs"]
    status.add_work(Work("training", len(rows), total, "epochs", epochs), is_running=status.running is not None)
    failure = storage.join(uri, "failure.txt")
    if storage.exists(failure):
        reason = storage.read(failure).decode().partition("\n")[0]
        status.stuck.append(f"the loss was not finite: {redacted(reason)}; change train.grad_clip_norm or train.lr")
    return status


def _sweep(storage: Storage, uri: str) -> Status:
    status = Status("sweep", uri)
    status.add_lock(lock_holder(storage, storage.join(uri, LOCK)))
    record = json.loads(storage.read(storage.join(uri, "sweep.json")))
    trials = read_trials(storage, uri)
    best = best_trial(trials, record["config"]["tune"]["constraints"])
    states = dict(Counter(trial.state for trial in trials))
    results = {
        "best_trial": None if best is None else best.number,
        "best_objective": None if best is None else best.objective,
    }
    if record["finished"]:
        checkpoint = storage.join(uri, "best")
        status.published.append({"checkpoint": checkpoint, "trials": len(trials)} | states | results)
    else:
        ended = len(trials) - states.get("unfinished", 0)
        work = Work("sweep", ended, record["trials"], "trials", states | results)
        status.add_work(work, is_running=status.running is not None)
    return status


# Comparisons and cross-validations


def _comparison(storage: Storage, uri: str) -> Status:
    measured = storage.join(uri, "measured.json")
    reported = len(json.loads(storage.read(measured))["commits"]) if storage.exists(measured) else 0
    return _runs(storage, uri, "comparison", "runs", "report.html", reported)


def _cross_validation(storage: Storage, uri: str) -> Status:
    folds = storage.join(uri, "folds.parquet")
    has_predictions = storage.exists(storage.join(uri, "predictions.parquet"))
    reported = storage.read_footer(folds).num_rows if has_predictions else 0
    return _runs(storage, uri, "cross-validation", "folds", "predictions.parquet", reported)


def _runs(storage: Storage, uri: str, kind: str, unit: str, result: str, num_reported: int) -> Status:
    """Return the status of runs that are trained and evaluated; the file `result` then reports them all."""
    status = Status(kind, uri)
    status.add_lock(lock_holder(storage, storage.join(uri, LOCK)))
    is_running = status.running is not None
    names = json.loads(storage.read(storage.join(uri, f"{kind}.json")))["runs"]
    evaluations, runs = (_files_by_folder(storage, storage.join(uri, folder)) for folder in ("evaluations", "runs"))
    complete = [name for name in names if "metrics.json" in evaluations[name]]
    failures = storage.join(uri, "failures.json")
    reasons = json.loads(storage.read(failures)) if storage.exists(failures) else {}
    failed = {name: reason for name, reason in reasons.items() if name not in complete}
    begun = [name for name in names if "run.json" in runs[name] and name not in complete and name not in failed]
    if num_reported:
        status.published.append({result.partition(".")[0]: storage.join(uri, result), unit: num_reported})
    if min(num_reported, len(complete)) < len(names):
        counts = {"unfinished": len(begun), "failed": len(failed)}
        status.add_work(Work(kind, len(complete), len(names), unit, counts), is_running=is_running)
    if not is_running:  # a running job retries them
        for name, reason in failed.items():
            status.stuck.append(f"{name} failed: {redacted(reason)}; the same command retries it")
    return status


# Prepared sets


def _prepared(storage: Storage, uri: str) -> Status:
    status = Status("prepared set", uri)
    status.add_lock(lock_holder(storage, storage.join(uri, LOCK)))
    prepared = find_prepared(storage, uri, "folder")
    assert prepared is not None
    if prepared.finished:
        images = {"images": sum(prepared.counts.values())}
        status.published.append({"source": prepared.source} | images | prepared.counts | {"splits": prepared.splits})
    work = storage.join(uri, "work")
    files = _files_by_folder(storage, work)
    is_running = status.running is not None
    plans = sorted({folder.partition("/")[0] for folder in files} - {""})
    for plan in plans:
        record = read_plan(storage, storage.join(work, plan, "manifest"))
        if record is not None:
            part_rows, num_rows = record["part_rows"], record["num_rows"]
            done = sum(min(part_rows, num_rows - part * part_rows) for part in _numbers(files[f"{plan}/parts"]))
            begun = {"parts_begun": len(files[f"{plan}/attempts"])}
            status.add_work(Work(f"preparation {plan}", done, num_rows, "images", begun), is_running=is_running)
        elif not is_running:
            status.stuck.append(f"{work}/{plan}: a job was stopped while it planned; the same command plans again")
    if not prepared.finished and not plans and not is_running:
        status.stuck.append(f"its preparation was stopped; {_RESUMES}")
    return status

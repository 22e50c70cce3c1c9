"""The unpublished plan of a configuration: resumed if a job was killed, otherwise created."""

from __future__ import annotations

import datetime
import json
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from agr_ray.config import ScoreConfig, ScoreJob
from agr_ray.errors import ConfigError
from agr_ray.progress_bar import progress
from agr_ray.schema import Status
from agr_ray.scoring.messages import endings
from agr_ray.scoring.planning import Plan, plan, read_counts, scored_ids
from agr_ray.scoring.publish import pseudonym
from agr_ray.scoring.scorer import Scoring
from agr_ray.storage import MissingObject, Storage, StorageError, StorageUnavailable
from agr_ray.storage.parts import Parts


@dataclass(frozen=True)
class Planned:
    """An unpublished plan, made by this job or by one that was killed."""

    plan_id: str
    started_at: str
    plan_s: float
    plan: Plan


def _plan_uri(storage: Storage, plans: str) -> str:
    return storage.join(plans, "plan.json")


def resume(storage: Storage, plans: str, skipped: list[str], max_refused: float, console: Console) -> Planned | None:
    """Return the unpublished run of this configuration, if its plan is complete and no run was published since."""
    try:
        record = json.loads(storage.read(_plan_uri(storage, plans)))
    except MissingObject:
        return None
    if "rejected_above" in record and max_refused <= record["rejected_above"]:
        return None
    if record["skipped"] != skipped:
        console.print(
            "another run was published after this one was planned; planning again, so that no image is published twice"
        )
        return None
    made = read_counts(storage, Parts(storage, storage.join(plans, record["plan_id"])).manifest)
    if made is None:
        # A job that was suspended just before writing this record woke up after another job had deleted its plan.
        console.print(f"the plan {record['plan_id']} is gone; planning again")
        return None
    return Planned(record["plan_id"], record["started_at"], record["plan_s"], made)


def keep_for_later(config: ScoreConfig, scoring: Scoring, plans: str, reason: str) -> None:
    """Prepare the next command after a run that failed because most photographs were rejected.

    If storage refused them, the same command scores their parts again and keeps the others. If they were rejected for
    their content, which must change first, the same command plans again; only a command with a higher
    score.max_refused resumes the run.
    """
    storage, uri = scoring.storage, _plan_uri(scoring.storage, plans)
    if not reason.startswith(f"{Status.FAILED}:"):
        record = json.loads(storage.read(uri)) | {"rejected_above": config.max_refused}
        storage.write(uri, json.dumps(record, indent=2).encode())


def replan(
    job: ScoreJob,
    storage: Storage,
    plans: str,
    skipped: list[str],
    key: bytes,
    check: Callable[[], None],
    console: Console,
) -> Planned:
    """Delete earlier plans of this configuration, and plan a new run.

    Raises:
        ConfigError: the input has nothing to score.
    """
    try:
        storage.delete_tree(plans)  # left by a run that was killed during planning or after publishing
    except (StorageError, StorageUnavailable) as error:
        console.print(f"warning: the old work folder {plans} can't be deleted: {error}")
    started_at, started = now(), time.perf_counter()
    plan_id = new_id(started_at)
    with progress(console, "listing", None) as update:

        def report(done: int, remark: str) -> None:
            check()
            update(*((0, "") if job.score.min_cell else (done, remark)))

        made = plan(
            storage,
            job.score,
            Parts(storage, storage.join(plans, plan_id)).manifest,
            scored_ids(storage, skipped),
            scored_as=(lambda image: pseudonym(image, key)) if key else None,
            progress=report,
        )
    try:
        _check_input(job.score, storage, made)
    except ConfigError:
        storage.delete_tree(plans)
        raise
    planned = Planned(plan_id, started_at.isoformat(timespec="milliseconds"), time.perf_counter() - started, made)
    record = {
        "plan_id": plan_id,
        "started_at": planned.started_at,
        "plan_s": planned.plan_s,
        "skipped": skipped,
        "min_cell": job.score.min_cell,  # for `agr-ray status`, which withholds counts then
    }
    check()
    storage.write(_plan_uri(storage, plans), json.dumps(record, indent=2).encode())
    return planned


def _check_input(config: ScoreConfig, storage: Storage, plan: Plan) -> None:
    """Reject an input without any photograph, new or already scored, unless `allow_empty` is set.

    Raises:
        ConfigError: there is none; the message says what the input contains.
    """
    if config.allow_empty or plan.num_to_do or plan.num_scored:
        return
    where = f"score.input {storage.absolute(config.input)}"
    if not plan.num_listed:
        is_folder = os.path.isdir(storage.absolute(config.input))  # never true of an s3:// URI
        problem = "there is no image in this folder" if is_folder else "nothing is there; check the spelling"
        raise ConfigError(f"{where}: {problem}; --allow-empty true allows that")
    raise ConfigError(
        f"{where}: none of its {plan.num_listed:,} keys is read as a photograph: {endings(plan)}; score.include "
        "selects the keys to read, such as --include '**' for all"
    )


def new_id(now: datetime.datetime) -> str:
    """Return a unique id that sorts by time."""
    return f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03d}Z-{secrets.token_hex(4)}"


def now() -> datetime.datetime:
    """Return the time, in UTC."""
    return datetime.datetime.now(datetime.UTC)

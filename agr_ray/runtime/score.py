"""Photographs -> a Parquet row for each, with every face in it, and demographic tables: what is new, exactly once.

    OUT-work/lock.json          keeps two runs apart
    OUT-work/CONFIGURATION/     an unpublished run; at most one for each configuration and model
        run.json                its name and what was planned; written when the manifest is whole
        manifest/               what it scores: `planning`
        parts/                  image rows; part N is row group N of the manifest
        attempts/               `scorer.Attempts` at parts under way
    OUT/                        what readers see: `publish`

The manifest never changes once run.json is there. So whatever is killed, the same command sees from the names of the
parts what is left to do, and a part that is made twice replaces itself.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from rich.console import Console

from agr_ray.config import ConfigError, ScoreJob, digest
from agr_ray.console import make_console, make_table
from agr_ray.learn.calibration import Calibration
from agr_ray.models.checkpoint import model_digest, read_meta
from agr_ray.models.network import Transform
from agr_ray.runtime.checkpoints import local_checkpoint, portable_checkpoint, read_calibration
from agr_ray.runtime.cluster import check_fits, cluster, configure_ray_data, worker_count
from agr_ray.runtime.lock import RunLock, run_lock
from agr_ray.runtime.parts import print_failed
from agr_ray.runtime.patience import Patience
from agr_ray.runtime.progress import progress
from agr_ray.runtime.scoring.grouping import check_grouping
from agr_ray.runtime.scoring.planning import Plan, plan, read_plan, scored_ids
from agr_ray.runtime.scoring.publish import (
    Counts,
    Publication,
    add_counts,
    finish,
    is_published,
    pseudonym,
    publish_demographics,
    published_runs,
)
from agr_ray.runtime.scoring.scorer import (
    FoundParts,
    PartScorer,
    Scoring,
    WrittenParts,
    manifest_folder,
    parts_folder,
)
from agr_ray.runtime.stopwatch import Stopwatch
from agr_ray.schema import SCHEMA_VERSION
from agr_ray.storage import MissingObject, Storage

MIN_KEY_BYTES: Final = 32
MAX_BLOCKS: Final = 4096
"""Parts that Ray Data is given at a time, each a block of its own."""
_RESOURCE_KNOBS: Final = {
    "checkpoint",  # the model's digest says more
    "num_workers",
    "use_gpu",
    "batch_size",
    "rows_per_file",
    "outage_s",
    "lock_expiry_s",
}


@dataclass(frozen=True)
class Model:
    """What predicts."""

    checkpoint: Mapping[str, bytes]
    digest: str
    tasks: tuple[str, ...]
    transform: Transform
    calibration: Calibration | None
    calibration_digest: str


@dataclass(frozen=True)
class Run:
    """An unpublished run."""

    run_id: str
    started_at: str
    plan_s: float
    plan: Plan


def score(job: ScoreJob) -> dict[str, Any]:
    """Score what is not scored yet, publish, and return the run's record, `_SUCCESS/run=ID.json`.

    Raises:
        ConfigError: there is no such checkpoint or input, another run is at work, or the plan can't fit.
        StorageUnavailable: input or output can't be reached.
    """
    console = make_console()
    storage = Storage.from_config(job.storage)
    out = storage.absolute(job.score.out).rstrip("/")
    key = _check(job, storage, out)
    storage.probe(job.score.input, "score.input")
    storage.probe(job.score.checkpoint, "score.checkpoint")
    storage.probe(out, "score.out", write=True)
    if job.score.min_cell and not job.score.aggregate_only:
        console.print("warning: score.min_cell hides table cells, and images/ and faces/ still hold every face")
    with local_checkpoint(storage, job.score.checkpoint, "score.checkpoint") as directory:
        model = _model(directory, job, console)
    attributes = tuple(name for name in job.score.attributes if name in model.tasks)
    settings = digest(job.vision, job.predict, job.gates)
    config_digest = _digest([settings, attributes, model.calibration_digest])
    selection = job.score.model_dump(mode="json", exclude=_RESOURCE_KNOBS)
    identity = _digest([model.digest, config_digest, selection, _key_id(key)])
    work = storage.join(f"{out}-work", identity)
    lock_uri = storage.join(f"{out}-work", "lock.json")
    with run_lock(storage, lock_uri, identity, expiry_s=job.score.lock_expiry_s, console=console) as lock:
        skipped = _scored_folders(storage, out, job, model, config_digest, key)
        run = _resumed(storage, out, work, skipped, console)
        if run is None:
            run = _opened(job, storage, work, identity, skipped, key, console)
        scoring = Scoring(
            storage=storage,
            work=work,
            vision=job.vision,
            gates=job.gates,
            predict=job.predict,
            attributes=attributes,
            batch_size=job.score.batch_size,
            outage_s=job.score.outage_s,
            transform=model.transform,
            checkpoint=model.checkpoint,
            calibration=model.calibration,
            provenance={
                "run_id": run.run_id,
                "model_digest": model.digest,
                "config_digest": config_digest,
                "schema_version": SCHEMA_VERSION,
            },
            use_gpu=job.score.use_gpu,
        )
        publication = Publication(
            storage=storage,
            work=work,
            out=out,
            run_id=run.run_id,
            num_parts=run.plan.num_parts,
            attributes=attributes,
            group_by=job.score.group_by,
            aggregate_only=job.score.aggregate_only,
            ledger=storage.absolute(job.score.ledger) if job.score.ledger else "",
            key=key,
            outage_s=job.score.outage_s,
        )
        record: dict[str, Any] = {
            "run_id": run.run_id,
            "started_at": run.started_at,
            "input": storage.absolute(job.score.input),
            "model_digest": model.digest,
            "config_digest": config_digest,
            "key_id": _key_id(key),
            "schema_version": SCHEMA_VERSION,
            "calibrated": model.calibration is not None,
            "aggregate_only": job.score.aggregate_only,
            "group_by": list(job.score.group_by),
            "min_cell": job.score.min_cell,
        }
        patience = Patience(job.score.outage_s)
        with cluster(job.cluster) if run.plan.num_parts else nullcontext():
            timings = _score_parts(job, scoring, run, lock, console)
            patience.call(lock.check)
            started = time.perf_counter()
            counts = _publish_files(publication, job.score.num_workers, console)
        patience.call(lambda: publish_demographics(publication, counts, model.calibration, job.score.min_cell))
        totals = _totals(counts, run.plan)
        timings |= {"plan_s": run.plan_s, "publish_s": time.perf_counter() - started}
        record |= {
            **({} if job.score.min_cell else totals),  # from totals, a suppressed cell could be worked out
            "timings": timings,
            "published_at": _now(),
        }
        for step in (lambda: finish(storage, out, record), lambda: storage.delete_tree(work)):
            patience.call(lambda step=step: _locked(lock, step))  # type: ignore[misc]
    _print_summary(console, totals, timings, f"{out} run={run.run_id}")
    return record


def _locked(lock: RunLock, step: Callable[[], None]) -> None:
    """Take a step that nobody else may take, once it is sure again that the lock is ours."""
    lock.check()
    step()


def _check(job: ScoreJob, storage: Storage, out: str) -> bytes:
    """Refuse what can't be meant, before any work; return the secret key, empty where none is asked for."""
    config = job.score
    if job.vision.detector == "none":
        raise ConfigError("vision.detector 'none' finds no face in a photograph; allowed in scoring: mtcnn, haar")
    key = b""
    if config.pseudonymise:
        try:
            key = storage.read(config.pseudonymise)
        except MissingObject:
            raise ConfigError(f"score.pseudonymise {config.pseudonymise}: there is no such file") from None
        if len(key) < MIN_KEY_BYTES:
            raise ConfigError(
                f"score.pseudonymise {config.pseudonymise}: holds {len(key)} bytes, and a key has {MIN_KEY_BYTES} at "
                "least; `head -c 32 /dev/urandom > FILE` makes one"
            )
    if config.aggregate_only:
        for name in ("pseudonymise", "ledger"):
            if not getattr(config, name):
                raise ConfigError(f"score.aggregate_only needs score.{name}: what the next run must skip is kept there")
        if f"{storage.absolute(config.ledger).rstrip('/')}/".startswith(f"{out}/"):
            raise ConfigError(f"score.ledger {config.ledger}: lies in score.out {out}, which others may read")
    elif config.ledger:
        raise ConfigError(f"score.ledger {config.ledger}: only score.aggregate_only keeps one")
    check_grouping(config)
    return key


def _model(directory: Path, job: ScoreJob, console: Console) -> Model:
    """Read what predicts, and warn where it does not fit the job well."""
    meta = read_meta(directory)
    detector = meta["data"].get("detector")
    if detector not in (None, job.vision.detector):
        console.print(f"warning: trained on crops found by {detector}, scoring with {job.vision.detector}")
    calibration, reason = read_calibration(directory, job.predict, "score.checkpoint")
    if calibration is None:
        console.print(f"warning: no age_low and age_high, no abstention, no corrected shares: {reason}")
    return Model(
        checkpoint=portable_checkpoint(directory),
        digest=model_digest(directory),
        tasks=tuple(meta["model"]["tasks"]),
        transform=Transform.from_json(meta["transform"]),
        calibration=calibration,
        calibration_digest="" if calibration is None else _digest(calibration.to_json()),
    )


def _scored_folders(
    storage: Storage, out: str, job: ScoreJob, model: Model, config_digest: str, key: bytes
) -> list[str]:
    """Return the folders whose `image_id` need not be scored again: same model, configuration and key."""
    wanted = {"model_digest": model.digest, "config_digest": config_digest, "key_id": _key_id(key)}
    folders = []
    for record in published_runs(storage, out):
        if all(record[name] == value for name, value in wanted.items()):
            if record["aggregate_only"] and not job.score.aggregate_only:
                raise ConfigError(
                    f"score.out {job.score.out}: run={record['run_id']} there is aggregate_only; go on with "
                    "score.aggregate_only and its score.ledger, or choose another score.out"
                )
            root = storage.absolute(job.score.ledger) if record["aggregate_only"] else storage.join(out, "images")
            folder = storage.join(root, f"run={record['run_id']}")
            if record["aggregate_only"] and not storage.exists(folder):
                raise ConfigError(
                    f"score.ledger {job.score.ledger}: has no run={record['run_id']}, which is published in {out}; "
                    "without it, its photographs would be scored and counted again"
                )
            folders.append(folder)
    return folders


def _resumed(storage: Storage, out: str, work: str, skipped: list[str], console: Console) -> Run | None:
    """Return the run that lies at `work` unpublished, if it was planned to the end and nothing was published since."""
    try:
        record = json.loads(storage.read(storage.join(work, "run.json")))
    except MissingObject:
        return None
    if is_published(storage, out, record["run_id"]):
        return None  # and was killed before its work was deleted
    if record["skipped"] != skipped:
        console.print("another run has published since this one was killed: it is planned again, so that none is twice")
        return None
    made = read_plan(storage, manifest_folder(storage, work))
    assert made is not None
    return Run(record["run_id"], record["started_at"], record["plan_s"], made)


def _opened(
    job: ScoreJob, storage: Storage, work: str, identity: str, skipped: list[str], key: bytes, console: Console
) -> Run:
    """Plan a new run."""
    storage.delete_tree(work)  # of one that was killed while it was planned, or after it was published
    started_at, started = _now(), time.perf_counter()
    with progress(console, "listing", None) as update:
        made = plan(
            storage,
            job.score,
            manifest_folder(storage, work),
            scored_ids(storage, skipped),
            scored_as=(lambda image: pseudonym(image, key)) if key else None,
            progress=update,
        )
    run_id = f"{datetime.datetime.fromisoformat(started_at):%Y%m%dT%H%M%SZ}-{identity[:8]}"
    run = Run(run_id, started_at, time.perf_counter() - started, made)
    record = {"run_id": run_id, "started_at": started_at, "plan_s": run.plan_s, "skipped": skipped}
    storage.write(storage.join(work, "run.json"), json.dumps(record, indent=2).encode())
    return run


def _score_parts(job: ScoreJob, scoring: Scoring, run: Run, lock: RunLock, console: Console) -> dict[str, Any]:
    """Make the parts that are not there yet; return the seconds that it took."""
    done = _finished_parts(scoring)
    todo = [part for part in range(run.plan.num_parts) if part not in done]
    num_images = run.plan.num_to_do
    done_before = "" if not done else f", {len(done)} of {run.plan.num_parts} parts done before"
    left_out = f"{run.plan.num_excluded:,} left out by name or size, " if run.plan.num_excluded else ""
    console.print(
        f"{run.plan.num_listed:,} listed, {left_out}{run.plan.num_scored:,} scored before, {num_images:,} to do"
        f"{done_before}",
    )
    if not todo:
        return {"score_s": 0.0, "num_workers": 0, "worker_s": {}}
    num_gpus = worker_count(None, use_gpu=True) if job.score.use_gpu else 0
    num_workers = worker_count(job.score.num_workers, besides=num_gpus)
    check_fits("score.num_workers", num_workers, 1.0, spare_cpus=1.0 + num_gpus)
    check_fits("score.use_gpu", num_gpus, 0.0, 1.0)
    counts: Counter[str] = Counter()
    stopwatch = Stopwatch()
    num_faces = 0
    started = time.perf_counter()
    total = sum(_rows_of(part, run.plan) for part in todo)
    patience = Patience(scoring.outage_s)
    with progress(console, "scoring", total) as update:
        for summary in _summaries(scoring, todo, num_workers, num_gpus):
            patience.call(lock.check)
            counts.update(json.loads(summary["counts"]))
            stopwatch.add(json.loads(summary["seconds"]))
            num_faces += summary["num_faces"]
            said = ", ".join(f"{status} {count:,}" for status, count in sorted(counts.items()))
            update(counts.total(), f"{num_faces:,} faces; {said}")
    score_s = time.perf_counter() - started
    console.print(f"{total:,} photographs in {score_s:.1f} s: {total / score_s:.1f} images/s")
    return {"score_s": score_s, "num_workers": num_workers, "worker_s": stopwatch.take()}


def _summaries(scoring: Scoring, parts: list[int], num_workers: int, num_gpus: int) -> Iterator[dict[str, Any]]:
    """Score the parts on the cluster; yield `scorer.summary` of each."""
    configure_ray_data()
    for first in range(0, len(parts), MAX_BLOCKS):
        yield from _wave(scoring, parts[first : first + MAX_BLOCKS], num_workers, num_gpus)


def _wave(scoring: Scoring, parts: list[int], num_workers: int, num_gpus: int) -> Iterator[dict[str, Any]]:
    """Score some parts, each a block of its own: of a block that holds several, a kill would undo all."""
    dataset = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    arguments: dict[str, Any] = {"fn_constructor_args": (scoring,), "batch_size": 1, "num_cpus": 1}
    if num_gpus:
        found = dataset.map_batches(FoundParts, compute=ActorPoolStrategy(size=num_workers), **arguments)
        written = found.map_batches(
            WrittenParts,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=num_gpus),
            num_gpus=1,
            **arguments,
        )
    else:
        written = dataset.map_batches(PartScorer, compute=ActorPoolStrategy(size=num_workers), **arguments)
    for batch in written.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(batch, pa.Table)
        yield from batch.to_pylist()


def _finished_parts(scoring: Scoring) -> set[int]:
    folder = parts_folder(scoring.storage, scoring.work)
    if not scoring.storage.exists(folder):
        return set()
    return {int(Path(info.key).stem.removeprefix("part-")) for info in scoring.storage.list(folder, (".parquet",))}


def _rows_of(part: int, plan: Plan) -> int:
    """Return how many rows a part has."""
    return min(plan.rows_per_part, plan.num_to_do - part * plan.rows_per_part)


def _publish_files(publication: Publication, num_workers: int | None, console: Console) -> Counts:
    """Write every file that readers see but the demographics; return what is in them."""
    if not publication.num_parts:
        return publication.publish_file(0)
    task = ray.remote(num_cpus=1)(Publication.publish_file)
    at_once = worker_count(num_workers)  # each holds a file's rows
    files = iter(range(publication.num_files))
    waiting = [task.remote(publication, file) for file in islice(files, at_once)]
    counts: list[Counts] = []
    with progress(console, "publishing", publication.num_files) as update:
        while waiting:
            ready, waiting = ray.wait(waiting)
            counts += ray.get(ready)
            waiting += [task.remote(publication, file) for file in islice(files, len(ready))]
            update(len(counts), "files")
    return add_counts(counts, publication.group_by)


def _totals(counts: Counts, plan: Plan) -> dict[str, Any]:
    """Return the run's counts over all groups, and those of its planning."""
    names = [name for name in counts.groups.column_names if name.startswith("num_")]
    totals = {name: int(np.sum(counts.groups[name].to_numpy())) for name in names}
    return totals | {"counts": dict(sorted(counts.statuses.items())), "plan": dataclasses.asdict(plan)}


def _print_summary(console: Console, totals: Mapping[str, Any], timings: Mapping[str, Any], run: str) -> None:
    console.print(run)
    table = make_table("", "number")
    rows = [("photographs", totals["num_images"])]
    rows += [(f"  {status}", count) for status, count in totals["counts"].items()]
    rows += [("faces", totals["num_faces"]), ("  flagged", totals["num_flagged"])]
    rows += [("  with an attribute too uncertain to tell", totals["num_abstained"])]
    for label, number in rows:
        table.add_row(label, f"{number:,}")
    console.print(table)
    print_failed(console, totals["counts"])
    stages: dict[str, float] = timings["worker_s"]
    if stages:
        total_s = sum(stages.values())
        most_first = sorted(stages.items(), key=lambda stage: -stage[1])
        said = ", ".join(f"{name} {spent_s / total_s:.0%}" for name, spent_s in most_first)
        console.print(f"where the workers' time went: {said}")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _key_id(key: bytes) -> str:
    """Return what tells keys apart without giving them away."""
    return hashlib.sha256(b"agr_ray key id" + key).hexdigest()[:12] if key else ""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

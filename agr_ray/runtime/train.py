"""Train on a cluster: Ray Train's workers run the loop of `learn.loop`, and Ray Data feeds them.

A run is a folder, OUT/NAME:

    run.json            configuration, data and state; `finished` says why it ended
    initial/            the checkpoint with the initial weights
    checkpoints/        Ray Train's own, one after every epoch, of which the best and the last are kept; also one within
                        an epoch if a machine was about to be preempted
    best/  last/        these two as plain checkpoints, once the run has finished
    history.parquet     schema.HISTORY, rewritten after every epoch
    history.png         learning curves, once the run has finished
    tensorboard/        its event files; the last epoch adds a page of sample predictions
    lock.json           the lock of the running driver
    failure.txt         only if the loss was not finite: the step, and the image_ids of its batch

The same command resumes from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from ray.train import Result, UserCallback
from rich.console import Console

from agr_ray.config import TrainConfig, TrainJob, digest, other_settings
from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_console, make_table, print_next
from agr_ray.data.crops import map_races, read_labels, select_crops, usable_statuses
from agr_ray.data.guards import (
    check_no_overlaps,
    check_sets,
    class_warnings,
    copies_warnings,
    size_warnings,
    training_space,
    vision_warnings,
)
from agr_ray.data.prepared import PreparedSet, describe_sets, open_prepared
from agr_ray.errors import ConfigError, JobError
from agr_ray.evaluation.groups import class_counts
from agr_ray.evaluation.metrics import Baseline
from agr_ray.json_log import name_run
from agr_ray.labels import IntArray, Labels, LabelSpace, race_mapping
from agr_ray.learn.dry_run import dry_run
from agr_ray.learn.history import best_row
from agr_ray.learn.resources import max_kept_rows
from agr_ray.learn.run import (
    CHECKPOINTS,
    FAILURE,
    OBJECTIVE,
    OBJECTIVE_MEANING,
    Run,
    tracked,
    tracked_again,
    write_history,
)
from agr_ray.learn.sampling import Sampler
from agr_ray.learn.tracking import check_mlflow
from agr_ray.models.backbones.base import WeightsError
from agr_ray.models.checkpoint import CARD
from agr_ray.models.checkpoint_files import calibration_hint, publish_checkpoint
from agr_ray.models.checkpoint_network import content_codes, load_train_state, save_checkpoint
from agr_ray.models.network import MultiTaskNet, backbone_class, check_side
from agr_ray.models.pretrained import load_backbone, pretrained_weights
from agr_ray.models.tasks import check_tasks
from agr_ray.models.transform import Transform
from agr_ray.runtime.cluster import cluster
from agr_ray.runtime.metrics import Metrics
from agr_ray.runtime.ray_compat import machine_cpus
from agr_ray.runtime.training.board import progress_board
from agr_ray.runtime.training.trainer import check_workers_fit, fit
from agr_ray.schema import LABEL_COLUMNS, Status
from agr_ray.storage import MissingObject, Storage
from agr_ray.storage.lock import RunLock, run_lock
from agr_ray.storage.retry import Retry
from agr_ray.vision.align import DEFAULT_MARGIN
from agr_ray.vision.detect import CASCADES

WITHOUT_EFFECT: Final = frozenset(
    {
        *("out", "name", "num_workers", "max_failures", "outage_s", "lock_expiry_s", "num_to_keep", "cache_mib"),
        *("threads_per_worker", "cpus_per_worker", "gpus_per_worker", "tf32", "compile", "mlflow_uri"),
    }
)
"""Keys of `[train]` that may change when a run is resumed. Threads, TF32 and the compiler only round differently. With
another number of workers or another cache, batches have other rows; without that, a run could not resume on what is
left of a cluster. `grad_accum_steps` may not change: batch norm sees micro-batches."""

NOT_IN_DIGEST: Final = frozenset({"storage", "cluster", "train.data", *(f"train.{key}" for key in WITHOUT_EFFECT)})
"""Sections and keys that `settings_digest` leaves out; it has the data's content in place of its URI."""


def train(job: TrainJob, *, callbacks: Sequence[UserCallback] = (), quiet: bool = False) -> str:
    """Train, or resume training, and return the URI of the best checkpoint.

    With `job.dry_run`, only print the plan: nothing is started or written, and the checkpoint will not exist.

    Args:
        job: what to train.
        callbacks: Ray Train callbacks, called after each epoch.
        quiet: print nothing but warnings, here and in workers.

    Raises:
        ConfigError: the prepared set does not exist, the run has finished, another driver is running it, or the
            cluster is too small.
        JobError: the loss is NaN or infinite, or workers failed more often than `train.max_failures`.
        LockLost: another driver has taken over the run.
    """
    console = make_console(quiet=quiet)
    storage = Storage.from_config(job.storage)
    storage.probe(job.train.out, "train.out", write=not job.dry_run)
    sets = open_sets(job, storage)
    settings = settings_digest(job, sets)
    uri = _run_uri(storage, job, settings)
    run, first = plan(job, storage, sets, uri, settings, console)
    run = dataclasses.replace(run, quiet=quiet)
    name_run(uri)
    console.print(f"run {uri}")
    if job.dry_run:
        dry_run(run, sets, first or MultiTaskNet(job.model, run.baseline.space), machine_cpus(), console)
        return storage.join(uri, "best")
    lock_uri, retry = storage.join(uri, "lock.json"), Retry(job.train.outage_s)
    owner = f"training run {uri}"
    with run_lock(storage, lock_uri, owner, expiry_s=job.train.lock_expiry_s, console=console) as lock:
        if _run_uri(storage, job, settings) != uri:  # another driver may have written run.json before we had the lock
            raise ConfigError(f"the run {uri} has finished since this command began; run the command again")
        tracked(run)  # before the cluster starts, so that a rejected connection ends the job at once
        with cluster(job.cluster, trains=True):
            check_workers_fit(job.train)
            lock.check()
            _begin(run, first)
            with progress_board(console) as board:
                result = fit(run, sets, lock, board, console, callbacks)
            retry.call(lambda: _check_finite(run))
            best = retry.call(lambda: _publish(run, result, lock, console))
    _print_history(console, storage, uri)
    measured = ("--checkpoint", best, "--data", sets[0].uri, "--split", "val", "--calibrate")
    print_next(console, "calibrate it (then measure it on test)", "evaluate", *measured)
    return best


def open_sets(job: TrainJob, storage: Storage) -> list[PreparedSet]:
    """Return the prepared sets to train on.

    Raises:
        ConfigError: one does not exist, or they can't be combined.
    """
    for uri in job.train.data_uris:
        storage.probe(uri, "train.data")
    sets = [open_prepared(storage, uri, "train.data") for uri in job.train.data_uris]
    check_sets(sets)
    return sets


def _run_uri(storage: Storage, job: TrainJob, settings: str) -> str:
    """Return the folder of the run that this configuration names.

    Raises:
        ConfigError: the run has finished, and --new-run is not given.
    """
    name = job.train.name or f"train-{settings}"
    out = storage.absolute(job.train.out)
    number = 1
    while True:
        uri = storage.join(out, name if number == 1 else f"{name}-{number}")
        try:
            record = json.loads(storage.read(storage.join(uri, "run.json")))
        except MissingObject:
            return uri
        if not record["finished"]:
            if record["settings_digest"] != settings:
                theirs = other_settings(record["config"], _recorded(job), NOT_IN_DIGEST)
                raise ConfigError(
                    f"train.name {name}: the unfinished run {uri} has {theirs}; choose another name, or the same "
                    "settings and data"
                )
            return uri
        if not job.new_run:
            raise ConfigError(f"the run {uri} has finished ({record['finished']}); --new-run starts another beside it")
        number += 1


def settings_digest(job: TrainJob, sets: Sequence[PreparedSet]) -> str:
    """Return the digest of all settings and data that affect the weights, wherever the data is."""
    fields = TrainConfig.model_fields
    data = sets[0].digest if len(sets) == 1 else json.dumps([prepared.digest for prepared in sets])
    settings = job.train.model_copy(update={name: fields[name].default for name in WITHOUT_EFFECT} | {"data": data})
    return digest(job.labels, job.model, job.loss, job.augment, settings, job.predict)


def plan(
    job: TrainJob, storage: Storage, sets: Sequence[PreparedSet], uri: str, settings: str, console: Console
) -> tuple[Run, MultiTaskNet | None]:
    """Check the labels, and draw or read the initial weights; None if the run is resumed. Write nothing.

    Suspicious data triggers a warning on the console.

    Raises:
        ConfigError: there are too few crops, training images are in another split too, or the initial weights can't be
            read.
    """
    check_mlflow(job.train.mlflow_uri)
    space = training_space(sets, job.labels)
    check_network(job, sets, space)
    columns = ["content_hash", "split", "status", *LABEL_COLUMNS]
    crops = [
        map_races(
            storage.read_table(prepared.crops(storage), columns=columns), race_mapping(prepared.label_space, space)
        )
        for prepared in sets
    ]
    statuses = usable_statuses(use_fallback=job.train.use_fallback)
    trained = [select_crops(table, "train", statuses) for table in crops]
    for prepared, table in zip(sets, trained, strict=True):
        if not table.num_rows:
            raise ConfigError(
                f"train.data {prepared.uri}: no crop in its train split; its splits are {prepared.splits}"
            )
    rows = pa.concat_tables(trained)
    validated = [select_crops(table, "val", usable_statuses(use_fallback=True)) for table in crops]
    num_val_rows = [table.num_rows for table in validated]
    data = describe_sets(sets, [table.num_rows for table in trained], num_val_rows, job.train.data_shares)
    where = data["uri"]
    labels = read_labels(rows, space)
    if rows.num_rows < 2 * job.train.max_workers:
        raise ConfigError(
            f"train.data {where}: {rows.num_rows} crops in its train split, too few for train.num_workers "
            f"{job.train.max_workers}, each of which needs two"
        )
    check_no_overlaps(trained, crops, sets, storage)
    transform = Transform(job.model.image_size, sets[0].crop_side_px, DEFAULT_MARGIN, equalize=job.augment.equalize)
    if job.train.schedule == "plateau" and not sum(num_val_rows):
        raise ConfigError(f"train.schedule plateau needs validation, and {where} has no crop in its val split")
    max_rows, shares = max_kept_rows(job.train, transform), job.train.data_shares
    if (job.train.balance != "none" or shares) and rows.num_rows > max_rows * job.train.min_workers:
        draws = f"data_shares {list(shares)}" if shares else f"balance {job.train.balance}"
        raise ConfigError(
            f"train.{draws} draws from crops in memory, and train.cache_mib {job.train.cache_mib} "
            f"holds {max_rows} of the {math.ceil(rows.num_rows / job.train.min_workers)} of each worker"
        )
    set_index = np.repeat(np.arange(len(sets)), [table.num_rows for table in trained])
    baseline, counts = Baseline.fit(labels), class_counts(labels)
    warnings = class_warnings(counts, job.model.tasks, sets) + vision_warnings(sets) + copies_warnings(trained, sets)
    warnings += size_warnings(sets, job.model.image_size)
    for warning in warnings:
        console.print(f"warning: {warning}")
    run = Run(
        job=job,
        storage=storage,
        uri=uri,
        transform=transform,
        pipeline=Pipeline(vision=sets[0].vision, predict=job.predict),
        baseline=baseline,
        sampler=Sampler.fit(labels, job.train.balance, job.train.balance_power, set_index, shares),
        num_train_rows=rows.num_rows,
        num_val_rows=sum(num_val_rows),
        train_images=content_codes(rows["content_hash"].to_pylist()),
        data=data
        | {
            "template": transform.template,
            "num_train_fallback": pc.sum(pc.equal(rows["status"], str(Status.FALLBACK))).as_py(),
            "train_labels": counts,
            "baseline": baseline.to_json(),
        },
        git_commit=_git_commit(),
        settings_digest=settings,
    )
    is_resumed = storage.exists(storage.join(uri, "run.json"))
    return run, None if is_resumed else _initial_model(run, labels, set_index)


def check_network(job: TrainJob, sets: Sequence[PreparedSet], space: LabelSpace) -> None:
    """Reject a network that can't be trained on these sets, or not with the packages that are installed.

    Raises:
        ConfigError: it can't.
    """
    model = job.model
    backbone_class(model.backbone).check_available()
    check_tasks(model, space)
    check_side(model.backbone, model.image_size, "model.image_size")
    for side in job.train.image_sizes:
        check_side(model.backbone, side, "train.image_sizes")
    if "domain" in model.tasks and len(sets) == 1:
        raise ConfigError("model.tasks domain: needs two prepared sets or more in train.data")
    detectors = dict.fromkeys(prepared.detector for prepared in sets)
    if model.head_pose and not {*CASCADES} & {*detectors}:
        uris, names = " + ".join(prepared.uri for prepared in sets), " + ".join(detectors)
        raise ConfigError(
            f"model.head_pose: {uris} was prepared with vision.detector {names}, which finds no landmarks; prepare it "
            "with mtcnn"
        )


def _check_finite(run: Run) -> None:
    """Check that no worker has met a loss that is NaN or infinite.

    Raises:
        JobError: one has; the message names the step and its rows.
    """
    failure = run.storage.join(run.uri, FAILURE)
    if run.storage.exists(failure):
        Metrics("train", run.uri).not_finite()
        reason, _, image_ids = run.storage.read(failure).decode().partition("\n")
        where = f"; all of them are in {failure}" if image_ids else ""
        raise JobError(f"{run.uri}: {reason}{where}; train.grad_clip_norm or a lower train.lr may help")


def _begin(run: Run, first: MultiTaskNet | None) -> None:
    """Write the initial weights and run.json, unless the run is resumed; the caller holds the lock."""
    storage = run.storage
    storage.delete(storage.join(run.uri, FAILURE))
    if first is None or storage.exists(storage.join(run.uri, "run.json")):
        return
    with TemporaryDirectory() as temporary:
        save_checkpoint(Path(temporary), first, run.transform, pipeline=run.pipeline, data=run.data)
        storage.upload_tree(temporary, storage.join(run.uri, "initial"), overwrite=True)
    _write_record(run, finished="")


def _initial_model(run: Run, labels: Labels, set_index: IntArray) -> MultiTaskNet:
    """Draw the initial weights, or read those that the configuration names.

    `set_index` is the number of each row's prepared set, (n,).

    Raises:
        ConfigError: they can't be read, or don't fit the network; or a task has no label.
    """
    torch.manual_seed(run.job.train.seed)
    model = MultiTaskNet(run.job.model, labels.space)
    arrays = labels.arrays | {"set_index": set_index}
    labelled = [
        task for task, head in model.heads_by_task.items() if head.num_labelled(head.targets(arrays, len(labels)))
    ]
    unlabelled = ", ".join(sorted(model.heads_by_task.keys() - labelled))
    if unlabelled:
        hint = f"; train without: --model.tasks {','.join(labelled)}" if labelled else ""
        raise ConfigError(f"model.tasks: no training row of {run.data['uri']} has a label of {unlabelled}{hint}")
    model.initialise(labels.arrays)
    try:
        state = pretrained_weights(model.backbone, run.job.model.pretrained, run.storage)
        if state is not None:
            load_backbone(model, state, run.job.model.pretrained)
    except WeightsError as error:
        raise ConfigError(f"model.pretrained: {error}") from None
    return model


def _publish(run: Run, result: Result, lock: RunLock, console: Console) -> str:
    """Copy the best and last checkpoints out of Ray's folder, mark the run as finished, and return the best one's URI.

    Raises:
        LockLost: the run's lock was lost; everything written before that was written under the lock.
    """
    from agr_ray.report.curves import curves_png  # here, because matplotlib takes a while to import

    last = result.checkpoint
    best = result.get_best_checkpoint(OBJECTIVE, "min")
    assert last is not None
    assert best is not None
    for name, checkpoint in (("best", best), ("last", last)):
        # Ray's `as_directory` is not used, because other users of this machine could read its copy.
        with TemporaryDirectory() as temporary:
            directory = Path(temporary, name)
            source = run.storage.join(run.uri, CHECKPOINTS, Path(checkpoint.path).name)
            run.storage.download_tree(source, str(directory))
            lock.check()
            if publish_checkpoint(run.storage, directory, run.storage.join(run.uri, name)):
                console.print(calibration_hint(run.storage.join(run.uri, name)))
            state = load_train_state(directory)
    # Again, because the run may have been killed between its last checkpoint and its last line of history.
    lock.check()
    write_history(run, state["history"])
    curves = curves_png(state["history"], run.uri)
    run.storage.write(run.storage.join(run.uri, "history.png"), curves)
    best_uri = run.storage.join(run.uri, "best")
    tracked, problem = tracked_again(run)
    if tracked is not None:
        with TemporaryDirectory() as temporary:
            files = {"history.png": curves, CARD: run.storage.read(run.storage.join(best_uri, CARD))}
            for name, body in files.items():
                Path(temporary, name).write_bytes(body)
            problem = tracked.log(state["history"]) or tracked.finish([str(Path(temporary, name)) for name in files])
    if problem:
        console.print(f"warning: {problem}")
    lock.check()
    _write_record(run, state["finished"])  # last, because a finished run can't be resumed
    return best_uri


def _write_record(run: Run, finished: str) -> None:
    record = {
        "finished": finished,
        "settings_digest": run.settings_digest,
        "config": _recorded(run.job),
        "data": run.data,
        "git_commit": run.git_commit,
    }
    run.storage.write(run.storage.join(run.uri, "run.json"), (json.dumps(record, indent=2) + "\n").encode())


def _recorded(job: TrainJob) -> dict[str, Any]:
    """Return the configuration as run.json holds it: without addresses, which may hold passwords."""
    return job.model_dump(
        mode="json", exclude={"new_run": True, "dry_run": True, "log_format": True, "train": {"mlflow_uri"}}
    )


def _git_commit() -> str:
    """Return the git commit of the code, with a + if files have changed since; empty outside a checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _print_history(console: Console, storage: Storage, uri: str) -> None:
    history = storage.read_table(storage.join(uri, "history.parquet")).to_pylist()
    best = best_row(history) or history[-1]
    console.print("validation")
    table = make_table("", "epoch", "age MAE, years", "gender", "race", "objective")
    for label, row in (("best", best), ("last", history[-1])):
        shown = [row["val_age_mae_years"], row["val_gender_accuracy"], row["val_race_accuracy"], row[OBJECTIVE]]
        table.add_row(label, str(row["epoch"]), *("" if value is None else f"{value:.3f}" for value in shown))
    console.print(table)
    console.print(OBJECTIVE_MEANING)
    total_s = sum(row["epoch_s"] for row in history)
    console.print(f"{len(history)} epochs in {total_s / 60:.1f} minutes; checkpoint: {uri}/best")

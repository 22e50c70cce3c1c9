"""Train on a cluster: the loop of `learn.loop` in Ray Train's workers, fed by Ray Data.

A run is a folder, OUT/NAME:

    run.json            configuration, data and state; `finished` says why it ended
    initial/            the checkpoint with the first weights
    checkpoints/        Ray Train's own: after every epoch, of which the best and the last are kept; and where a machine
                        was to be taken away, in the middle of one
    best/  last/        the same two as plain checkpoints, once the run has finished
    history.parquet     schema.HISTORY, rewritten after every epoch
    history.png         the same as curves, once the run has finished
    tensorboard/        its event files; the last epoch adds a page of sample predictions
    failure.txt         only where the loss was no number: which step, and the image_ids of its batch

The same command again resumes at the last epoch that was checkpointed.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.train
import ray.train.torch
import torch
from numpy.typing import NDArray
from ray.data import DataIterator, Dataset
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from agr_ray.config import ConfigError, ModelConfig, TrainConfig, TrainJob, digest
from agr_ray.learn.loop import Batch, EpochReport, NonFiniteLossError, Row, Snapshot, labels_of
from agr_ray.learn.loop import train as train_loop
from agr_ray.learn.metrics import Baseline, Labels, class_counts
from agr_ray.learn.predict import predict
from agr_ray.learn.progress import Progress
from agr_ray.learn.sampling import Sampler
from agr_ray.models.checkpoint import CARD, content_codes, load_checkpoint, load_train_state, save_checkpoint
from agr_ray.models.network import MultiTaskNet, Transform, WeightsError, first_weights, load_trunk
from agr_ray.runtime.board import progress_board
from agr_ray.runtime.cluster import check_fits, cluster, machine_cpus
from agr_ray.runtime.command import JobError
from agr_ray.runtime.crops import SplitShares, label_arrays, select_crops, training_dataset, usable_statuses
from agr_ray.runtime.guards import check_no_overlaps, check_sets, class_warnings, copies_warnings, detector_warnings
from agr_ray.runtime.patience import Patience
from agr_ray.runtime.prefetch import prefetch
from agr_ray.runtime.prepared import PreparedSet, describe_sets, open_prepared
from agr_ray.runtime.tracking import TrackedRun, check_mlflow
from agr_ray.schema import HISTORY, Status
from agr_ray.storage import MissingObject, Storage
from agr_ray.vision.align import DEFAULT_MARGIN, crop_side_px

PROGRESS_EVERY_S: Final = 10.0
FAILURE: Final = "failure.txt"
MIN_VAL_BATCH: Final = 64
NUM_AHEAD: Final = 2
"""Batches that wait for the device."""
NUM_SAMPLES: Final = 24
"""Crops on the page of sample predictions."""
OBJECTIVE: Final = "val_objective"
NOT_VALIDATED: Final = 1e30
"""The objective of a checkpoint that is to be gone on from only, never to be the best."""
CHECKPOINTS: Final = "checkpoints"
MIN_START_S: Final = 60.0
WATCH_EVERY_S: Final = 2.0
CONTROLLER_FAILURES: Final = 3
"""Ray's default is to ask for ever for what a cluster does not have."""
_SECTIONS: Final = ("model", "loss", "augment", "train", "predict")


@dataclasses.dataclass(frozen=True)
class Run:
    """What every worker is told."""

    job: TrainJob
    storage: Storage
    uri: str
    transform: Transform
    baseline: Baseline
    sampler: Sampler | None
    num_train_rows: int
    num_val_rows: int
    train_images: Tensor
    data: Mapping[str, Any]
    """What the checkpoint says of its data."""
    git_commit: str
    settings_digest: str


def train(job: TrainJob) -> str:
    """Train, or go on training, and return the URI of the best checkpoint.

    With `job.dry_run`, only print the plan: nothing is started or written, and there will be no such checkpoint.

    Raises:
        ConfigError: there is no such prepared set, the run has finished already, or the plan can't fit.
        JobError: the loss is no number any more, or workers failed more often than `train.max_failures`.
    """
    console = Console()
    storage = Storage.from_config(job.storage)
    sets = [open_prepared(storage, uri, "train.data") for uri in job.train.data_uris]
    check_sets(sets)
    settings = _settings_digest(job, sets)
    uri = _run_uri(storage, job, settings)
    run, first = _plan(job, storage, sets, uri, settings, console)
    console.print(f"run {uri}", highlight=False, soft_wrap=True)
    if job.dry_run:
        # Here: it is of no use to workers, which import this module.
        from agr_ray.runtime.dry_run import dry_run

        dry_run(run, sets, first or MultiTaskNet(job.model), console)
        return storage.join(uri, "best")
    _tracked(run)  # a server that refuses is better known now
    with cluster(job.cluster):
        check_workers_fit(job.train)
        _begin(run, first)
        with progress_board(console) as board:
            result = _fit(run, sets, board, console)
    failure = storage.join(uri, FAILURE)
    if storage.exists(failure):
        said, _, image_ids = storage.read(failure).decode().partition("\n")
        where = f"; all of them are in {failure}" if image_ids else ""
        raise JobError(f"{uri}: {said}{where}; train.clip_norm or a lower train.lr may help")
    best = _publish(run, result, console)
    _print_history(console, storage, uri)
    return best


def _run_uri(storage: Storage, job: TrainJob, settings: str) -> str:
    """Return the folder of the run that this configuration names.

    Raises:
        ConfigError: it has finished, and no new one is asked for.
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
                raise ConfigError(
                    f"train.name {name}: the unfinished run {uri} has other settings or data (digest "
                    f"{record['settings_digest']}, not {settings}); choose another name, or the same settings"
                )
            return uri
        if not job.new_run:
            raise ConfigError(f"the run {uri} has finished ({record['finished']}); --new-run starts another beside it")
        number += 1


def _settings_digest(job: TrainJob, sets: Sequence[PreparedSet]) -> str:
    """Return the digest of all that decides what is learnt: of knobs and of data, wherever they lie."""
    # Threads, TF32 and the compiler round otherwise, no more; `accumulate` stays: batch norm sees its parts.
    moot = {"out", "name", "num_workers", "max_failures", "outage_s", "num_to_keep", "cache_mib"}
    moot |= {"threads_per_worker", "cpus_per_worker", "tf32", "compile", "mlflow_uri"}
    fields = TrainConfig.model_fields
    data = sets[0].digest if len(sets) == 1 else json.dumps([prepared.digest for prepared in sets])
    settings = job.train.model_copy(update={name: fields[name].default for name in moot} | {"data": data})
    return digest(job.model, job.loss, job.augment, settings, job.predict)


def _plan(
    job: TrainJob, storage: Storage, sets: Sequence[PreparedSet], uri: str, settings: str, console: Console
) -> tuple[Run, MultiTaskNet | None]:
    """Look at the labels, and draw or read the first weights; none where the run goes on. Nothing is written yet.

    What is odd about the data and may be meant is a warning on the console.

    Raises:
        ConfigError: there is too little to train on, images of training are in another split too, or first weights
            can't be had.
    """
    check_mlflow(job.train.mlflow_uri)
    columns = ["content_hash", "split", "status", "age", "gender", "race"]
    crops = [storage.read_table(prepared.crops(storage), columns=columns) for prepared in sets]
    statuses = usable_statuses(use_fallback=job.train.use_fallback)
    trained = [select_crops(table, "train", statuses) for table in crops]
    for prepared, table in zip(sets, trained, strict=True):
        if not table.num_rows:
            raise ConfigError(
                f"train.data {prepared.uri}: no crop in its train split; its splits are {prepared.splits}"
            )
    rows = pa.concat_tables(trained)
    data = describe_sets(sets, [table.num_rows for table in trained], job.train.data_shares)
    where = data["uri"]
    for task in job.model.tasks:
        if rows[task].null_count == rows.num_rows:
            raise ConfigError(f"model.tasks has {task}, and no training row of {where} has that label")
    if rows.num_rows < 2 * job.train.max_workers:
        raise ConfigError(
            f"train.data {where}: {rows.num_rows} crops in its train split, too few for train.num_workers "
            f"{job.train.max_workers}, each of which needs two"
        )
    check_no_overlaps(trained, crops, sets, storage)
    transform = Transform(job.model.input_side_px, sets[0].crop_side_px, DEFAULT_MARGIN, equalize=job.augment.equalize)
    if job.train.schedule == "plateau" and not data["splits"]["val"]:
        raise ConfigError(f"train.schedule plateau needs validation, and {where} has no crop in its val split")
    max_rows, shares = max_kept_rows(job.train, transform), job.train.data_shares
    if (job.train.balance != "none" or shares) and rows.num_rows > max_rows * job.train.min_workers:
        draws = f"data_shares {list(shares)}" if shares else f"balance {job.train.balance}"
        raise ConfigError(
            f"train.{draws} draws from crops in memory, and train.cache_mib {job.train.cache_mib} "
            f"holds {max_rows} of the {math.ceil(rows.num_rows / job.train.min_workers)} of each worker"
        )
    labels = Labels(**label_arrays(rows))
    set_index = np.repeat(np.arange(len(sets)), [table.num_rows for table in trained])
    baseline, counts = Baseline.fit(labels), class_counts(labels)
    warnings = class_warnings(counts, job.model.tasks, sets) + detector_warnings(sets) + copies_warnings(trained, sets)
    for warning in warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    run = Run(
        job=job,
        storage=storage,
        uri=uri,
        transform=transform,
        baseline=baseline,
        sampler=Sampler.fit(labels, job.train.balance, job.train.balance_power, set_index, shares),
        num_train_rows=rows.num_rows,
        num_val_rows=data["splits"]["val"],
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
    goes_on = storage.exists(storage.join(uri, "run.json"))
    return run, None if goes_on else _initial_model(run, rows)


def _begin(run: Run, first: MultiTaskNet | None) -> None:
    """Write the first weights and run.json, unless the run goes on."""
    storage = run.storage
    storage.delete(storage.join(run.uri, FAILURE))
    if first is None:
        return
    with TemporaryDirectory() as temporary:
        save_checkpoint(Path(temporary), first, run.transform, data=run.data)
        storage.upload_tree(temporary, storage.join(run.uri, "initial"), overwrite=True)
    _write_record(run, finished="")


def _initial_model(run: Run, rows: pa.Table) -> MultiTaskNet:
    """Draw the first weights, or read those that the configuration names.

    Raises:
        ConfigError: they can't be had, or don't fit.
    """
    torch.manual_seed(run.job.train.seed)
    model = MultiTaskNet(run.job.model)
    if rows["age"].null_count < rows.num_rows:
        model.initialise_age(pc.mean(rows["age"]).as_py(), max(pc.stddev(rows["age"]).as_py(), 1.0))
    try:
        state = _first_weights(run.job.model, run.storage)
        if state is not None:
            load_trunk(model, state, run.job.model.weights)
    except WeightsError as error:
        raise ConfigError(f"model.weights: {error}") from None
    return model


def _first_weights(config: ModelConfig, storage: Storage) -> dict[str, Tensor] | None:
    if config.weights in ("none", "imagenet"):
        return first_weights(config)
    with TemporaryDirectory() as temporary:
        try:
            body = storage.read(config.weights)
        except MissingObject as error:
            raise WeightsError(f"{error}; allowed: none, imagenet, or the path or URI of a state dict") from None
        path = Path(temporary, f"weights{Path(config.weights).suffix}")
        path.write_bytes(body)
        return first_weights(config.model_copy(update={"weights": str(path)}))


def check_workers_fit(config: TrainConfig) -> None:
    """Refuse what would wait for ever for CPUs or GPUs that the cluster does not have.

    Raises:
        ConfigError: with what is asked and what there is.
    """
    check_fits(
        "train.num_workers",
        config.min_workers,
        config.cpus_per_worker,
        1.0 if config.use_gpu else 0.0,
        spare_cpus=_spare_cpus(config),
    )


def _spare_cpus(config: TrainConfig) -> float:
    """Return the logical CPUs that the tasks which read training and validation ask for, one each.

    Workers that are as many as the cluster has room for leave none, so reading must not ask for any.
    """
    return 2.0 if config.min_workers == config.max_workers else 0.0


def _fit(run: Run, sets: Sequence[PreparedSet], board: Any, console: Console) -> Result:
    """Run the workers to the end of the run; `board` as `RayContext`'s.

    Raises:
        JobError: they failed for good.
    """
    patience = Patience(run.job.train.outage_s)
    # Of one start; Ray tries it again CONTROLLER_FAILURES times.
    start_s = max(MIN_START_S, run.job.train.outage_s / (CONTROLLER_FAILURES + 1))
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{start_s:g}")
    for attempts_left in reversed(range(CONTROLLER_FAILURES + 1)):
        try:
            with _enough_workers(run.job.train):
                return _trainer(run, sets, board).fit()
        except ray.train.WorkerGroupError as error:  # more often than train.max_failures
            raise _failed(run, error.worker_failures[min(error.worker_failures)]) from error
        except (ray.train.ControllerError, ray.exceptions.RayActorError) as error:
            # What steers the workers is a process too, which may be killed, and give up because storage is away.
            _check_still_fits(run)
            if not attempts_left or _could_not_start(error):
                raise _failed(run, error) from error
            console.print(
                f"warning: what steers the workers ended ({_last_line(error)}); going on from the last checkpoint",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            patience.call(lambda: run.storage.read(run.storage.join(run.uri, "run.json")))
    raise AssertionError("the last attempt returns or raises")


def _trainer(run: Run, sets: Sequence[PreparedSet], board: Any) -> ray.train.torch.TorchTrainer:
    """Return what runs the workers; it goes on where one before it ended."""
    storage, config = run.storage, run.job.train

    def dataset(split: str) -> Callable[[], Dataset]:
        return lambda: training_dataset(
            storage,
            sets,
            split,
            use_fallback=config.use_fallback or split != "train",
            outage_s=config.outage_s,
            cpus_per_task=_spare_cpus(config) / 2,
        )

    filesystem, path = storage.arrow_filesystem(run.uri)
    return ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"run": run, "board": board},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,  # type: ignore[arg-type]  # typed as Train V1's
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.num_to_keep, checkpoint_score_attribute=OBJECTIVE, checkpoint_score_order="min"
            ),
            failure_config=FailureConfig(
                max_failures=config.max_failures,
                controller_failure_limit=CONTROLLER_FAILURES,  # type: ignore[call-arg]  # typed as Train V1's
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets={"train": dataset("train"), "val": dataset("val")},
        dataset_config=SplitShares(),
    )


def _failed(run: Run, cause: Exception) -> JobError:
    return JobError(
        f"{run.uri}: training failed: {_last_line(cause)}; the same command goes on from its last checkpoint"
    )


def _could_not_start(error: Exception) -> bool:
    """Say whether workers could not be started, which Ray has tried several times."""
    return "WorkerGroupStartup" in type(getattr(error, "controller_failure", None)).__name__


@contextmanager
def _enough_workers(config: TrainConfig) -> Iterator[None]:
    """End the training within where the cluster stays too small for it.

    A fixed number of workers is given so much time to start; for one that may vary, Ray waits without end.

    Raises:
        JobError: with what is asked and what there is.
    """
    if config.min_workers == config.max_workers:
        yield
        return
    ended, problem = threading.Event(), ""

    def watch() -> None:
        nonlocal problem
        small_since: float | None = None
        while not ended.wait(WATCH_EVERY_S):
            try:
                check_workers_fit(config)
                small_since = None
            except ConfigError as error:
                now = time.monotonic()
                small_since = now if small_since is None else small_since
                if now - small_since > config.outage_s:
                    problem = str(error)
                    signal.raise_signal(signal.SIGINT)  # which makes Ray Train stop in good order
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except (SystemExit, ray.exceptions.RayActorError):
        if not problem:
            raise
        raise JobError(f"{problem}; the same command goes on from the last checkpoint") from None
    finally:
        ended.set()
        watcher.join()


def _check_still_fits(run: Run) -> None:
    """Say so if the workers don't fit the cluster any more.

    Raises:
        JobError: with what is asked and what there is.
    """
    try:
        check_workers_fit(run.job.train)
    except ConfigError as error:
        raise JobError(f"{run.uri}: {error}; the same command goes on from its last checkpoint") from None


def _last_line(error: Exception) -> str:
    """Return what went wrong, of an error whose text is a traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _work(config: dict[str, Any]) -> None:
    """Be one worker."""
    run: Run = config["run"]
    logging.disable(logging.INFO)  # Ray Train logs every report as a page
    context = RayContext(run, config["board"])
    torch.set_num_threads(context.num_threads)
    with TemporaryDirectory() as temporary:
        directory = Path(temporary, "checkpoint")
        checkpoint = ray.train.get_checkpoint()
        kept = "initial" if checkpoint is None else f"{CHECKPOINTS}/{Path(checkpoint.path).name}"
        uri = run.storage.join(run.uri, kept)
        Patience(run.job.train.outage_s).call(lambda: run.storage.download_tree(uri, str(directory)))
        model = load_checkpoint(directory).model
        resume = None if checkpoint is None else load_train_state(directory)
    if resume is not None and context.rank == 0:
        middle = f" and {resume['begun']['num_steps']} steps" if "begun" in resume else ""
        _say(f"resuming after epoch {resume['epoch']}{middle}, {_workers(context.world_size)}")
    try:
        train_loop(context, model, run.transform, run.job, run.baseline, run.num_train_rows, resume)
    except NonFiniteLossError as error:
        # Starting again would only meet it again, so this is no failure to Ray. Whose batch it was knows its rows.
        if error.image_ids is not None:
            text = "\n".join([str(error), *error.image_ids])
            run.storage.write(run.storage.join(run.uri, FAILURE), text.encode())


class RayContext:
    """`learn.loop.Context` in one of Ray Train's workers.

    Args:
        run: what is trained.
        board: handle of the `Board` that the driver's terminal shows; None: it has none, and lines are printed.
    """

    def __init__(self, run: Run, board: Any) -> None:
        self._run = run
        self._board = board
        train = run.job.train
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.num_threads = train.threads_per_worker or max(1, machine_cpus() // context.get_local_world_size())
        # Small tensors are added up on the CPU, whatever the gradients travel by.
        is_gloo = self.world_size == 1 or torch.distributed.get_backend() == "gloo"
        self._cpu_group: Any = None if is_gloo else torch.distributed.new_group(backend="gloo")
        # A step takes train.batch_size images, however many workers there are.
        batch_size = train.batch_size // self.world_size + (self.rank < train.batch_size % self.world_size)
        # All workers stream or none: those that share a dataset must iterate over it together. So what decides is
        # the same for all. Validation's shares may be as unequal as they like.
        max_rows = max_kept_rows(train, run.transform)
        self._train = ShardBatches(
            ray.train.get_dataset_shard("train"),
            batch_size,
            keep=run.num_train_rows / self.world_size <= max_rows,
            shuffle_rows=train.shuffle_rows,
            seed=(train.seed, self.rank),
            sampler=run.sampler,
            device=self.device,
        )
        self._val = ShardBatches(
            ray.train.get_dataset_shard("val"),
            max(batch_size, MIN_VAL_BATCH),
            keep=run.num_val_rows <= max_rows,
            device=self.device,
        )
        self._patience = Patience(train.outage_s)
        self._logs = _Logs(run, self._patience) if self.rank == 0 else None
        self._samples: Batch | None = None
        self._shown = time.monotonic()

    def train_batches(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        """Iterate over this worker's share, in an order drawn by seed, rank, epoch and where it is gone on with."""
        return self._train.epoch(epoch, steps_done)

    def val_batches(self) -> Iterator[Batch]:
        """Iterate over this worker's share of validation; the first worker remembers some of it to show."""
        for batch in self._val.epoch(0):
            if self._samples is None and self._logs is not None and len(batch["age"]):
                self._samples = {name: np.array(values[:NUM_SAMPLES]) for name, values in batch.items()}
            yield batch

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Add up over workers."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor, group=self._cpu_group)
        return tensor

    def wrap(self, model: nn.Module) -> nn.Module:
        """Average gradients over workers."""
        if self.world_size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)

    def report(self, report: EpochReport) -> None:
        """Keep a checkpoint and the history; all workers wait for each other here."""
        row = dict(report.row)
        if row[OBJECTIVE] is None:
            row[OBJECTIVE] = -float(row["epoch"])  # nothing to validate on: the last epoch counts as the best
        else:
            row[OBJECTIVE] += 1e-12 * row["epoch"]  # of equal epochs the first is the best; Ray would keep the last
        if self._logs is None:
            ray.train.report(row)
            return
        metrics = {"epoch": row["epoch"], "val": report.metrics}
        # Training goes on while it is on its way; Ray knows of it, and so goes on from it, once all of it is there.
        self._keep(report, row, metrics, CheckpointUploadMode.ASYNC)
        self._logs.write(report.row, report.train_state()["history"])
        if report.finished and self._samples is not None:
            self._logs.show(self._samples, report)
        _say(_epoch_line(report, self._run.job.train.epochs))

    def must_save(self) -> bool:
        """Ask Ray, which asks the cluster, whether the machine of a worker is about to be taken away."""
        return ray.train.get_preemption_info() is not None

    def save(self, snapshot: Snapshot) -> None:
        """Keep a checkpoint that is only to be gone on from, and return once it is there."""
        row = {OBJECTIVE: NOT_VALIDATED}
        if self._logs is None:
            ray.train.report(row)
            return
        self._keep(snapshot, row, {}, CheckpointUploadMode.SYNC)
        _say(f"a machine will be taken away: checkpoint of epoch {snapshot.epoch} after {snapshot.num_steps} steps")

    def _keep(
        self, kept: EpochReport | Snapshot, row: Row, metrics: Mapping[str, Any], mode: CheckpointUploadMode
    ) -> None:
        """Write a checkpoint to the disk, and have Ray Train send it and then delete it there."""
        run = self._run
        directory = mkdtemp(prefix="agr-ray-checkpoint-")
        save_checkpoint(
            Path(directory),
            kept.model,
            kept.transform,
            train_state=kept.train_state(),
            train_images=run.train_images,
            data=run.data,
            metrics=metrics,
            config=_settings(run.job),
            git_commit=run.git_commit,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        ray.train.report(
            row,
            checkpoint=Checkpoint.from_directory(directory),
            checkpoint_upload_mode=mode,
            checkpoint_upload_fn=self._upload,
            delete_local_checkpoint_after_upload=True,
        )

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        storage, uri = self._run.storage, self._run.storage.join(self._run.uri, f"{CHECKPOINTS}/{name}")
        self._patience.call(lambda: storage.upload_tree(checkpoint.path, uri, overwrite=True))
        filesystem, path = storage.arrow_filesystem(uri)
        return Checkpoint(path, filesystem)

    def progress(self, progress: Progress) -> None:
        """Leave it on the board, or print a line now and then."""
        if self.rank:
            return
        if self._board is not None:
            self._board.put.remote(progress)  # nobody waits for it, so it may fail
            return
        now = time.monotonic()
        if now - self._shown >= PROGRESS_EVERY_S:
            self._shown = now
            _say(progress.line())


def crop_bytes(transform: Transform) -> int:
    """Return the size of a decoded crop."""
    return 3 * crop_side_px(transform.crop_side_px, transform.margin) ** 2


def max_kept_rows(config: TrainConfig, transform: Transform) -> int:
    """Return how many decoded crops fit `train.cache_mib`: of training, and as many again of validation."""
    return config.cache_mib * 2**20 // (2 * crop_bytes(transform))  # joining the batches takes their memory twice


class ShardBatches:
    """The batches of one worker's share: streamed once, then from memory where that is allowed.

    The next ones are made while the device computes. For a GPU, crops lie in pinned memory, as tensors.

    Args:
        shard: yields the rows of `crops.training_dataset`.
        batch_size: rows in a batch; the last one of an epoch may have fewer.
        keep: whether the share is kept, decoded; the same in all workers.
        shuffle_rows: rows in the shuffle buffer while streaming; 0: rows come in their order, always.
        seed: of the shuffling, together with the epoch.
        sampler: draws the rows of an epoch from memory; none: each comes once.
        device: where batches will go.
    """

    def __init__(
        self,
        shard: DataIterator,
        batch_size: int,
        *,
        keep: bool,
        shuffle_rows: int = 0,
        seed: tuple[int, ...] = (),
        sampler: Sampler | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._shard = shard
        self._batch_size = batch_size
        self._keep = keep
        self._shuffle_rows = shuffle_rows
        self._seed = seed
        self._sampler = sampler
        self._device = device
        self._rows: dict[str, NDArray[Any]] | None = None

    def epoch(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        """Iterate over the share once, in an order of its own where some steps of the epoch are done."""
        rng = np.random.default_rng([*self._seed, epoch, steps_done])
        batches = self._stream(rng) if self._rows is None else self._from_memory(self._rows, rng)
        if self._device is not None and self._device.type == "cuda":
            batches = _pinned(batches, self._device)
        return prefetch(batches, NUM_AHEAD)

    def _from_memory(self, rows: dict[str, NDArray[Any]], rng: np.random.Generator) -> Iterator[Batch]:
        num_rows = len(rows["age"]) if rows else 0
        if num_rows and self._sampler is not None:
            order = self._sampler.draw(labels_of(rows), rng, rows.get("set_index"))
        else:
            order = rng.permutation(num_rows) if self._shuffle_rows else np.arange(num_rows)
        for first in range(0, num_rows, self._batch_size):
            chosen = order[first : first + self._batch_size]
            yield {name: values[chosen] for name, values in rows.items()}

    def _stream(self, rng: np.random.Generator) -> Iterator[Batch]:
        kept: list[dict[str, NDArray[Any]]] = []
        for batch in self._shard.iter_batches(
            batch_size=self._batch_size,
            local_shuffle_buffer_size=self._shuffle_rows or None,
            local_shuffle_seed=int(rng.integers(2**31)) if self._shuffle_rows else None,
        ):
            # A copy: what comes from the object store can't be written to, and kept it would hold its blocks there.
            copied = {name: np.array(values) for name, values in batch.items()}
            if self._keep:
                kept.append(copied)
            yield copied
        if self._keep:
            names = kept[0] if kept else {}  # a share may be empty
            self._rows = {name: np.concatenate([batch[name] for batch in kept]) for name in names}


def _pinned(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Put crops where the device can fetch them from while it computes."""
    for batch in batches:
        with torch.cuda.device(device):  # in a thread, which would else take up with the first GPU
            crops = torch.from_numpy(batch["crop"]).pin_memory()
        yield {**batch, "crop": crops}


class _Logs:
    """TensorBoard's event files, history.parquet and MLflow, written by one worker after every epoch."""

    def __init__(self, run: Run, patience: Patience) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        self._patience = patience
        self._events = run.storage.join(run.uri, "tensorboard")
        self._local = TemporaryDirectory()
        self._writer = SummaryWriter(self._local.name)
        self._tracked, problem = _tracked_again(run)
        _warn(problem)

    def write(self, row: Row, history: list[Row]) -> None:
        self._patience.call(lambda: _write_history(self._run, history))
        for name, value in row.items():
            if value is not None and name != "epoch":
                self._writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        self._upload()
        if self._tracked is not None:
            _warn(self._tracked.log(history))

    def show(self, samples: Batch, report: EpochReport) -> None:
        """Add a page of some validation crops with their labels and what the epoch's weights predict."""
        from agr_ray.report.samples import samples_page

        labels = Labels(samples["age"], samples["gender"], samples["race"])
        said = predict(report.model, samples["crop"], report.transform, self._run.job.predict)
        page = samples_page(samples["crop"], labels, said)
        self._writer.add_image("val/samples", page, report.row["epoch"], dataformats="HWC")
        self._upload()

    def _upload(self) -> None:
        self._writer.flush()
        # Through storage, because the run may lie on S3; the files are small.
        for path in Path(self._local.name).iterdir():
            uri, body = self._run.storage.join(self._events, path.name), path.read_bytes()
            self._patience.call(partial(self._run.storage.write, uri, body))


def _publish(run: Run, result: Result, console: Console) -> str:
    """Copy the best and the last checkpoint out of Ray's folder, mark the run as finished, return the best's URI."""
    from agr_ray.report.curves import curves_png  # here, because matplotlib is of no use to workers

    last = result.checkpoint
    best = result.get_best_checkpoint(OBJECTIVE, "min")
    assert last is not None
    assert best is not None
    for name, checkpoint in (("best", best), ("last", last)):
        with checkpoint.as_directory() as directory:
            run.storage.upload_tree(directory, run.storage.join(run.uri, name), overwrite=True)
            state = load_train_state(Path(directory))
    # Again, for a run that was killed between its last checkpoint and its last line of history.
    _write_history(run, state["history"])
    curves = curves_png(state["history"], run.uri)
    run.storage.write(run.storage.join(run.uri, "history.png"), curves)
    _write_record(run, state["finished"])
    best_uri = run.storage.join(run.uri, "best")
    tracked, problem = _tracked_again(run)
    if tracked is not None:
        with TemporaryDirectory() as temporary:
            files = {"history.png": curves, CARD: run.storage.read(run.storage.join(best_uri, CARD))}
            for name, body in files.items():
                Path(temporary, name).write_bytes(body)
            problem = tracked.log(state["history"]) or tracked.finish([str(Path(temporary, name)) for name in files])
    if problem:
        console.print(f"warning: {problem}", highlight=False, markup=False, soft_wrap=True)
    return best_uri


def _tracked(run: Run) -> TrackedRun | None:
    """Return the run in MLflow, made there if need be; None where none is asked for."""
    uri = run.job.train.mlflow_uri
    return TrackedRun(uri, run.uri, _settings(run.job)) if uri else None


def _tracked_again(run: Run) -> tuple[TrackedRun | None, str]:
    """Do what `_tracked` does once training has begun, when a server that is away is no more than a warning."""
    try:
        return _tracked(run), ""
    except ConfigError as error:
        return None, str(error)


def _settings(job: TrainJob) -> dict[str, Any]:
    """Return what the run is told of learning, by section: nothing of where it runs, nor of how to get there."""
    return job.model_dump(mode="json", include=set(_SECTIONS), exclude={"train": {"mlflow_uri"}})


def _write_history(run: Run, history: list[Row]) -> None:
    table = pa.Table.from_pylist(history, schema=HISTORY)
    run.storage.write_table(table, run.storage.join(run.uri, "history.parquet"))


def _write_record(run: Run, finished: str) -> None:
    record = {
        "finished": finished,
        "settings_digest": run.settings_digest,
        # An address may hold a password.
        "config": run.job.model_dump(mode="json", exclude={"new_run": True, "dry_run": True, "train": {"mlflow_uri"}}),
        "data": run.data,
        "git_commit": run.git_commit,
    }
    run.storage.write(run.storage.join(run.uri, "run.json"), (json.dumps(record, indent=2) + "\n").encode())


def _git_commit() -> str:
    """Return the commit of the code, with a + where it was changed since; empty outside a checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _say(line: str) -> None:
    """Write a line that Ray passes on to the driver's terminal; in Ray Train's workers `print` writes twice."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _warn(problem: str) -> None:
    if problem:
        _say(f"warning: {problem}")


def _epoch_line(report: EpochReport, num_epochs: int) -> str:
    row = report.row
    parts = [f"epoch {row['epoch']}/{num_epochs} done in {row['epoch_s']:.0f} s", f"loss {row['train_loss']:.3f}"]
    for name, label, scale, unit in (
        ("val_age_mae_years", "val age MAE", 1, " years"),
        ("val_gender_accuracy", "gender", 100, " %"),
        ("val_race_accuracy", "race", 100, " %"),
        (OBJECTIVE, "objective", 1, ""),
    ):
        if row[name] is not None:
            parts.append(f"{label} {row[name] * scale:.{3 if not unit else 2}f}{unit}")
    parts.append(f"{row['samples_per_s']:.0f} samples/s, {row['data_wait_share']:.0%} waiting for data")
    return ", ".join(parts) + (" *" if report.is_best else "")


def _print_history(console: Console, storage: Storage, uri: str) -> None:
    history = storage.read_table(storage.join(uri, "history.parquet")).to_pylist()
    best = min(history, key=lambda row: row[OBJECTIVE] if row[OBJECTIVE] is not None else -row["epoch"])
    table = Table("", "epoch", "age MAE, years", "gender", "race", "objective", title="validation")
    for label, row in (("best", best), ("last", history[-1])):
        shown = [row["val_age_mae_years"], row["val_gender_accuracy"], row["val_race_accuracy"], row[OBJECTIVE]]
        table.add_row(label, str(row["epoch"]), *("" if value is None else f"{value:.3f}" for value in shown))
    console.print(table)
    total_s = sum(row["epoch_s"] for row in history)
    console.print(f"{len(history)} epochs in {total_s / 60:.1f} minutes; checkpoint: {uri}/best", soft_wrap=True)

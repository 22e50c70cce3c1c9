"""One worker of a training run: the loop of `learn.loop` in a process of Ray Train."""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from torch import Tensor, nn

from agr_ray.config import TrainConfig
from agr_ray.labels import Labels
from agr_ray.learn.batches import Batch
from agr_ray.learn.context import EpochReport, Snapshot
from agr_ray.learn.history import Row
from agr_ray.learn.loop import train as train_loop
from agr_ray.learn.monitor import NonFiniteLossError
from agr_ray.learn.progress import Progress
from agr_ray.learn.resources import MIN_VAL_BATCH, max_kept_rows
from agr_ray.learn.run import (
    CHECKPOINTS,
    FAILURE,
    OBJECTIVE,
    OBJECTIVE_MEANING,
    Run,
    settings,
    tracked_again,
    write_history,
)
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.models.checkpoint_network import load_network, load_train_state, save_checkpoint
from agr_ray.predict.attributes import AttributePredictor
from agr_ray.runtime.metrics import Metrics
from agr_ray.runtime.ray_compat import machine_cpus, print_for_user
from agr_ray.runtime.training.fence import Fence
from agr_ray.runtime.training.interruptible import StopRequest
from agr_ray.runtime.training.shard_batches import ShardBatches
from agr_ray.storage.outgoing import delete_leftovers, outgoing_folder
from agr_ray.storage.retry import Retry

PROGRESS_EVERY_S: Final = 10.0
NUM_SAMPLES: Final = 24
"""Crops on the page of sample predictions."""
COLLECTIVE_MARGIN_S: Final = 1800.0
NOT_VALIDATED: Final = 1e30
"""Objective of a checkpoint that is only for resuming, so that it is never the best."""


def work(config: dict[str, Any]) -> None:
    """Run one worker."""
    run: Run = config["run"]
    fence: Fence = config["fence"]
    logging.disable(logging.INFO)  # Ray Train logs every report as a page
    retry = Retry(run.job.train.outage_s)
    with TemporaryDirectory() as temporary:
        directory = Path(temporary, "checkpoint")
        checkpoint = ray.train.get_checkpoint()
        folder = "initial" if checkpoint is None else f"{CHECKPOINTS}/{Path(checkpoint.path).name}"
        uri = run.storage.join(run.uri, folder)
        retry.call(lambda: run.storage.download_tree(uri, str(directory)))
        model = load_network(read_checkpoint(directory))
        resume = None if checkpoint is None else load_train_state(directory)
    epochs_done = resume["epoch"] if resume else 0
    context = RayContext(run, fence, config["stop_request"], config["board"], retry, epochs_done)
    torch.set_num_threads(context.num_threads)
    if context.rank == 0:
        context.metrics.training_begins()
        event = "starting"
        if resume is not None:
            steps = f" and {resume['partial_epoch']['num_steps']} steps" if "partial_epoch" in resume else ""
            event = f"resuming after epoch {resume['epoch']}{steps}"
        context.say(f"{event}, {_workers(context.world_size)}")
        if run.num_val_rows:
            context.say(f"{OBJECTIVE_MEANING}; * after an epoch: the best so far")
    try:
        with context.metrics.kept():
            train_loop(context, model, run.transform, run.job, run.baseline, run.num_train_rows, resume)
    except NonFiniteLossError as error:
        # Not a failure to Ray, because a restart would only fail again. The worker whose batch it was knows the rows.
        if error.image_ids is not None:
            text = "\n".join([str(error), *error.image_ids])
            uri = run.storage.join(run.uri, FAILURE)
            retry.call(fence.check)
            retry.call(lambda: run.storage.write(uri, text.encode()))


def collective_timeout_s(train: TrainConfig) -> float:
    """Return how long workers wait for each other, seconds: one may be waiting for storage."""
    return train.outage_s + COLLECTIVE_MARGIN_S


class RayContext:
    """`learn.loop.Context` in one of Ray Train's workers.

    Args:
        run: what is trained.
        fence: checks that the driver still holds the run's lock.
        stop_request: that the driver may make.
        board: handle of the `Board` that the driver's terminal shows; None: there is no terminal, so lines are printed.
        retry: for requests to storage.
        epochs_done: epochs finished before this process started.
    """

    def __init__(
        self, run: Run, fence: Fence, stop_request: StopRequest, board: Any, retry: Retry, epochs_done: int
    ) -> None:
        self._run = run
        self._fence = fence
        self._stop_request = stop_request
        self._board = board
        self.metrics = Metrics("train", run.uri)
        train = run.job.train
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.num_threads = train.threads_per_worker or max(1, machine_cpus() // context.get_local_world_size())
        # Small tensors are summed on the CPU, whatever the gradients' backend.
        is_gloo = self.world_size == 1 or torch.distributed.get_backend() == "gloo"
        timeout = datetime.timedelta(seconds=collective_timeout_s(train))
        self._cpu_group: Any = None if is_gloo else torch.distributed.new_group(backend="gloo", timeout=timeout)
        # All workers stream or none does, because workers that share a dataset must iterate over it together. So the
        # condition is the same for all. Validation shares may be unequal.
        max_rows = max_kept_rows(train, run.transform)
        self._train = ShardBatches(
            ray.train.get_dataset_shard("train"),
            train.batch_size,
            keep=run.num_train_rows / self.world_size <= max_rows,
            shuffle_rows=train.shuffle_rows,
            seed=(train.seed, self.rank),
            sampler=run.sampler,
            device=self.device,
            rank=self.rank,
            world_size=self.world_size,
        )
        self._val = ShardBatches(
            ray.train.get_dataset_shard("val"),
            max(train.batch_size // self.world_size, MIN_VAL_BATCH),
            keep=run.num_val_rows <= max_rows,
            device=self.device,
        )
        self._retry = retry
        self._logs = RunLogs(run, fence, retry, epochs_done) if self.rank == 0 else None
        self._sending = threading.Semaphore()
        """One checkpoint is uploaded at a time, so the disk holds no more, and a kill costs at most two epochs."""
        if context.get_local_rank() == 0:
            delete_leftovers(run.uri)
        self._samples: Batch | None = None
        self._shown = time.monotonic()

    def train_batches(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        """Iterate over this worker's share, in an order drawn from seed, rank, epoch and `steps_done`."""
        return self._train.epoch(epoch, steps_done)

    def val_batches(self) -> Iterator[Batch]:
        """Iterate over this worker's share of validation; the first worker keeps some crops to show."""
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
        """Write a checkpoint and the history; all workers wait for each other here."""
        row = dict(report.row)
        if row[OBJECTIVE] is None:
            row[OBJECTIVE] = -float(row["epoch"])  # no validation: the last epoch counts as the best
        else:
            row[OBJECTIVE] += 1e-12 * row["epoch"]  # of equal epochs, the first is the best; Ray would take the last
        if self._logs is None:
            ray.train.report(row)
            return
        metrics = {"epoch": row["epoch"], "val": report.metrics}
        # Training continues during the upload; Ray resumes from the checkpoint once the upload is complete.
        self._keep(report, row, metrics, CheckpointUploadMode.ASYNC)
        self._logs.write(report.row, report.train_state()["history"])
        if report.finished and self._samples is not None:
            self._logs.show(self._samples, report)
        self.metrics.epoch(report.row)
        self.say(_epoch_line(report, self._run.job.train.epochs))

    def must_save(self) -> bool:
        """Ask whether the driver is about to stop the workers, or the machine of one is about to be preempted."""
        is_stopping = torch.tensor([float(self.rank == 0 and self._stop_request.is_made())])
        # Ray's question is a barrier, so all workers must come to it or none.
        return bool(self.all_reduce_sum(is_stopping)[0] > 0) or ray.train.get_preemption_info() is not None

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint that is only for resuming, and return once it is uploaded."""
        row = {OBJECTIVE: NOT_VALIDATED}
        if self._logs is None:
            ray.train.report(row)
            return
        self._keep(snapshot, row, {}, CheckpointUploadMode.SYNC)
        # Once Ray's list of checkpoints has it; a run resumes only from those.
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        self._stop_request.is_met()
        self.say(f"saved a checkpoint of epoch {snapshot.epoch} after {snapshot.num_steps} steps")

    def _keep(
        self, state: EpochReport | Snapshot, row: Row, metrics: Mapping[str, Any], mode: CheckpointUploadMode
    ) -> None:
        """Write a checkpoint to the disk, and have Ray Train upload it and then delete it from the disk."""
        run = self._run
        self._sending.acquire()
        directory = outgoing_folder(run.uri)
        save_checkpoint(
            directory,
            state.model,
            state.transform,
            pipeline=run.pipeline,
            train_state=state.train_state(),
            train_images=run.train_images,
            data=run.data,
            metrics=metrics,
            config=settings(run.job),
            git_commit=run.git_commit,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        ray.train.report(
            row,
            checkpoint=Checkpoint.from_directory(str(directory)),
            checkpoint_upload_mode=mode,
            checkpoint_upload_fn=self._upload,
            delete_local_checkpoint_after_upload=True,
        )

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        storage, uri = self._run.storage, self._run.storage.join(self._run.uri, f"{CHECKPOINTS}/{name}")
        try:
            self._retry.call(self._fence.check)
            self._retry.call(lambda: storage.upload_tree(checkpoint.path, uri, overwrite=True))
        finally:
            self._sending.release()
        filesystem, path = storage.arrow_filesystem(uri)
        return Checkpoint(path, filesystem)

    def progress(self, progress: Progress) -> None:
        """Put the progress on the board, or print a line every `PROGRESS_EVERY_S`."""
        if self.rank:
            return
        self.metrics.training(progress)
        if self._board is not None:
            self._board.put.remote(progress)  # nobody waits for it, so it may fail
            return
        now = time.monotonic()
        if now - self._shown >= PROGRESS_EVERY_S:
            self._shown = now
            self.say(progress.line())

    def say(self, line: str) -> None:
        """Print a line, unless the run is quiet."""
        if not self._run.quiet:
            print_for_user(line)


class RunLogs:
    """TensorBoard's event files, history.parquet and MLflow, written by one worker after every epoch."""

    def __init__(self, run: Run, fence: Fence, retry: Retry, epochs_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        self._fence = fence
        self._retry = retry
        self._events = run.storage.join(run.uri, "tensorboard")
        self._local = TemporaryDirectory()
        # TensorBoard drops earlier values of epochs that are repeated.
        self._writer = SummaryWriter(self._local.name, purge_step=epochs_done + 1)
        self._tracked, problem = tracked_again(run)
        _warn(problem)

    def write(self, row: Row, history: list[Row]) -> None:
        """Add the row of an epoch."""
        self._retry.call(self._fence.check)
        self._retry.call(lambda: write_history(self._run, history))
        for name, value in row.items():
            if value is not None and name != "epoch":
                self._writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        self._upload()
        if self._tracked is not None:
            _warn(self._tracked.log(history))

    def show(self, samples: Batch, report: EpochReport) -> None:
        """Add a page of some validation crops with their labels and predictions."""
        from agr_ray.report.samples import samples_page

        labels = Labels.from_arrays(report.model.space, samples)
        predictor = AttributePredictor(report.model, report.transform, self._run.job.predict)
        page = samples_page(samples["crop"], labels, predictor.predict(samples["crop"], samples["pose"]))
        self._writer.add_image("val/samples", page, report.row["epoch"], dataformats="HWC")
        self._upload()

    def _upload(self) -> None:
        self._writer.flush()
        # Through storage, because the run may lie on S3; the files are small.
        for path in Path(self._local.name).iterdir():
            uri, body = self._run.storage.join(self._events, path.name), path.read_bytes()
            self._retry.call(partial(self._run.storage.write, uri, body))


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _warn(problem: str) -> None:
    if problem:
        print_for_user(f"warning: {problem}")


def _epoch_line(report: EpochReport, num_epochs: int) -> str:
    row = report.row
    parts = [f"epoch {row['epoch']}/{num_epochs} done in {row['epoch_s']:.0f} s", f"loss {row['train_loss']:.3f}"]
    is_ranged = row["val_age_mae_years"] is None  # no row of validation has an exact age
    for name, label, scale, unit in (
        ("val_age_mae_years", "val age MAE", 1, " years"),
        *((("val_age_distance_years", "val age outside its range by", 1, " years"),) if is_ranged else ()),
        ("val_gender_accuracy", "gender", 100, " %"),
        ("val_race_accuracy", "race", 100, " %"),
        (OBJECTIVE, "objective", 1, ""),
    ):
        if row[name] is not None:
            parts.append(f"{label} {row[name] * scale:.{3 if not unit else 2}f}{unit}")
    parts.append(f"{row['samples_per_s']:.0f} samples/s, {row['data_wait_share']:.0%} waiting for data")
    return ", ".join(parts) + (" *" if report.is_best else "")

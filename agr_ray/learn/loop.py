"""The training loop. It does not depend on the source of the batches, the number of ranks, or the kinds of heads.

    for each epoch: train_batches -> augment -> network -> loss -> step; val_batches -> metrics; report

Ranks may have different numbers of batches. Before each step they add up their rows and labels, so all know whether any
rank has data, and the divisors of the masked means. A rank without data takes part with weight zero. Once per epoch,
ranks also add up losses, running statistics and validation metrics.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from agr_ray.config import TrainJob
from agr_ray.evaluation.metrics import Baseline
from agr_ray.learn.batches import next_batch, num_rows, targets_of
from agr_ray.learn.context import Context, EpochReport, Snapshot
from agr_ray.learn.history import Row, history_row
from agr_ray.learn.losses import label_counts, weighted_loss
from agr_ray.learn.mix import draw_mix
from agr_ray.learn.monitor import Monitor, NonFiniteLossError
from agr_ray.learn.progress import Progress
from agr_ray.learn.running import running_metrics
from agr_ray.learn.schedule import epoch_seed, epoch_side_px, learning_rate, plateau_cuts, steps_per_epoch
from agr_ray.learn.step import Stepper
from agr_ray.learn.validate import validate
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.precision import allow_tf32
from agr_ray.models.transform import Transform

_PROGRESS_S: Final = 1.0
_STEPS_PER_LOSS_CHECK: Final = 25
"""On a GPU, which must finish its work before a loss can be read."""
_CHECK_EVERY_S: Final = 5.0
"""Seconds between calls of `Context.must_save`."""
_CUDA: Final = "cuda"


def train(
    context: Context,
    model: MultiTaskNet,
    transform: Transform,
    job: TrainJob,
    baseline: Baseline,
    num_train_rows: int,
    resume: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Train until the epochs are done or validation stops improving.

    The same state, data and seed give the same weights, whether or not the run was interrupted between epochs. The
    learning rate is a function of progress and history, and the random numbers of an epoch depend only on (seed, epoch,
    rank). An epoch that is resumed in the middle has as many steps as any other, but the rows of its remaining steps
    are drawn again.

    Args:
        context: provides batches and receives reports.
        model: with its initial weights, or those of the checkpoint to resume from. Afterwards it has the last epoch's
            raw weights, on the context's device.
        transform: of the model.
        job: only its sections model, loss, augment, train and predict are used.
        baseline: constant baseline of the training labels; the objective is relative to it (`metrics.objective`).
        num_train_rows: rows of all ranks in one epoch, to predict the number of steps; may be slightly off.
        resume: `EpochReport.train_state()` of the same checkpoint; None: start from the beginning.

    Returns:
        The rows of all epochs, including those before an interruption.

    Raises:
        NonFiniteLossError: a loss is not finite; raised on all ranks.
    """
    return _Loop(context, model, transform, job, baseline, num_train_rows, resume).run()


@dataclass
class _Epoch:
    """Sums over the training part of one epoch, over all ranks unless stated otherwise."""

    num_rows: int = 0
    num_local_rows: int = 0
    """Rows of this rank since this process began or resumed the epoch."""
    num_steps: int = 0
    wait_s: float = 0.0
    """Time spent waiting for batches: of this rank; after the epoch, the mean over ranks."""
    train_s: float = 0.0
    loss: float = math.nan
    task_totals: list[float] = dataclasses.field(default_factory=list)
    """Sum of losses of each task, then number of labels of each. During the epoch, only of the steps before this
    process resumed it. Empty: no steps."""


class _Loop:
    """State of one call of `train`."""

    def __init__(
        self,
        context: Context,
        model: MultiTaskNet,
        transform: Transform,
        job: TrainJob,
        baseline: Baseline,
        num_train_rows: int,
        resume: Mapping[str, Any] | None,
    ) -> None:
        self.context = context
        self.transform = transform
        self.job = job
        self.baseline = baseline
        self.num_train_rows = num_train_rows
        self.steps_per_epoch = steps_per_epoch(num_train_rows, job.train)
        allow_tf32(context.device, job.train.tf32)
        if job.train.sync_batch_norm:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # in place, names stay
        self.model = model.to(context.device).to(memory_format=torch.channels_last)
        self.heads = model.heads_by_task
        state = dict(resume or {})
        self.epoch = int(state.get("epoch", 0))
        self.step = int(state.get("step", 0))
        self.best_objective = float(state.get("best_objective", math.inf))
        self.stale_epochs = int(state.get("stale_epochs", 0))
        self.finished = str(state.get("finished", ""))
        self.history: list[Row] = [dict(row) for row in state.get("history", [])]
        self.partial_epoch = _Epoch(**state.get("partial_epoch", {}))  # interrupted in the middle
        self.has_saved = False
        self.last_check_s = time.monotonic()
        self.stepper = Stepper(context, self.model, job, state, is_frozen=self.epoch < job.train.freeze_epochs)

    def run(self) -> list[Row]:
        while not self.finished and self.epoch < self.job.train.epochs:
            start = time.perf_counter() - self.partial_epoch.train_s
            self.epoch += 1
            epoch = self._train_epoch()
            self.stepper.average_statistics(epoch.num_local_rows)
            model = self.stepper.kept
            metrics, val_loss, num_val_rows = validate(
                self.context,
                model,
                self._transform(),
                self.job.loss,
                self.job.predict,
                self.baseline,
                f"epoch {self.epoch}, after step {self.step}",
            )
            values = {
                "epoch": self.epoch,
                "step": self.step,
                "lr": self._lr(epoch.num_steps),
                "train_loss": epoch.loss,
                "val_loss": val_loss,
                "num_train_rows": epoch.num_rows,
                "num_val_rows": num_val_rows,
                "epoch_s": time.perf_counter() - start,
                "samples_per_s": epoch.num_rows / epoch.train_s,
                "data_wait_share": epoch.wait_s / epoch.train_s,
            }
            row = history_row(values, metrics, self.model.tasks)
            is_best = self._judge(row["val_objective"])
            self.history.append(row)
            self.context.report(
                EpochReport(row, is_best, self.finished, metrics, model, self._transform(), self._state)
            )
        return self.history

    def _train_epoch(self) -> _Epoch:
        """Take all steps of one epoch."""
        context, device, num_tasks = self.context, self.context.device, len(self.heads)
        epoch, self.partial_epoch = self.partial_epoch, _Epoch()
        steps_before, train_s_before = epoch.num_steps, epoch.train_s
        seed = epoch_seed(self.job.train.seed, self.epoch, context.rank, steps_before)
        torch.manual_seed(seed)  # dropout
        generator = torch.Generator().manual_seed(seed)
        self.stepper.begin_epoch(is_frozen=self.epoch <= self.job.train.freeze_epochs)
        totals, running = torch.zeros(2 * num_tasks, device=device), torch.zeros(2 * num_tasks, device=device)
        check_every = _STEPS_PER_LOSS_CHECK if device.type == _CUDA else 1
        monitor = Monitor(self.epoch, self.model.tasks, check_every)
        batches = context.train_batches(self.epoch, steps_before)
        start = shown = time.perf_counter()
        first_step: tuple[float, int] | None = None
        while True:
            wait_start = time.perf_counter()
            is_done = steps_before > 0 and epoch.num_steps >= self.steps_per_epoch
            batch = None if is_done else next_batch(batches)
            epoch.wait_s += time.perf_counter() - wait_start
            targets = targets_of(self.heads, batch)
            mix = None
            if batch is None:
                monitor.flush()
            else:
                # Before the ranks add up their labels, because it sets the weight of each.
                mix = draw_mix(num_rows(batch), self._transform().image_size, self.job.augment, generator)
            is_short = num_rows(batch) < 2 * self.job.train.grad_accum_steps
            is_check_due = context.rank == 0 and time.monotonic() - self.last_check_s >= _CHECK_EVERY_S
            counts = torch.tensor([num_rows(batch), is_short, bool(monitor.problem), is_check_due], dtype=torch.float32)
            counts = context.all_reduce_sum(torch.cat([counts, label_counts(self.heads, targets, mix)]))
            num_all_rows, num_short, num_problems, must_check = counts[:4].tolist()
            if num_problems:
                raise self._not_finite(monitor)
            if not num_all_rows:
                break
            if self.job.train.sync_batch_norm and num_short:
                self.stepper.wrapped.eval()  # all ranks normalise together, in equally many micro-batches, or none
            self.step += 1
            lr = self._lr(epoch.num_steps)
            tasks, score = self.stepper.step(
                batch, targets, mix, counts[4:], self._transform(), lr, generator, monitor, self.step
            )
            epoch.num_steps += 1
            totals += torch.cat([tasks.sums, tasks.counts])
            running += score
            epoch.num_rows += int(num_all_rows)
            epoch.num_local_rows += num_rows(batch)
            now = time.perf_counter()
            first_step = first_step or (now, epoch.num_rows)
            if must_check:
                self.last_check_s = time.monotonic()
                epoch.train_s = train_s_before + now - start
                self._save_if_needed(epoch, totals, monitor)
            if now - shown >= _PROGRESS_S:
                shown = now
                steady_s, steady_rows = now - first_step[0], epoch.num_rows - first_step[1]
                steady_rate = steady_rows / steady_s if steady_rows else None
                context.progress(self._progress(epoch, totals, running, train_s_before + now - start, steady_rate))
        for _ in batches:  # the surplus rows of a resumed epoch, so that all crops are loaded into memory
            pass
        epoch.train_s = max(train_s_before + time.perf_counter() - start, 1e-9)
        return self._summed(epoch, totals)

    def _not_finite(self, monitor: Monitor) -> NonFiniteLossError:
        """Return the error of this rank, once all ranks know that there is one.

        A bad gradient of one rank reaches the weights of all ranks, and losses may be checked only some steps later. So
        the earliest bad batch is the cause.
        """
        context = self.context
        firsts = torch.zeros(context.world_size, dtype=torch.float64)
        firsts[context.rank] = monitor.bad_step
        firsts = context.all_reduce_sum(firsts)
        if monitor.problem and monitor.bad_step == firsts[firsts > 0].min():
            return NonFiniteLossError(monitor.problem, monitor.image_ids)
        return NonFiniteLossError(f"epoch {self.epoch}: the loss of another rank is not finite", None)

    def _summed(self, epoch: _Epoch, totals: Tensor) -> _Epoch:
        """Return the epoch with its sums over all ranks."""
        waited = torch.tensor([epoch.wait_s], dtype=torch.float64)
        *summed, wait_s = self.context.all_reduce_sum(torch.cat([totals.double().cpu(), waited])).tolist()
        earlier = epoch.task_totals or [0.0] * len(summed)
        task_totals = [before + now for before, now in zip(earlier, summed, strict=True)]
        wait_s /= self.context.world_size
        return dataclasses.replace(epoch, task_totals=task_totals, wait_s=wait_s, loss=self._weighted(task_totals))

    def _save_if_needed(self, epoch: _Epoch, totals: Tensor, monitor: Monitor) -> None:
        """Save a checkpoint, once, if the run or a machine is about to be stopped. Called on all ranks."""
        if self.has_saved or not self.context.must_save():
            return
        monitor.flush()
        if self.context.all_reduce_sum(torch.tensor([float(bool(monitor.problem))]))[0] > 0:
            return  # a loss of some rank is not finite, and the next step raises the error on all ranks
        self.has_saved = True
        self.stepper.average_statistics(epoch.num_local_rows)
        partial = dataclasses.replace(self._summed(epoch, totals), num_local_rows=0)

        def state() -> dict[str, Any]:
            return self._state() | {"epoch": self.epoch - 1, "partial_epoch": dataclasses.asdict(partial)}

        self.context.save(Snapshot(self.epoch, epoch.num_steps, self.stepper.kept, self._transform(), state))

    def _judge(self, score: float | None) -> bool:
        """Count epochs without improvement, decide whether this one is the last, and return whether it is the best."""
        config = self.job.train
        is_best = score is None or score < self.best_objective
        if score is not None:
            self.stale_epochs = 0 if is_best else self.stale_epochs + 1
            self.best_objective = min(score, self.best_objective)
        if config.early_stopping_patience and self.stale_epochs >= config.early_stopping_patience:
            self.finished = "early_stopping"
        elif self.epoch >= config.epochs:
            self.finished = "epochs"
        return is_best

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            **self.stepper.state(),
            "best_objective": self.best_objective,
            "stale_epochs": self.stale_epochs,
            "finished": self.finished,
            "history": self.history,
        }

    def _lr(self, steps_done: int) -> float:
        share = min(steps_done / self.steps_per_epoch, 1.0)
        num_cuts = plateau_cuts((row["val_objective"] for row in self.history), self.job.train)
        return learning_rate(self.epoch - 1 + share, self.job.train, num_cuts)

    def _transform(self) -> Transform:
        """Return this epoch's transform, whose images may be smaller."""
        side = epoch_side_px(self.epoch, self.job.train, self.transform.image_size)
        return dataclasses.replace(self.transform, image_size=side)

    def _progress(
        self, epoch: _Epoch, totals: Tensor, running: Tensor, elapsed_s: float, steady_rate: float | None
    ) -> Progress:
        """Return the progress of the epoch; waits for the device."""
        config, largest = self.job.train, self.transform.image_size
        pixels = [epoch_side_px(each, config, largest) ** 2 for each in range(self.epoch, config.epochs + 1)]
        return Progress(
            epoch=self.epoch,
            num_epochs=self.job.train.epochs,
            num_samples=epoch.num_rows,
            num_samples_total=self.num_train_rows,
            loss=self._weighted(totals.tolist()),
            running=running_metrics(self.heads, running.tolist()),
            samples_per_s=epoch.num_rows / elapsed_s,
            data_wait_share=epoch.wait_s / elapsed_s,
            num_later_samples=sum(pixels[1:]) / pixels[0] * self.num_train_rows,
            steady_samples_per_s=steady_rate,
        )

    def _weighted(self, sums_and_counts: list[float]) -> float:
        num_tasks = len(self.heads)
        return weighted_loss(self.job.loss, self.heads, sums_and_counts[:num_tasks], sums_and_counts[num_tasks:])

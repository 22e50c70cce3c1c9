"""The training loop, written against a small context: it doesn't know where batches come from or who else trains.

    for each epoch: train_batches -> augment -> network -> loss -> step; val_batches -> metrics; report

`LocalContext` runs it in this process on arrays. Ranks may be given different numbers of batches: before
every step they add up their rows and labels, so all know whether anyone has data, and by what to divide
the masked means; a rank without data takes part with weight zero. All else that ranks exchange is one
reduction after training and one after validation.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agr_ray.config import TrainConfig, TrainJob
from agr_ray.evaluation.groups import GroupSums, worst_group_age_mae
from agr_ray.evaluation.metrics import Baseline, MetricSums, objective
from agr_ray.labels import Labels
from agr_ray.learn.augment import augment
from agr_ray.learn.losses import Targets, TaskSums, first_log_variances, label_counts, loss_weights, multi_task_loss
from agr_ray.learn.mix import Mix, draw_mix, mix_images
from agr_ray.learn.optimise import Ema, build_optimizer, learning_rate, plateau_cuts, set_learning_rate
from agr_ray.learn.progress import Progress
from agr_ray.learn.running import running_sums
from agr_ray.learn.sampling import Sampler
from agr_ray.models.network import TASKS, MultiTaskNet, Outputs
from agr_ray.models.precision import allow_tf32, autocast, grad_scaler
from agr_ray.models.predictions import Predictions
from agr_ray.models.transform import Transform
from agr_ray.predict.forward import average, infer, to_nchw
from agr_ray.schema import HISTORY

Batch: TypeAlias = Mapping[str, Any]
"""crop (n, stored, stored, 3) uint8, age (n,) float32, gender and race (n,) int64; arrays or CPU tensors.

Where there is an image_id, (n,) words, a loss that is not finite names its rows by it. Where there is a set_index, (n,)
int64, a sampler may draw by it: which of several prepared sets a row is from."""

Row: TypeAlias = dict[str, Any]
"""One row of `schema.HISTORY`."""

_PROGRESS_S: Final = 1.0
_CHECK_EVERY: Final = 25
_ASK_EVERY_S: Final = 5.0
"""How often the context is asked whether a machine will be taken away."""
_NAMED_ROWS: Final = 8
_CUDA: Final = "cuda"


class NonFiniteLossError(Exception):
    """The loss is no number: names the epoch, the step, each task's loss and the rows. The run stops; nothing is saved.

    Raised on all ranks.
    """

    def __init__(self, said: str, image_ids: Sequence[str] | None) -> None:
        some = ", ".join((image_ids or ())[:_NAMED_ROWS])
        more = len(image_ids or ()) - _NAMED_ROWS
        super().__init__(
            said + (f"; its batch holds image_id {some}" if some else "") + (f" and {more} more" if more > 0 else "")
        )
        self.image_ids = image_ids
        """Of the batch, as far as batches have ids; None: the batch was another rank's, which says more."""


@dataclass(frozen=True)
class EpochReport:
    """What the context learns after each epoch. Every rank has the same; one of them should save."""

    row: Row
    is_best: bool
    """Whether no epoch before had a better objective (always, without validation)."""
    finished: str
    """Why this epoch is the last: `epochs`, `early_stopping`; empty: it isn't."""
    metrics: Mapping[str, Any]
    """On validation: `MetricSums.to_json`, with `baseline` of the same shape and `groups` by `GroupSums.to_json`."""
    model: MultiTaskNet
    """Whose weights were validated and should be kept: the moving average where there is one."""
    transform: Transform
    """With which they were trained and validated."""
    train_state: Callable[[], dict[str, Any]]
    """Build what `train(resume=...)` takes: plain values and tensors that the next step changes, so save at once."""


@dataclass(frozen=True)
class Snapshot:
    """What is kept of an epoch that may not come to its end. Every rank has the same; one of them should save."""

    epoch: int
    num_steps: int
    """Of the epoch, so far."""
    model: MultiTaskNet
    transform: Transform
    train_state: Callable[[], dict[str, Any]]
    """As in `EpochReport`."""


class Context(Protocol):
    """Where the loop runs."""

    @property
    def rank(self) -> int:
        """Which of the workers this is, from 0."""

    @property
    def world_size(self) -> int:
        """How many workers there are."""

    @property
    def device(self) -> torch.device:
        """Where this worker computes."""

    def train_batches(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        """Iterate over this rank's share of one epoch (from 1), shuffled anew for each.

        An epoch that was left after some steps is gone on with in another order; the loop takes as much as is left.
        """

    def val_batches(self) -> Iterator[Batch]:
        """Iterate over this rank's share of validation; over all ranks each row comes once."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Add up over ranks. The tensor is a small one on the CPU, and so is the result."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Make backward average the gradients over ranks (DDP with broadcast_buffers=False, or nothing).

        Batch norm's statistics are averaged by the loop, once an epoch.
        """

    def report(self, report: EpochReport) -> None:
        """Keep a checkpoint, log the row."""

    def must_save(self) -> bool:
        """Say whether a machine will soon be taken away, so that a checkpoint should be kept at once.

        Asked on all ranks at the same step, every few seconds, and answered alike on all.
        """

    def save(self, snapshot: Snapshot) -> None:
        """Keep a checkpoint in the middle of an epoch."""

    def progress(self, progress: Progress) -> None:
        """Show it; called about once a second."""


@dataclass
class LocalContext:
    """One rank in this process, on arrays in memory."""

    train: Batch
    val: Batch
    batch_size: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    on_report: Callable[[EpochReport], None] | None = None
    on_progress: Callable[[Progress], None] | None = None
    rank: int = 0
    world_size: int = 1
    sampler: Sampler | None = None
    """Which rows are drawn, and how often (`TrainConfig.balance`, `data_shares`); None: each once."""

    def train_batches(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        """Iterate over the training arrays in an order drawn by seed and epoch."""
        rng = np.random.default_rng([self.seed, epoch, steps_done])
        if self.sampler is None:
            order = rng.permutation(len(self.train["age"]))
        else:
            order = self.sampler.draw(
                Labels.from_arrays(self.sampler.space, self.train), rng, self.train.get("set_index")
            )
        return batches_of(self.train, order, itertools.repeat(self.batch_size))

    def val_batches(self) -> Iterator[Batch]:
        """Iterate over the validation arrays in their order."""
        return batches_of(self.val, np.arange(len(self.val["age"])), itertools.repeat(self.batch_size))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return it: there are no others."""
        return tensor

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return it: there are no others."""
        return model

    def report(self, report: EpochReport) -> None:
        """Hand it on."""
        if self.on_report is not None:
            self.on_report(report)

    def must_save(self) -> bool:
        """Say no: nobody takes this process away with a notice."""
        return False

    def save(self, snapshot: Snapshot) -> None:
        """Do nothing: never asked to."""

    def progress(self, progress: Progress) -> None:
        """Hand it on."""
        if self.on_progress is not None:
            self.on_progress(progress)


def train(
    context: Context,
    model: MultiTaskNet,
    transform: Transform,
    job: TrainJob,
    baseline: Baseline,
    num_train_rows: int,
    resume: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Train until the epochs are done or validation stops getting better.

    The same state, data and seed give the same weights, whether the run was interrupted between epochs or not: the
    learning rate follows from progress and history, and random numbers, which are drawn anew in each epoch, depend on
    (seed, epoch, rank) alone. An epoch that is gone on with in its middle has as many steps as any other, but draws
    the rows of the steps that are left anew.

    Args:
        context: where batches come from and reports go to.
        model: with its first weights, or those of the checkpoint to resume from; ends with the last epoch's
            raw weights, on the context's device.
        transform: the model's.
        job: sections model, loss, augment, train and predict are read.
        baseline: guesses fitted on the training labels; the objective is relative to them (`metrics.objective`).
        num_train_rows: of all ranks, in one epoch; foresees the number of steps, and a little off does no harm.
        resume: `EpochReport.train_state()` of the same checkpoint; none: begin.

    Returns:
        The rows of all epochs, those before the interruption too.

    Raises:
        NonFiniteLossError: on all ranks.
    """
    return _Run(context, model, transform, job, baseline, num_train_rows, resume).run()


def steps_per_epoch(num_train_rows: int, config: TrainConfig) -> int:
    """Return the optimiser steps of one epoch over the rows of all ranks."""
    return max(1, math.ceil(num_train_rows / config.batch_size))


def epoch_side_px(epoch: int, config: TrainConfig, side_px: int) -> int:
    """Return the side of the images that an epoch, from 1, is trained and validated on, pixels.

    Args:
        epoch: which.
        config: `image_sizes` in equal shares of `epochs`.
        side_px: the model's, which is that of all epochs where there are no others.
    """
    sides = config.image_sizes or (side_px,)
    return sides[-1 - (config.epochs - epoch) * len(sides) // config.epochs]


@dataclass
class _Epoch:
    """What the training part of one epoch adds up."""

    num_rows: int = 0
    """Of all ranks, as everything here without another word."""
    num_local_rows: int = 0
    """Of this rank, since this process began or went on with the epoch."""
    num_steps: int = 0
    wait_s: float = 0.0
    """Mean over ranks, once the epoch has ended."""
    train_s: float = 0.0
    loss: float = math.nan
    task_totals: list[float] = field(default_factory=lambda: [0.0] * 6)
    """Three sums of losses and three counts of labels, of what was done before this process went on."""


class _Run:
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
        state = dict(resume or {})
        self.epoch = int(state.get("epoch", 0))
        self.step = int(state.get("step", 0))
        self.best_objective = float(state.get("best_objective", math.inf))
        self.stale_epochs = int(state.get("stale_epochs", 0))
        self.finished = str(state.get("finished", ""))
        self.history: list[Row] = [dict(row) for row in state.get("history", [])]
        self.running = torch.zeros(6)  # `running_sums` of this rank in this epoch
        self.begun = _Epoch(**state.get("begun", {}))  # an epoch that was left in its middle
        self.has_saved = False
        self.asked = time.monotonic()
        decay = job.train.ema_decay
        # The checkpoint's weights are the average's; the raw ones are in the state.
        self.ema = Ema(self.model, decay, int(state.get("ema_updates", 0))) if decay else None
        if state.get("raw_weights") is not None:
            self.model.load_state_dict(state["raw_weights"])
        self.log_variances: nn.Parameter | None = None
        if job.loss.weighting == "uncertainty":
            first = first_log_variances(job.loss, has_age_bins=job.model.age_head == "distribution")
            self.log_variances = nn.Parameter(state.get("log_variances", first).to(context.device, copy=True))
        self.optimizer = build_optimizer(self.model, job.train, self.log_variances)
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler = grad_scaler(context.device, job.train.precision)
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.wrapped = self._wrap(is_frozen=self.epoch < job.train.freeze_epochs)

    def run(self) -> list[Row]:
        while not self.finished and self.epoch < self.job.train.epochs:
            start = time.perf_counter()
            self.epoch += 1
            epoch = self._train_epoch()
            self._average_batch_norm(epoch)
            kept = self._kept()
            values, val_loss, num_val_rows = self._validate(kept)
            score = objective(values, values["baseline"], self.model.tasks)
            is_best = self._judge(score)
            row: Row = {
                "epoch": self.epoch,
                "step": self.step,
                "lr": self._lr(epoch.num_steps),
                "train_loss": epoch.loss,
                "val_loss": val_loss,
                "val_age_mae_years": values["age"]["mae_years"],
                "val_age_within_5": values["age"]["within_5"],
                "val_gender_accuracy": values["gender"]["accuracy"],
                "val_race_accuracy": values["race"]["accuracy"],
                "val_objective": score,
                "num_train_rows": epoch.num_rows,
                "num_val_rows": num_val_rows,
                "epoch_s": time.perf_counter() - start,
                "samples_per_s": epoch.num_rows / epoch.train_s,
                "data_wait_share": epoch.wait_s / epoch.train_s,
                "val_gender_balanced_accuracy": values["gender"]["balanced_accuracy"],
                "val_race_balanced_accuracy": values["race"]["balanced_accuracy"],
                "val_worst_group_age_mae_years": worst_group_age_mae(values["groups"]),
                "val_balanced_objective": objective(values, values["baseline"], self.model.tasks, balanced=True),
            }
            assert list(row) == HISTORY.names
            self.history.append(row)
            self.context.report(EpochReport(row, is_best, self.finished, values, kept, self._transform(), self._state))
        return self.history

    def _kept(self) -> MultiTaskNet:
        """Return the network that is validated and kept."""
        return self.model if self.ema is None else self.ema.model

    def _wrap(self, is_frozen: bool) -> nn.Module:
        """Let the backbone learn or not, and wrap the model anew: DDP waits for the gradients that it was made with."""
        self.is_frozen = is_frozen
        self.model.backbone.requires_grad_(not is_frozen)
        learner: nn.Module = self.model
        if self.log_variances is not None or self.job.train.compile:
            learner = _Learner(self.model, self.log_variances)
        if self.job.train.compile:
            learner.compile()  # before DDP, which then cuts the graph where it sends gradients off
        return self.context.wrap(learner)

    def _begin_training(self) -> None:
        """Let batch norm and dropout train, but of a frozen backbone."""
        self.wrapped.train()
        if self.is_frozen:
            self.model.backbone.eval()

    def _train_epoch(self) -> _Epoch:
        """Take all steps of one epoch."""
        context, device = self.context, self.context.device
        epoch, self.begun = self.begun, _Epoch()
        steps_before, train_s_before = epoch.num_steps, epoch.train_s
        seed = _seed(self.job.train.seed, self.epoch, context.rank, steps_before)
        torch.manual_seed(seed)  # dropout
        generator = torch.Generator().manual_seed(seed)
        is_frozen = self.epoch <= self.job.train.freeze_epochs
        if is_frozen != self.is_frozen:
            self.wrapped = self.model
            gc.collect()  # DDP is part of reference cycles, and its hooks must not outlive it
            self.wrapped = self._wrap(is_frozen)
        self._begin_training()
        self.running = torch.zeros(6, device=device)
        sums, counts = torch.zeros(3, device=device), torch.zeros(3, device=device)
        monitor = _Monitor(self.epoch, check_every=_CHECK_EVERY if device.type == _CUDA else 1)
        batches = self.context.train_batches(self.epoch, steps_before)
        start = shown = time.perf_counter()
        while True:
            asked = time.perf_counter()
            is_done = steps_before > 0 and epoch.num_steps >= self.steps_per_epoch
            batch = None if is_done else _next(batches)
            epoch.wait_s += time.perf_counter() - asked
            targets = _targets(batch)
            mix = None
            if batch is None:
                monitor.flush()
            else:
                # Before the ranks add up their labels, because it decides how much each counts.
                mix = draw_mix(len(targets.age), self._transform().image_size, self.job.augment, generator)
            is_short = len(targets.age) < 2 * self.job.train.grad_accum_steps
            asks = context.rank == 0 and time.monotonic() - self.asked >= _ASK_EVERY_S
            totals = context.all_reduce_sum(_agreement(targets, mix, is_short, bool(monitor.problem), asks))
            if totals[5] > 0:
                raise self._not_finite(monitor)
            if totals[0] == 0:
                break
            if self.job.train.sync_batch_norm and totals[4] > 0:
                self.wrapped.eval()  # ranks normalise together, in the same number of parts, or not at all
            task_sums, task_counts = self._step(batch, targets, mix, totals[1:4], epoch, generator, monitor)
            sums += task_sums
            counts += task_counts
            epoch.num_rows += int(totals[0])
            epoch.num_local_rows += len(targets.age)
            now = time.perf_counter()
            if totals[6] > 0:
                self.asked = time.monotonic()
                epoch.train_s = train_s_before + now - start
                self._save_if_needed(epoch, torch.cat([sums, counts]), monitor)
            if now - shown >= _PROGRESS_S:
                shown = now
                sofar = torch.cat([sums, counts, self.running])
                context.progress(self._progress(epoch, sofar, train_s_before + now - start))
        for _ in batches:  # of an epoch gone on with, what comes late in its new order; it may be kept in memory
            pass
        epoch.train_s = max(train_s_before + time.perf_counter() - start, 1e-9)
        return self._summed(epoch, torch.cat([sums, counts]))

    def _not_finite(self, monitor: _Monitor) -> NonFiniteLossError:
        """Return the error of this rank, once all ranks know that there is one.

        One rank's bad gradients are all ranks' bad weights a step later, and losses may be looked at only then: the
        batch to blame is the first.
        """
        context = self.context
        firsts = torch.zeros(context.world_size, dtype=torch.float64)
        firsts[context.rank] = monitor.bad_step
        firsts = context.all_reduce_sum(firsts)
        if monitor.problem and monitor.bad_step == firsts[firsts > 0].min():
            return NonFiniteLossError(monitor.problem, monitor.image_ids)
        return NonFiniteLossError(f"epoch {self.epoch}: the loss of another rank is not finite", None)

    def _summed(self, epoch: _Epoch, task_totals: Tensor) -> _Epoch:
        """Return the epoch with what all ranks add up to."""
        waited = torch.tensor([epoch.wait_s], dtype=torch.float64)
        totals = self.context.all_reduce_sum(torch.cat([task_totals.double().cpu(), waited])).tolist()
        task_sums = [before + now for before, now in zip(epoch.task_totals, totals[:6], strict=True)]
        wait_s = totals[6] / self.context.world_size
        return dataclasses.replace(epoch, task_totals=task_sums, wait_s=wait_s, loss=self._weighted(task_sums))

    def _save_if_needed(self, epoch: _Epoch, task_totals: Tensor, monitor: _Monitor) -> None:
        """Keep a checkpoint, once, if a machine will be taken away. All ranks are here."""
        if self.has_saved or not self.context.must_save():
            return
        monitor.flush()
        if self.context.all_reduce_sum(torch.tensor([float(bool(monitor.problem))]))[0] > 0:
            return  # the weights are no numbers on some rank, and the next step says so on all
        self.has_saved = True
        self._average_batch_norm(epoch)
        begun = dataclasses.replace(self._summed(epoch, task_totals), num_local_rows=0)

        def state() -> dict[str, Any]:
            return self._state() | {"epoch": self.epoch - 1, "begun": dataclasses.asdict(begun)}

        self.context.save(Snapshot(self.epoch, epoch.num_steps, self._kept(), self._transform(), state))

    def _step(
        self,
        batch: Batch | None,
        targets: Targets,
        mix: Mix | None,
        counts_total: Tensor,
        epoch: _Epoch,
        generator: torch.Generator,
        monitor: _Monitor,
    ) -> tuple[Tensor, Tensor]:
        """Take one optimiser step, with an image of no label and no weight where this rank has none."""
        device, config = self.context.device, self.job.train
        transform = self._transform()
        if batch is None or len(targets.age) < 2:
            # Batch norm can't be trained on no image, nor on one: let its statistics stand for this step.
            self.wrapped.eval()
        if batch is None:
            side = transform.image_size
            images = torch.zeros(1, 3, side, side, device=device)
            targets = Targets(torch.full((1,), math.nan), torch.full((1,), -1), torch.full((1,), -1))
        else:
            images = augment(to_nchw(batch["crop"], device), transform, self.job.augment, generator)
        if mix is not None:
            mix = mix.to(device)
            images = mix_images(images, mix)
        targets = Targets(*(values.to(device, non_blocking=True) for values in targets))
        set_learning_rate(self.optimizer, self._lr(epoch.num_steps))
        loss, tasks = self._backward(images, targets, mix, counts_total)
        if config.grad_clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip_norm)
        self.step += 1
        epoch.num_steps += 1
        monitor.watch(self.step, loss, tasks.sums, tasks.counts, batch)
        if not monitor.problem:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model)
        self._begin_training()
        return tasks.sums, tasks.counts

    def _backward(
        self, images: Tensor, targets: Targets, mix: Mix | None, counts_total: Tensor
    ) -> tuple[Tensor, TaskSums]:
        """Add up the gradients of this rank's batch, part by part, and return its loss, detached, and its sums."""
        images = images.contiguous(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        slices = _slices(len(images), self.job.train.grad_accum_steps)
        world_size, log_variances = self.context.world_size, self.log_variances
        losses: list[Tensor] = []
        found: list[TaskSums] = []
        for rows in slices:
            with self._exchange(is_last=rows == slices[-1]):
                with autocast(self.context.device, self.job.train.precision):
                    outputs = self.wrapped(images[rows])
                loss, tasks = multi_task_loss(
                    outputs, targets, self.job.loss, counts_total, world_size, log_variances, mix, rows, len(slices)
                )
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
            losses.append(loss.detach())
            found.append(tasks)
            self.running += running_sums(outputs, Targets(*(values[rows] for values in targets)))
        return torch.stack(losses).sum(), TaskSums(*(torch.stack(each).sum(dim=0) for each in zip(*found, strict=True)))

    def _exchange(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Let ranks exchange gradients once a step: after the last part of their batches."""
        if is_last or not isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def _validate(self, model: MultiTaskNet) -> tuple[dict[str, Any], float | None, int]:
        """Return the metrics with the baseline's, the loss (none: no labels), and the rows of all ranks."""
        model.eval()
        device = self.context.device
        space = self.baseline.space
        sums, guesses, groups = MetricSums(space), MetricSums(space), GroupSums(space)
        losses = torch.zeros(6, dtype=torch.float64)
        image_ids: list[str] | None = None
        for batch in self.context.val_batches():
            labels = Labels.from_arrays(space, batch)
            num_rows = len(labels)
            if num_rows == 0:
                continue
            targets = Targets(*(values.to(device) for values in _targets(batch)))
            views = infer(model, to_nchw(batch["crop"], device), self._transform(), self.job.predict)
            _, tasks = multi_task_loss(views[0], targets, self.job.loss, label_counts(targets))
            losses += torch.cat([tasks.sums, tasks.counts]).double().cpu()
            if image_ids is None and not torch.isfinite(losses).all():
                image_ids = _image_ids(batch)
            predictions = average(views)
            sums.update(labels, predictions)
            groups.update(labels, predictions)
            headed = zip(self.baseline.predict(num_rows), predictions, strict=True)
            guesses.update(labels, Predictions(*(g if p is not None else None for g, p in headed)))
        parts = (losses.numpy(), sums.vector, guesses.vector, groups.vector)
        total = self.context.all_reduce_sum(torch.from_numpy(np.concatenate(parts))).numpy()
        ends = np.cumsum([part.size for part in parts])
        _, sums.vector[:], guesses.vector[:], groups.vector[:] = np.split(total, ends[:-1])
        loss = self._weighted(total[:6].tolist()) if total[3:6].any() else None
        if loss is not None and not math.isfinite(loss):
            named = _describe(total[:3].tolist(), total[3:6].tolist())
            said = f"epoch {self.epoch}, after step {self.step}, on validation: loss {loss}: {named}"
            raise NonFiniteLossError(said, image_ids)
        report = {**sums.to_json(), "baseline": guesses.to_json(), "groups": groups.to_json()}
        return report, loss, int(sums.rows[0])

    def _judge(self, score: float | None) -> bool:
        """Count epochs without progress, decide whether to go on, and say whether this one is the best."""
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

    def _average_batch_norm(self, epoch: _Epoch) -> None:
        """Average the running statistics over ranks, by the rows that each saw, and pass them to the average."""
        with torch.no_grad():
            if self.context.world_size > 1:
                statistics = [b for name, b in self.model.named_buffers() if "running_" in name]
                weight = torch.tensor([epoch.num_local_rows], dtype=torch.float64)
                flat = torch.cat([b.detach().cpu().double().flatten() for b in statistics])
                flat = self.context.all_reduce_sum(torch.cat([flat * weight, weight]))
                if flat[-1]:  # else this was an epoch gone on with that had no step left
                    parts = torch.split(flat[:-1] / flat[-1], [b.numel() for b in statistics])
                    for buffer, part in zip(statistics, parts, strict=True):
                        buffer.copy_(part.view(buffer.shape))
            if self.ema is not None:
                self.ema.copy_buffers(self.model)

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "raw_weights": None if self.ema is None else self.model.state_dict(),
            "log_variances": None if self.log_variances is None else self.log_variances.detach(),
            "ema_updates": 0 if self.ema is None else self.ema.num_updates,
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
        """Return this epoch's, whose images may be smaller."""
        side = epoch_side_px(self.epoch, self.job.train, self.transform.image_size)
        return dataclasses.replace(self.transform, image_size=side)

    def _progress(self, epoch: _Epoch, sums: Tensor, elapsed_s: float) -> Progress:
        """Return how far the epoch is. `sums`, which this waits for: of three losses, their counts, `running_sums`."""
        values = sums.tolist()
        age, gender, race = (total / n if n else None for total, n in zip(values[6:9], values[9:], strict=True))
        return Progress(
            epoch=self.epoch,
            num_epochs=self.job.train.epochs,
            num_samples=epoch.num_rows,
            num_samples_total=self.num_train_rows,
            loss=self._weighted(values[:6]),
            age_mae_years=age,
            gender_accuracy=gender,
            race_accuracy=race,
            samples_per_s=epoch.num_rows / elapsed_s,
            data_wait_share=epoch.wait_s / elapsed_s,
        )

    def _weighted(self, sums_and_counts: Sequence[float]) -> float:
        """Return the loss: the weighted sum of the tasks' means, from three sums and three counts."""
        weights = loss_weights(self.job.loss)
        return sum(
            weight * total / count
            for weight, total, count in zip(weights, sums_and_counts[:3], sums_and_counts[3:], strict=True)
            if count
        )


class _Learner(nn.Module):
    """What is trained: the network, and the weights of its losses, whose gradients are to be averaged too.

    It is also what `compile` compiles, so that the network itself, which is validated and kept, stays as it is.
    """

    def __init__(self, model: MultiTaskNet, log_variances: nn.Parameter | None) -> None:
        super().__init__()
        self.model = model
        self.log_variances = log_variances

    def forward(self, images_nchw: Tensor) -> Outputs:
        outputs: Outputs = self.model(images_nchw)
        return outputs


class _Monitor:
    """Looks for losses that are not finite, without making the device wait at every step."""

    def __init__(self, epoch: int, check_every: int) -> None:
        self.epoch = epoch
        self.check_every = check_every
        self.pending: list[tuple[int, Tensor, list[str]]] = []
        self.problem = ""
        self.bad_step = 0
        """The first whose loss is no number; 0: there is none."""
        self.image_ids: list[str] = []

    def watch(self, step: int, loss: Tensor, sums: Tensor, counts: Tensor, batch: Batch | None) -> None:
        """Take note of one step."""
        self.pending.append((step, torch.cat([loss[None], sums, counts]), _image_ids(batch)))
        if len(self.pending) >= self.check_every:
            self.flush()

    def flush(self) -> None:
        """Look at all steps noted; `problem` names the first bad one, `image_ids` its rows."""
        if self.pending and not self.problem:
            values = torch.stack([noted for _, noted, _ in self.pending]).cpu()
            bad = (~torch.isfinite(values).all(dim=1)).nonzero()
            if len(bad):
                first = int(bad[0])
                loss, *tasks = values[first].tolist()
                named = _describe(tasks[:3], tasks[3:])
                self.bad_step = self.pending[first][0]
                self.problem = f"epoch {self.epoch}, step {self.bad_step}: loss {loss}: {named}"
                self.image_ids = self.pending[first][2]
        self.pending.clear()


def _describe(sums: Sequence[float], counts: Sequence[float]) -> str:
    means = (f"{total / count:.6g}" if count else "no labels" for total, count in zip(sums, counts, strict=True))
    return ", ".join(f"{task} {mean}" for task, mean in zip(TASKS, means, strict=True))


def _next(batches: Iterator[Batch]) -> Batch | None:
    """Return the next batch that has rows."""
    for batch in batches:
        if len(batch["age"]):
            return batch
    return None


def _image_ids(batch: Batch | None) -> list[str]:
    """Return the ids of a batch's rows; none where it has no such column."""
    return [] if batch is None else [str(each) for each in batch.get("image_id", ())]


def batches_of(arrays: Batch, order: NDArray[np.int64], sizes: Iterator[int]) -> Iterator[Batch]:
    """Iterate over rows in the order of these indices, so many at a time; the last batch may have fewer."""
    while len(order):
        size = next(sizes)
        chosen, order = order[:size], order[size:]
        yield {name: values[chosen] for name, values in arrays.items()}


def _targets(batch: Batch | None) -> Targets:
    """Return the labels on the CPU; of no batch, none."""
    if batch is None:
        return Targets(torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    return Targets(
        torch.tensor(np.asarray(batch["age"], np.float32)),
        torch.tensor(np.asarray(batch["gender"], np.int64)),
        torch.tensor(np.asarray(batch["race"], np.int64)),
    )


def _agreement(targets: Targets, mix: Mix | None, is_short: bool, has_problem: bool, asks: bool) -> Tensor:
    """Return what ranks tell each other before a step.

    (7,) float32: rows, labels of each task, whether rows are too few for all parts, whether a loss was not finite,
    whether to ask if a machine will be taken away.
    """
    counts = label_counts(targets, mix)
    return torch.cat([torch.tensor([len(targets.age)]), counts, torch.tensor([is_short, has_problem, asks])]).float()


def _slices(num_rows: int, num_parts: int) -> list[slice]:
    """Cut rows into parts as equal as can be; into fewer where a part would have only one, as batch norm needs two."""
    num_parts = min(num_parts, max(num_rows // 2, 1))
    edges = [num_rows * part // num_parts for part in range(num_parts + 1)]
    return [slice(first, end) for first, end in itertools.pairwise(edges)]


def _seed(seed: int, epoch: int, rank: int, steps_done: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, rank, steps_done]).generate_state(1, np.uint64)[0] >> np.uint64(1))

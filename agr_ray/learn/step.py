"""One optimiser step: micro-batches, forward, loss, backward, clip, update."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from agr_ray.config import TrainJob
from agr_ray.learn.augment import augment
from agr_ray.learn.batches import Batch, missing_targets, num_rows, to_device
from agr_ray.learn.context import Context
from agr_ray.learn.losses import TaskSums, first_log_variances, multi_task_loss, rows_of
from agr_ray.learn.mix import Mix, mix_images
from agr_ray.learn.monitor import Monitor
from agr_ray.learn.optimise import Ema, build_optimizer, set_learning_rate
from agr_ray.learn.running import running_sums
from agr_ray.models.heads.base import Targets
from agr_ray.models.network import MultiTaskNet, Outputs
from agr_ray.models.network_input import to_nchw
from agr_ray.models.precision import autocast, grad_scaler
from agr_ray.models.transform import Transform


class Stepper:
    """The network in training, and all state that changes with each step.

    Args:
        context: of the training loop.
        model: on the context's device, with the checkpoint's weights; raw weights in `state` replace them.
        job: only its sections loss, augment and train are used.
        state: result of the method `state`, to resume from; empty: start from the beginning.
        is_frozen: whether the backbone is frozen in the next step.
    """

    def __init__(
        self, context: Context, model: MultiTaskNet, job: TrainJob, state: Mapping[str, Any], *, is_frozen: bool
    ) -> None:
        self.context = context
        self.model = model
        self.job = job
        self.heads = model.heads_by_task
        for head in self.heads.values():
            head.configure(job.loss)
        decay = job.train.ema_decay
        # The checkpoint's weights are the moving average; the raw ones are in the state.
        self.ema = Ema(model, decay, int(state.get("ema_updates", 0))) if decay else None
        if state.get("raw_weights") is not None:
            model.load_state_dict(state["raw_weights"])
        self.log_variances: nn.Parameter | None = None
        if job.loss.weighting == "uncertainty":
            first = first_log_variances(self.heads, job.loss)
            self.log_variances = nn.Parameter(state.get("log_variances", first).to(context.device, copy=True))
        self.optimizer = build_optimizer(model, job.train, self.log_variances)
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler = grad_scaler(context.device, job.train.precision)
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.wrapped = self._wrap(is_frozen)

    @property
    def kept(self) -> MultiTaskNet:
        """Return the network that is validated and saved."""
        return self.model if self.ema is None else self.ema.model

    def state(self) -> dict[str, Any]:
        """Return the state to resume from, besides the weights of `kept`."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "raw_weights": None if self.ema is None else self.model.state_dict(),
            "log_variances": None if self.log_variances is None else self.log_variances.detach(),
            "ema_updates": 0 if self.ema is None else self.ema.num_updates,
        }

    def begin_epoch(self, *, is_frozen: bool) -> None:
        """Freeze or unfreeze the backbone, and set training mode."""
        if is_frozen != self.is_frozen:
            self.wrapped = self.model
            gc.collect()  # DDP is part of reference cycles, and its hooks must not outlive it
            self.wrapped = self._wrap(is_frozen)
        self._set_train_mode()

    def step(
        self,
        batch: Batch | None,
        targets: Targets,
        mix: Mix | None,
        counts_total: Tensor,
        transform: Transform,
        lr: float,
        generator: torch.Generator,
        monitor: Monitor,
        number: int,
    ) -> tuple[TaskSums, Tensor]:
        """Take one optimiser step. A rank without rows takes part with an unlabelled dummy image.

        Args:
            batch: of this rank; None: it has no rows left.
            targets: of the batch, on the CPU.
            mix: of the batch, on the CPU.
            counts_total: (tasks,) labels of all ranks.
            transform: of this epoch.
            lr: the learning rate.
            generator: draws the augmentation.
            monitor: receives the loss; once it has found a non-finite one, the weights are not changed any more.
            number: of the step, from 1.

        Returns:
            The batch's losses, and its `running_sums`.
        """
        device, config = self.context.device, self.job.train
        if num_rows(batch) < 2:
            # Batch norm needs two images to train; in this step it uses its running statistics.
            self.wrapped.eval()
        if batch is None:
            images = torch.zeros(1, 3, transform.image_size, transform.image_size, device=device)
            targets = missing_targets(self.heads)
        else:
            images = augment(to_nchw(batch["crop"], device), transform, self.job.augment, generator)
        if mix is not None:
            mix = mix.to(device)
            images = mix_images(images, mix)
        set_learning_rate(self.optimizer, lr)
        pose = None if batch is None or "pose" not in batch else torch.as_tensor(batch["pose"]).to(device)
        loss, tasks, running = self._backward(images, pose, to_device(targets, device), mix, counts_total)
        if config.grad_clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip_norm)
        monitor.watch(number, loss, tasks.sums, tasks.counts, batch)
        if not monitor.problem:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model)
        self._set_train_mode()
        return tasks, running

    def average_statistics(self, num_local_rows: int) -> None:
        """Average running statistics over ranks, weighted by their rows, and copy them to the moving average.

        Running statistics are all floating-point buffers in the state dict, of any layer.
        """
        with torch.no_grad():
            saved = self.model.state_dict()
            statistics = [b for name, b in self.model.named_buffers() if name in saved and b.is_floating_point()]
            if self.context.world_size > 1 and statistics:
                weight = torch.tensor([num_local_rows], dtype=torch.float64)
                flat = torch.cat([b.detach().cpu().double().flatten() for b in statistics])
                flat = self.context.all_reduce_sum(torch.cat([flat * weight, weight]))
                if flat[-1]:  # 0: a resumed epoch without remaining steps
                    parts = torch.split(flat[:-1] / flat[-1], [b.numel() for b in statistics])
                    for buffer, part in zip(statistics, parts, strict=True):
                        buffer.copy_(part.view(buffer.shape))
            if self.ema is not None:
                self.ema.copy_buffers(self.model)

    def _wrap(self, is_frozen: bool) -> nn.Module:
        """Freeze or unfreeze the backbone, and wrap the model again, because DDP fixes its parameters when created."""
        self.is_frozen = is_frozen
        self.model.backbone.requires_grad_(not is_frozen)
        learner: nn.Module = self.model
        if self.log_variances is not None or self.job.train.compile:
            learner = _Learner(self.model, self.log_variances)
        if self.job.train.compile:
            learner.compile()  # before DDP, which then splits the graph where it sends gradients
        return self.context.wrap(learner)

    def _set_train_mode(self) -> None:
        """Put the network into training mode, except for a frozen backbone."""
        self.wrapped.train()
        if self.is_frozen:
            self.model.backbone.eval()

    def _backward(
        self, images: Tensor, pose: Tensor | None, targets: Targets, mix: Mix | None, counts_total: Tensor
    ) -> tuple[Tensor, TaskSums, Tensor]:
        """Accumulate the gradients of this rank's micro-batches; return loss, sums and `running_sums`."""
        images = images.contiguous(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        slices = _slices(len(images), self.job.train.grad_accum_steps)
        losses: list[Tensor] = []
        parts: list[TaskSums] = []
        running = torch.zeros(2 * len(self.heads), device=images.device)
        for rows in slices:
            with self._exchange(is_last=rows == slices[-1]):
                with autocast(self.context.device, self.job.train.precision):
                    outputs = self.wrapped(images[rows], None if pose is None else pose[rows])
                loss, tasks = multi_task_loss(
                    self.heads,
                    outputs,
                    targets,
                    self.job.loss,
                    counts_total,
                    self.context.world_size,
                    self.log_variances,
                    mix,
                    rows,
                    len(slices),
                )
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
            losses.append(loss.detach())
            parts.append(tasks)
            running += running_sums(self.heads, outputs, rows_of(targets, rows))
        tasks = TaskSums(*(torch.stack(each).sum(dim=0) for each in zip(*parts, strict=True)))
        return torch.stack(losses).sum(), tasks, running

    def _exchange(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Let ranks exchange gradients once per step, after the last micro-batch."""
        if is_last or not isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()


class _Learner(nn.Module):
    """The network and the learnt weights of its losses, so that DDP averages the gradients of both.

    `compile` compiles this module; the network inside, which is validated and saved, is not changed.
    """

    def __init__(self, model: MultiTaskNet, log_variances: nn.Parameter | None) -> None:
        super().__init__()
        self.model = model
        self.log_variances = log_variances

    def forward(self, images_nchw: Tensor, pose_degrees: Tensor | None) -> Outputs:
        outputs: Outputs = self.model(images_nchw, pose_degrees)
        return outputs


def _slices(num_images: int, num_parts: int) -> list[slice]:
    """Cut rows into parts of nearly equal size, but of at least two rows, because batch norm needs two."""
    num_parts = min(num_parts, max(num_images // 2, 1))
    edges = [num_images * part // num_parts for part in range(num_parts + 1)]
    return [slice(first, end) for first, end in itertools.pairwise(edges)]

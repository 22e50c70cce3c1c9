"""Where the training loop runs: the context that gives it batches and takes its reports."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from agr_ray.labels import Labels
from agr_ray.learn.batches import Batch, batches_of, num_rows
from agr_ray.learn.history import Row
from agr_ray.learn.progress import Progress
from agr_ray.learn.sampling import Sampler
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.transform import Transform


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

        An epoch that was interrupted is resumed in another order; the loop takes only the remaining steps.
        """

    def val_batches(self) -> Iterator[Batch]:
        """Iterate over this rank's share of validation; over all ranks each row comes once."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Add up over ranks. The tensor is a small one on the CPU, and so is the result."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Make backward average the gradients over ranks (DDP, or nothing).

        The loop averages running statistics, once an epoch.
        """

    def report(self, report: EpochReport) -> None:
        """Keep a checkpoint, log the row."""

    def must_save(self) -> bool:
        """Say whether a machine will soon be preempted, so that a checkpoint should be kept at once.

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
            order = rng.permutation(num_rows(self.train))
        else:
            labels = Labels.from_arrays(self.sampler.space, self.train)
            order = self.sampler.draw(labels, rng, self.train.get("set_index"))
        return batches_of(self.train, order, itertools.repeat(self.batch_size))

    def val_batches(self) -> Iterator[Batch]:
        """Iterate over the validation arrays in their order."""
        return batches_of(self.val, np.arange(num_rows(self.val)), itertools.repeat(self.batch_size))

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

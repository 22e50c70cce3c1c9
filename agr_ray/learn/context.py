"""The context of the training loop, which provides batches, sums over ranks, and receives reports."""

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
    """Result of an epoch, the same on all ranks; only one of them should save it."""

    row: Row
    is_best: bool
    """Whether the objective is lower than in all earlier epochs; always true without validation."""
    finished: str
    """Why this epoch is the last: `epochs` or `early_stopping`; empty: it is not the last."""
    metrics: Mapping[str, Any]
    """Validation metrics: `MetricSums.to_json`, with `baseline` of the same shape and `groups`: `GroupSums.to_json`."""
    model: MultiTaskNet
    """The network that was validated and should be saved: with the moving average of weights, if there is one."""
    transform: Transform
    """Transform of this epoch's training and validation."""
    train_state: Callable[[], dict[str, Any]]
    """Returns the argument `resume` of `train`. The next step changes its tensors in place, so save it at once."""


@dataclass(frozen=True)
class Snapshot:
    """State in the middle of an epoch that may not finish, the same on all ranks; only one of them should save it."""

    epoch: int
    num_steps: int
    """Steps of the epoch so far."""
    model: MultiTaskNet
    transform: Transform
    train_state: Callable[[], dict[str, Any]]
    """As in `EpochReport`."""


class Context(Protocol):
    """The environment of the training loop on one rank."""

    @property
    def rank(self) -> int:
        """Rank of this worker, from 0."""

    @property
    def world_size(self) -> int:
        """Number of workers."""

    @property
    def device(self) -> torch.device:
        """Device on which this worker computes."""

    def train_batches(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        """Iterate over this rank's share of an epoch (from 1), in a new random order for each epoch.

        An epoch that was interrupted after `steps_done` steps resumes in another order; the loop takes only the
        remaining steps.
        """

    def val_batches(self) -> Iterator[Batch]:
        """Iterate over this rank's share of validation. All ranks together yield each row once."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks of a small CPU tensor, on the CPU."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model so that backward averages gradients over ranks (DDP); with one rank, return it unchanged.

        The loop itself averages running statistics, once per epoch.
        """

    def report(self, report: EpochReport) -> None:
        """Save a checkpoint and log the row."""

    def must_save(self) -> bool:
        """Return whether the run or a machine is about to be stopped, so that a checkpoint must be saved at once.

        Called on all ranks at the same step, every few seconds; returns the same on all.
        """

    def save(self, snapshot: Snapshot) -> None:
        """Save a checkpoint in the middle of an epoch."""

    def progress(self, progress: Progress) -> None:
        """Show the progress; called about once per second."""


@dataclass
class LocalContext:
    """A single rank in this process, with arrays in memory."""

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
    """Draws the rows of each epoch (`TrainConfig.balance`, `data_shares`); None: each row once."""

    def train_batches(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        """Iterate over the training arrays in an order drawn from seed, epoch and `steps_done`."""
        rng = np.random.default_rng([self.seed, epoch, steps_done])
        if self.sampler is None:
            order = rng.permutation(num_rows(self.train))
        else:
            labels = Labels.from_arrays(self.sampler.space, self.train)
            order = self.sampler.draw(labels, rng, self.train.get("set_index"))
        return batches_of(self.train, order, itertools.repeat(self.batch_size))

    def val_batches(self) -> Iterator[Batch]:
        """Iterate over the validation arrays in order."""
        return batches_of(self.val, np.arange(num_rows(self.val)), itertools.repeat(self.batch_size))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the tensor: there is only one rank."""
        return tensor

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model: there is only one rank."""
        return model

    def report(self, report: EpochReport) -> None:
        """Call `on_report`."""
        if self.on_report is not None:
            self.on_report(report)

    def must_save(self) -> bool:
        """Return False: nobody gives this process notice."""
        return False

    def save(self, snapshot: Snapshot) -> None:
        """Do nothing: `must_save` is never true."""

    def progress(self, progress: Progress) -> None:
        """Call `on_progress`."""
        if self.on_progress is not None:
            self.on_progress(progress)

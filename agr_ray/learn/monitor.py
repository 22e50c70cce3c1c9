"""Detect non-finite losses without waiting for the device at every step, and name their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from agr_ray.learn.batches import Batch, image_ids

_NAMED_ROWS: Final = 8


class NonFiniteLossError(Exception):
    """The loss is not finite. The message gives the epoch, the step, each task's loss and the rows.

    Raised on all ranks. The run stops, and this step is not saved.
    """

    def __init__(self, message: str, image_ids: Sequence[str] | None) -> None:
        some = ", ".join((image_ids or ())[:_NAMED_ROWS])
        more = len(image_ids or ()) - _NAMED_ROWS
        super().__init__(
            message + (f"; its batch holds image_id {some}" if some else "") + (f" and {more} more" if more > 0 else "")
        )
        self.image_ids = image_ids
        """Image ids of the batch, if it has any; None: the batch was another rank's, whose error names it."""


class Monitor:
    """Checks the losses of `check_every` steps at a time, so that not every step waits for the device."""

    def __init__(self, epoch: int, tasks: Sequence[str], check_every: int) -> None:
        self.epoch = epoch
        self.tasks = tasks
        self.check_every = check_every
        self.pending: list[tuple[int, Tensor, list[str]]] = []
        self.problem = ""
        self.bad_step = 0
        """First step whose loss is not finite; 0: none."""
        self.image_ids: list[str] = []

    def watch(self, step: int, loss: Tensor, sums: Tensor, counts: Tensor, batch: Batch | None) -> None:
        """Record a step."""
        self.pending.append((step, torch.cat([loss[None], sums, counts]), image_ids(batch)))
        if len(self.pending) >= self.check_every:
            self.flush()

    def flush(self) -> None:
        """Check all recorded steps; `problem` then describes the first bad one, and `image_ids` its rows."""
        if self.pending and not self.problem:
            values = torch.stack([losses for _, losses, _ in self.pending]).cpu()
            bad = (~torch.isfinite(values).all(dim=1)).nonzero()
            if len(bad):
                first = int(bad[0])
                loss, *parts = values[first].tolist()
                losses = describe(self.tasks, parts[: len(self.tasks)], parts[len(self.tasks) :])
                self.bad_step = self.pending[first][0]
                self.problem = f"epoch {self.epoch}, step {self.bad_step}: loss {loss}: {losses}"
                self.image_ids = self.pending[first][2]
        self.pending.clear()


def describe(tasks: Sequence[str], sums: Sequence[float], counts: Sequence[float]) -> str:
    """Return each task's mean loss: `age 3.2, gender no labels`."""
    means = (f"{total / count:.6g}" if count else "no labels" for total, count in zip(sums, counts, strict=True))
    return ", ".join(f"{task} {mean}" for task, mean in zip(tasks, means, strict=True))

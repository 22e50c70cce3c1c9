"""Non-finite losses: found without making the device wait at every step, and named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from agr_ray.learn.batches import Batch, image_ids

_NAMED_ROWS: Final = 8


class NonFiniteLossError(Exception):
    """The loss is not finite: names the epoch, the step, each task's loss and the rows.

    The run stops and nothing is saved. Raised on all ranks.
    """

    def __init__(self, said: str, image_ids: Sequence[str] | None) -> None:
        some = ", ".join((image_ids or ())[:_NAMED_ROWS])
        more = len(image_ids or ()) - _NAMED_ROWS
        super().__init__(
            said + (f"; its batch holds image_id {some}" if some else "") + (f" and {more} more" if more > 0 else "")
        )
        self.image_ids = image_ids
        """Of the batch, as far as batches have ids; None: the batch was another rank's, which says more."""


class Monitor:
    """Looks for losses that are not finite, without making the device wait at every step."""

    def __init__(self, epoch: int, tasks: Sequence[str], check_every: int) -> None:
        self.epoch = epoch
        self.tasks = tasks
        self.check_every = check_every
        self.pending: list[tuple[int, Tensor, list[str]]] = []
        self.problem = ""
        self.bad_step = 0
        """The first step whose loss is not finite; 0: none."""
        self.image_ids: list[str] = []

    def watch(self, step: int, loss: Tensor, sums: Tensor, counts: Tensor, batch: Batch | None) -> None:
        """Take note of one step."""
        self.pending.append((step, torch.cat([loss[None], sums, counts]), image_ids(batch)))
        if len(self.pending) >= self.check_every:
            self.flush()

    def flush(self) -> None:
        """Look at all steps noted; `problem` names the first bad one, `image_ids` its rows."""
        if self.pending and not self.problem:
            values = torch.stack([noted for _, noted, _ in self.pending]).cpu()
            bad = (~torch.isfinite(values).all(dim=1)).nonzero()
            if len(bad):
                first = int(bad[0])
                loss, *parts = values[first].tolist()
                named = describe(self.tasks, parts[: len(self.tasks)], parts[len(self.tasks) :])
                self.bad_step = self.pending[first][0]
                self.problem = f"epoch {self.epoch}, step {self.bad_step}: loss {loss}: {named}"
                self.image_ids = self.pending[first][2]
        self.pending.clear()


def describe(tasks: Sequence[str], sums: Sequence[float], counts: Sequence[float]) -> str:
    """Return each task's mean loss: `age 3.2, gender no labels`."""
    means = (f"{total / count:.6g}" if count else "no labels" for total, count in zip(sums, counts, strict=True))
    return ", ".join(f"{task} {mean}" for task, mean in zip(tasks, means, strict=True))

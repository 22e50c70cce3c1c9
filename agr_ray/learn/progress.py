"""Progress of training, as numbers and as text. Does not import torch, so that any process can pass it on."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of an epoch.

    Loss, error and accuracies are means over the steps so far, on the augmented images of one rank. So at first they
    are worse than validation. They show whether the network is learning, not how good it is.
    """

    epoch: int
    """From 1."""
    num_epochs: int
    num_samples: int
    """Images of all ranks in this epoch so far."""
    num_samples_total: int
    loss: float
    """Mean of this rank since the epoch began."""
    running: Mapping[str, float]
    """Means of each task's metric on this rank since the epoch began, by `TASK_METRIC`: `age_mae_years`,
    `race_accuracy` (0 to 1). Tasks without a label are left out. Mixed images (MixUp, CutMix) are compared with their
    own label, even if they hardly show it."""
    samples_per_s: float
    """Of all ranks, since the epoch began."""
    data_wait_share: float
    """Fraction of the time since the epoch began in which this rank waited for its next batch; 0 to 1."""

    num_later_samples: float
    """Images of all ranks in the later epochs; one with fewer or more pixels than those of this epoch counts as that
    part of one."""
    steady_samples_per_s: float | None
    """Of all ranks, since the first step that this process took in this epoch: without the wait for its first batch.
    None: there was only one step."""

    @property
    def epoch_left(self) -> str:
        """Return the estimated time until the epoch's last step: `0:01:25 left`; empty if it is unknown."""
        return self._left(max(self.num_samples_total - self.num_samples, 0))

    @property
    def run_left(self) -> str:
        """Return the same until the run's last step, without validation and early stopping."""
        return self._left(max(self.num_samples_total - self.num_samples, 0) + self.num_later_samples)

    def _left(self, num_samples: float) -> str:
        rate = self.steady_samples_per_s
        return f"{duration(num_samples / rate)} left" if rate else ""

    def figures(self) -> str:
        """Return the metrics as text: `loss 2.803, age MAE 5.01 years, gender 92.8 %, ...`."""
        parts = [f"loss {self.loss:.3f}"]
        for name, value in self.running.items():
            if name.endswith("_mae_years"):
                parts.append(f"{name.removesuffix('_mae_years')} MAE {value:.2f} years")
            else:
                parts.append(f"{name.removesuffix('_accuracy')} {100 * value:.1f} %")
        parts += [f"{self.samples_per_s:.0f} samples/s", f"{self.data_wait_share:.0%} waiting for data"]
        return ", ".join(parts)

    def line(self) -> str:
        """Return everything as one line."""
        left = f"{self.epoch_left} in this epoch, {self.run_left} in this run, " if self.steady_samples_per_s else ""
        return (
            f"epoch {self.epoch}/{self.num_epochs}: {self.num_samples:,} of {self.num_samples_total:,}, "
            f"{left}{self.figures()}"
        )


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds: `0:01:25`."""
    return str(datetime.timedelta(seconds=round(seconds)))

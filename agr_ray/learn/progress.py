"""How far training is, as numbers and as a line. Imports nothing, because whoever passes it on need not know torch."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far an epoch is, and how it goes.

    Loss, error and accuracies are of the images as they were augmented, by the network as it was at each step, of one
    rank. So they lag behind validation at first, and say whether learning goes on, not how good it is.
    """

    epoch: int
    """From 1."""
    num_epochs: int
    num_samples: int
    """Of all ranks, in this epoch."""
    num_samples_total: int
    loss: float
    """Of this rank, mean since the epoch began."""
    running: Mapping[str, float]
    """The same of each task's metric by `TASK_METRIC`: `age_mae_years`, `race_accuracy` (0 to 1). A task without a
    label is left out. Mixed images (mixup, CutMix) count against their own label, which they may hardly show."""
    samples_per_s: float
    """Of all ranks, since the epoch began."""
    data_wait_share: float
    """Of this rank's time since the epoch began, the part in which it waited for its next batch; 0 to 1."""

    @property
    def epoch_left_s(self) -> float:
        """Return the seconds until the epoch's last step, at the speed so far."""
        return max(self.num_samples_total - self.num_samples, 0) / self.samples_per_s

    @property
    def run_left_s(self) -> float:
        """Return the seconds until the last epoch's last step: no validation is in them, and no early stopping."""
        later = (self.num_epochs - self.epoch) * self.num_samples_total
        return self.epoch_left_s + later / self.samples_per_s

    def figures(self) -> str:
        """Say how it goes: `loss 2.803, age MAE 5.01 years, gender 92.8 %, ...`; what isn't there is left out."""
        parts = [f"loss {self.loss:.3f}"]
        for name, value in self.running.items():
            if name.endswith("_mae_years"):
                parts.append(f"{name.removesuffix('_mae_years')} MAE {value:.2f} years")
            else:
                parts.append(f"{name.removesuffix('_accuracy')} {100 * value:.1f} %")
        parts += [f"{self.samples_per_s:.0f} samples/s", f"{self.data_wait_share:.0%} waiting for data"]
        return ", ".join(parts)

    def line(self) -> str:
        """Say all of it."""
        return (
            f"epoch {self.epoch}/{self.num_epochs}: {self.num_samples:,} of {self.num_samples_total:,}, "
            f"{self.figures()}, {duration(self.epoch_left_s)} to go, {duration(self.run_left_s)} in all epochs"
        )


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds: `0:01:25`."""
    return str(datetime.timedelta(seconds=round(seconds)))

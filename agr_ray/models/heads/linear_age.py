"""An age head with one number (paper eq. 7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.labels import LabelSpace
from agr_ray.models.heads import ages
from agr_ray.models.heads.base import Head, Targets, TaskSum, linear


class LinearAge(Head):
    """Outputs: (n,) years, not clamped. The error of an age range is the distance to it, 0 inside."""

    missing_values = ages.MISSING_VALUES
    metric = "mae_years"

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:  # noqa: ARG002  # as all heads
        super().__init__()
        self.layer = linear(num_features, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return years."""
        years: Tensor = self.layer(features).squeeze(1)
        return years

    def labelled(self, targets: Targets) -> Tensor:
        """Return which rows have an age or a range, (n,) bool."""
        return ages.age_truth(targets).is_labelled

    def losses(self, outputs: Tensor, targets: Targets, config: LossConfig) -> Tensor:
        """Return the loss of each row's error (L1: paper eq. 12)."""
        return ages.error_losses(outputs, ages.age_truth(targets), config)

    def read_out(self, outputs: Tensor) -> Tensor:
        """Return years, clamped to the range of valid labels."""
        return ages.clamped(outputs)

    def evidence(self, outputs: Tensor) -> Tensor:
        """Return years, not clamped, (n,)."""
        return outputs

    def score(self, outputs: Tensor, targets: Targets) -> TaskSum:
        """Return the sum of |error|, years."""
        return ages.age_score(outputs, targets)

    def likelihood(self, config: LossConfig) -> tuple[float, float]:
        """Return a and b of the `age_loss`."""
        return ages.error_likelihood(config)

    def initialise(self, labels: Mapping[str, NDArray[Any]]) -> None:
        """Predict the mean age at first, because L1 would approach it only in steps of the learning rate."""
        moments = ages.mean_and_std_years(labels)
        if moments is not None:
            with torch.no_grad():
                self.layer.bias.fill_(moments[0])

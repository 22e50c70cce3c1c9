"""Age as one number (paper equation 7)."""

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
    """Outputs: (n,) years, not clamped. A range is learnt by the distance to it, 0 inside."""

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
        """Return where there is an age or a range."""
        return ages.age_truth(targets).is_labelled

    def losses(self, outputs: Tensor, targets: Targets, config: LossConfig) -> Tensor:
        """Return the loss of each error (L1: paper equation 12)."""
        return ages.error_losses(outputs, ages.age_truth(targets), config)

    def read_out(self, outputs: Tensor) -> Tensor:
        """Return years, clamped."""
        return ages.clamped(outputs)

    def score(self, outputs: Tensor, targets: Targets) -> TaskSum:
        """Return the sum of |error|, years."""
        return ages.age_score(outputs, targets)

    def likelihood(self, config: LossConfig) -> tuple[float, float]:
        """Return that of the `age_loss`."""
        return ages.error_likelihood(config)

    def initialise(self, labels: Mapping[str, NDArray[Any]]) -> None:
        """Predict the mean age, so that L1 need not get there in steps of the learning rate."""
        moments = ages.mean_and_std_years(labels)
        if moments is not None:
            with torch.no_grad():
                self.layer.bias.fill_(moments[0])

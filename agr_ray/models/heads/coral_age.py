"""Rank-consistent ordinal regression: CORAL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from numpy.typing import NDArray
from torch import Tensor, nn

from agr_ray.config import LossConfig
from agr_ray.labels import LabelSpace
from agr_ray.models.heads import ages
from agr_ray.models.heads.base import Targets, linear
from agr_ray.models.heads.thresholds import THRESHOLDS_YEARS, Thresholds, share_above


class CoralAge(Thresholds):
    """One linear output, and a bias for each threshold: the thresholds share all weights.

    Source: Cao, Mirjalili and Raschka, "Rank Consistent Ordinal Regression for Neural Networks with Application to Age
    Estimation", Pattern Recognition Letters 140, 2020, equations 3 to 5, all importance weights 1. An age range counts
    at the thresholds outside it.
    """

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:  # noqa: ARG002  # as all heads
        super().__init__()
        self.layer = linear(num_features, 1)
        self.layer.register_parameter("bias", None)
        self.bias = nn.Parameter(torch.linspace(1.0, -1.0, len(THRESHOLDS_YEARS)))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.layer(features) + self.bias
        return logits

    def losses(self, outputs: Tensor, targets: Targets, config: LossConfig) -> Tensor:  # noqa: ARG002  # no settings
        """Return the sum of the binary cross-entropies of each row's thresholds."""
        truth = ages.age_truth(targets)
        is_above = truth.low_years[:, None] > self.thresholds_years
        is_known = truth.is_labelled[:, None] & (is_above | (truth.high_years[:, None] <= self.thresholds_years))
        finite = torch.where(is_known, outputs, 0.0)
        losses = F.binary_cross_entropy_with_logits(finite, is_above.to(finite.dtype), reduction="none")
        return torch.where(is_known, losses, 0.0).sum(dim=1)

    def passed(self, outputs: Tensor) -> Tensor:
        """Return the probabilities; a cumulative minimum keeps them from rising where biases are not yet in order."""
        return outputs.sigmoid().cummin(dim=1).values

    def initialise(self, labels: Mapping[str, NDArray[Any]]) -> None:
        """Predict a Gaussian with the training ages' mean and standard deviation at first."""
        moments = ages.mean_and_std_years(labels)
        if moments is not None:
            with torch.no_grad():
                self.bias.copy_(torch.logit(share_above(*moments, self.thresholds_years), eps=1e-4))

"""A domain classifier behind gradient reversal."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn

from agr_ray.config import LossConfig
from agr_ray.labels import LabelSpace
from agr_ray.models.heads.base import Head, Targets, TaskSum

_HIDDEN = 256


class Domain(Head):
    """Predicts whether a row comes from the first prepared set, while the backbone learns features that do not show it.

    Source: Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", ICML 2015, equations 1 to 8. The
    classifier learns with weight 1. The reversed gradient has the factor `loss.domain_weight` (lambda in equation 4)
    throughout; the publication lets it grow from 0 to 1. Every training row has a domain, so rows without another label
    adapt the features, too.

    Outputs: (n,) logits of "not the first set".
    """

    missing_values: Mapping[str, float | int] = MappingProxyType({"set_index": -1})
    metric = "accuracy"

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:  # noqa: ARG002  # as all heads
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(num_features, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))
        self.reversal = 1.0

    def configure(self, config: LossConfig) -> None:
        """Set the factor of the reversed gradient."""
        self.reversal = config.domain_weight

    def weight(self, config: LossConfig, task: str) -> float:  # noqa: ARG002  # the configured one is the factor
        """Return 1."""
        return 1.0

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits. The gradient of the features has the opposite sign and the factor."""
        logits: Tensor = self.layers(_Reversal.apply(features, self.reversal)).squeeze(1)
        return logits

    def labelled(self, targets: Targets) -> Tensor:
        """Return which rows have a set, (n,) bool: all training rows."""
        return targets["set_index"] >= 0

    def losses(self, outputs: Tensor, targets: Targets, config: LossConfig) -> Tensor:  # noqa: ARG002  # no settings
        """Return each row's binary cross-entropy."""
        known = self.labelled(targets)
        truth = (targets["set_index"] > 0).float()
        losses = F.binary_cross_entropy_with_logits(torch.where(known, outputs, 0.0), truth, reduction="none")
        return torch.where(known, losses, 0.0)

    def read_out(self, outputs: Tensor) -> Tensor:
        """Return the probability of "not the first set", (n,)."""
        return outputs.sigmoid()

    def score(self, outputs: Tensor, targets: Targets) -> TaskSum:
        """Return the number of correct predictions."""
        known = self.labelled(targets)
        is_right = (outputs > 0) == (targets["set_index"] > 0)
        return TaskSum((known & is_right).sum().float(), known.sum().float())


class _Reversal(torch.autograd.Function):
    """The identity, with the gradient multiplied by minus a factor."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None

"""A head for two classes with one logit."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.labels import CLASS_MISSING, LabelSpace
from agr_ray.models.heads.base import Head, Targets, TaskSum, linear


class Binary(Head):
    """Outputs: (n,) logits. The sigmoid is the probability of the second class."""

    metric = "accuracy"

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:
        super().__init__()
        assert len(space.classes[task]) == 2
        self.task = task
        self.missing_values = {task: CLASS_MISSING}
        self.layer = linear(num_features, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.layer(features).squeeze(1)
        return logits

    def labelled(self, targets: Targets) -> Tensor:
        """Return which rows have a class, (n,) bool."""
        return targets[self.task] >= 0

    def losses(self, outputs: Tensor, targets: Targets, config: LossConfig) -> Tensor:
        """Return each row's binary cross-entropy (paper eq. 13, which lacks the minus sign)."""
        classes, known = targets[self.task], self.labelled(targets)
        truth = classes.clamp(min=0).float() * (1.0 - config.label_smoothing) + 0.5 * config.label_smoothing
        losses = F.binary_cross_entropy_with_logits(torch.where(known, outputs, 0.0), truth, reduction="none")
        return torch.where(known, losses, 0.0)

    def read_out(self, outputs: Tensor) -> Tensor:
        """Return the probability of the second class, (n,)."""
        return outputs.sigmoid()

    def evidence(self, outputs: Tensor) -> Tensor:
        """Return the logit in favour of the predicted class, (n,)."""
        return torch.where(outputs > 0.0, outputs, -outputs)

    def score(self, outputs: Tensor, targets: Targets) -> TaskSum:
        """Return the number of correct predictions; the second class is predicted if its probability is above 0.5."""
        known = self.labelled(targets)
        is_right = (self.read_out(outputs) > 0.5) == (targets[self.task] == 1)
        return TaskSum((known & is_right).sum().float(), known.sum().float())

"""A head for any number of classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.labels import CLASS_MISSING, LabelSpace
from agr_ray.models.heads.base import Head, Targets, TaskSum, linear


class Softmax(Head):
    """Outputs: (n, k) logits of the label space's k classes, in its order."""

    metric = "accuracy"

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:
        super().__init__()
        self.task = task
        self.missing_values = {task: CLASS_MISSING}
        self.layer = linear(num_features, len(space.classes[task]))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.layer(features)
        return logits

    def labelled(self, targets: Targets) -> Tensor:
        """Return which rows have a class, (n,) bool."""
        return targets[self.task] >= 0

    def losses(self, outputs: Tensor, targets: Targets, config: LossConfig) -> Tensor:
        """Return each row's cross-entropy (paper eq. 14, which lacks the minus sign)."""
        classes, known = targets[self.task], self.labelled(targets)
        finite = torch.where(known[:, None], outputs, 0.0)
        losses = F.cross_entropy(finite, classes.clamp(min=0), reduction="none", label_smoothing=config.label_smoothing)
        return torch.where(known, losses, 0.0)

    def read_out(self, outputs: Tensor) -> Tensor:
        """Return the probabilities, (n, k); each row sums to 1."""
        return outputs.softmax(dim=1)

    def evidence(self, outputs: Tensor) -> Tensor:
        """Return the logit of the most probable class, (n,)."""
        return outputs.amax(dim=1)

    def score(self, outputs: Tensor, targets: Targets) -> TaskSum:
        """Return the number of correct predictions: the most probable class."""
        known = self.labelled(targets)
        is_right = outputs.argmax(dim=1) == targets[self.task]
        return TaskSum((known & is_right).sum().float(), known.sum().float())

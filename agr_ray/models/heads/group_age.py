"""Classification of age groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from numpy.typing import NDArray
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.labels import AGE_MAX_YEARS, CLASS_MISSING, LabelSpace
from agr_ray.models.heads import ages
from agr_ray.models.heads.base import Head, Targets, TaskSum, linear

_OPEN_YEARS: Final = 10.0
"""In UTKFace, faces of 70 years or more are 80 on average."""


class GroupAge(Head):
    """Outputs: (n, k) logits of the label space's age groups, in its order.

    Source: Levi and Hassner, "Age and Gender Classification Using Convolutional Neural Networks", CVPR workshops 2015.
    The publication predicts no age in years. Here the prediction is the mean training age of the most probable group. A
    group without exact ages in training has its middle, and the last, open group an age of 10 years above its first. A
    range that spans several groups has no label.
    """

    missing_values = ages.MISSING_VALUES
    metric = "mae_years"
    group_years: Tensor
    edges_years: Tensor

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:  # noqa: ARG002  # as all heads
        super().__init__()
        self.space = space
        self.layer = linear(num_features, len(space.age_groups))
        spans = torch.tensor(space.age_ranges_years, dtype=torch.float32)
        middles = spans.mean(dim=1)
        if space.age_ranges_years[-1][1] == AGE_MAX_YEARS:
            middles[-1] = min(space.age_ranges_years[-1][0] + _OPEN_YEARS, AGE_MAX_YEARS)
        self.register_buffer("group_years", middles)
        self.register_buffer("edges_years", (spans[:-1, 1] + spans[1:, 0]) / 2, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.layer(features)
        return logits

    def labelled(self, targets: Targets) -> Tensor:
        """Return which rows have an age group, (n,) bool."""
        return self._groups(targets) >= 0

    def losses(self, outputs: Tensor, targets: Targets, config: LossConfig) -> Tensor:
        """Return each row's cross-entropy."""
        groups = self._groups(targets)
        known = groups >= 0
        finite = torch.where(known[:, None], outputs, 0.0)
        losses = F.cross_entropy(finite, groups.clamp(min=0), reduction="none", label_smoothing=config.label_smoothing)
        return torch.where(known, losses, 0.0)

    def read_out(self, outputs: Tensor) -> Tensor:
        """Return the age of the most probable group, years."""
        return self.group_years[outputs.argmax(dim=1)]

    def evidence(self, outputs: Tensor) -> Tensor:
        """Return the logit of the most probable group, (n,)."""
        return outputs.amax(dim=1)

    def mixed(self, outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return the age of the group with the highest mean probability: a mean of ages may be in another group."""
        probabilities = torch.stack([each.softmax(dim=1) for each in outputs])
        return self.group_years[(weights[:, :, None] * probabilities).sum(dim=0).argmax(dim=1)]

    def score(self, outputs: Tensor, targets: Targets) -> TaskSum:
        """Return the sum of |error|, years."""
        return ages.age_score(self.read_out(outputs), targets)

    def initialise(self, labels: Mapping[str, NDArray[Any]]) -> None:
        """Take each group's frequency among all labels, and its mean exact age."""
        years = np.asarray(labels["age"], np.float64)
        exact = self.space.age_group(years)
        for group in range(len(self.group_years)):
            if (exact == group).any():
                self.group_years[group] = float(years[exact == group].mean())
        groups = self._groups(self.targets(labels, len(years))).numpy()
        counts = np.bincount(groups[groups >= 0], minlength=len(self.group_years))
        with torch.no_grad():
            self.layer.bias.copy_(torch.from_numpy(np.log((counts + 1) / (counts + 1).sum())))

    def _groups(self, targets: Targets) -> Tensor:
        """Return each row's group, (n,) int64; -1: none, or a range that spans several."""
        truth = ages.age_truth(targets)
        first, last = (
            torch.bucketize(ends, self.edges_years, right=True) for ends in (truth.low_years, truth.high_years)
        )
        return torch.where(truth.is_labelled & (first == last), first, CLASS_MISSING)

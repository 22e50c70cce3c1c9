"""Conditional ordinal regression: CORN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from numpy.typing import NDArray
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.labels import LabelSpace
from agr_ray.models.heads import ages
from agr_ray.models.heads.base import Targets, linear
from agr_ray.models.heads.thresholds import THRESHOLDS_YEARS, Thresholds, share_above

_EPSILON: Final = 1e-6


class CornAge(Thresholds):
    """Each output is the logit of passing a threshold, given that the one before is passed; their product never rises.

    Source: Shi, Cao and Raschka, "Deep Neural Networks for Rank-Consistent Ordinal Regression Based on Conditional
    Probabilities", Pattern Analysis and Applications 26, 2023, equations 2 to 5. A row counts at a threshold only if it
    passes the one before. The publication divides the sum of all terms by the number of terms. Here a row's terms are
    added up, and the training loss is the mean over rows, which differs by a factor. The loss of an age range is the
    negative log probability of its years, rounded outwards.
    """

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:  # noqa: ARG002  # as all heads
        super().__init__()
        self.layer = linear(num_features, len(THRESHOLDS_YEARS))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.layer(features)
        return logits

    def losses(self, outputs: Tensor, targets: Targets, config: LossConfig) -> Tensor:  # noqa: ARG002  # no settings
        """Return the sum of the binary cross-entropies of each row's thresholds."""
        truth = ages.age_truth(targets)
        low = torch.where(truth.is_exact, truth.low_years, truth.low_years.floor())
        is_above = low[:, None] > self.thresholds_years
        passes_before = F.pad(is_above[:, :-1], (1, 0), value=True)
        # Of a range, these are the years below it: `_not_above` has the years inside.
        counts = torch.where(truth.is_exact[:, None], passes_before, is_above) & truth.is_labelled[:, None]
        finite = torch.where(counts, outputs, 0.0)
        losses = F.binary_cross_entropy_with_logits(finite, is_above.to(finite.dtype), reduction="none")
        return torch.where(counts, losses, 0.0).sum(dim=1) + self._not_above(outputs, truth)

    def _not_above(self, outputs: Tensor, truth: ages.AgeTruth) -> Tensor:
        """Return -log P(not above a range's last year | above all years before its first), (n,); 0 for an exact age."""
        low, high = truth.low_years.floor(), truth.high_years.ceil()
        is_range = truth.is_labelled & ~truth.is_exact & (high <= THRESHOLDS_YEARS[-1])
        is_inside = (self.thresholds_years >= low[:, None]) & (self.thresholds_years <= high[:, None])
        is_inside &= is_range[:, None]
        passes_all = torch.where(is_inside, F.logsigmoid(torch.where(is_inside, outputs, 0.0)), 0.0).sum(dim=1)
        # Of rows without a range, a constant, because the logarithm of 0 has no gradient.
        passes_all = torch.where(is_range, passes_all, -1.0).clamp(max=-_EPSILON)
        return torch.where(is_range, -torch.log(-torch.expm1(passes_all)), 0.0)

    def passed(self, outputs: Tensor) -> Tensor:
        """Return the products of the conditional probabilities."""
        return outputs.sigmoid().cumprod(dim=1)

    def initialise(self, labels: Mapping[str, NDArray[Any]]) -> None:
        """Predict a Gaussian with the training ages' mean and standard deviation at first."""
        moments = ages.mean_and_std_years(labels)
        if moments is not None:
            above = share_above(*moments, self.thresholds_years)
            before = F.pad(above[:-1], (1, 0), value=1.0)
            with torch.no_grad():
                # Some hundred probabilities are multiplied, so each may be off by far less than 1 %.
                self.layer.bias.copy_(torch.logit(above / before.clamp(min=1e-8), eps=1e-5))

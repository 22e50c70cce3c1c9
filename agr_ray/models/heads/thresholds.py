"""What the ordinal age heads share: a binary task "older than k years" for each year k."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS
from agr_ray.models.heads import ages
from agr_ray.models.heads.base import Head, Targets, TaskSum

THRESHOLDS_YEARS: Final = tuple(range(int(AGE_MIN_YEARS), int(AGE_MAX_YEARS)))
"""An age above k years passes threshold k."""


class Thresholds(Head):
    """Outputs: (n, thresholds) logits. The prediction is the number of thresholds that are passed, in years.

    A subclass defines `forward`, `losses` and `passed`.
    """

    missing_values = ages.MISSING_VALUES
    metric = "mae_years"
    thresholds_years: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("thresholds_years", torch.tensor(THRESHOLDS_YEARS, dtype=torch.float32), persistent=False)

    def labelled(self, targets: Targets) -> Tensor:
        """Return which rows have an age or a range, (n,) bool."""
        return ages.age_truth(targets).is_labelled

    def passed(self, outputs: Tensor) -> Tensor:
        """Return the probability that each threshold is passed, (n, thresholds), never rising."""
        raise NotImplementedError

    def read_out(self, outputs: Tensor) -> Tensor:
        """Return the number of thresholds passed with a probability above 1/2, years."""
        return AGE_MIN_YEARS + (self.passed(outputs) > 0.5).sum(dim=1).float()

    def evidence(self, outputs: Tensor) -> Tensor:
        """Return the expected number of thresholds passed, (n,)."""
        return self.passed(outputs).sum(dim=1)

    def distribution(self, outputs: Tensor) -> Tensor:
        """Return the probability of each year, (n, thresholds + 1)."""
        passed = self.passed(outputs)
        edges = torch.ones_like(passed[:, :1]), torch.zeros_like(passed[:, :1])
        return torch.cat([edges[0], passed], dim=1) - torch.cat([passed, edges[1]], dim=1)

    def score(self, outputs: Tensor, targets: Targets) -> TaskSum:
        """Return the sum of |error|, years."""
        return ages.age_score(self.read_out(outputs), targets)


def share_above(mean_years: float, std_years: float, thresholds_years: Tensor) -> Tensor:
    """Return the share of a Gaussian of ages in whole years that passes each threshold, (thresholds,)."""
    share: Tensor = torch.special.ndtr((mean_years - thresholds_years - 0.5) / std_years)
    return share

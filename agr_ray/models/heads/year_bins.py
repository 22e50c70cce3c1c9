"""What the age heads with a class for each year share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS, LabelSpace
from agr_ray.models.heads import ages
from agr_ray.models.heads.base import Head, Targets, TaskSum, linear

AGE_BINS_YEARS: Final = tuple(range(int(AGE_MIN_YEARS), int(AGE_MAX_YEARS) + 1))
"""One bin per year, over the range of valid labels."""


class AgeDistribution(NamedTuple):
    """Outputs of such a head for n faces."""

    logits: Tensor
    """(n, len(AGE_BINS_YEARS))."""
    years: Tensor
    """(n,) expectation of the distribution."""


class YearBins(Head):
    """A softmax over years; the prediction is the expectation. A subclass defines the loss of an age, `exact_losses`.

    The loss of an age range is the negative log probability of its years, rounded outwards.
    """

    missing_values = ages.MISSING_VALUES
    metric = "mae_years"
    bins_years: Tensor

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:  # noqa: ARG002  # as all heads
        super().__init__()
        self.layer = linear(num_features, len(AGE_BINS_YEARS))
        self.register_buffer("bins_years", torch.tensor(AGE_BINS_YEARS, dtype=torch.float32), persistent=False)

    def forward(self, features: Tensor) -> AgeDistribution:
        """Return logits and expectation."""
        logits = self.layer(features)
        return AgeDistribution(logits, logits.softmax(dim=1) @ self.bins_years)

    def labelled(self, targets: Targets) -> Tensor:
        """Return which rows have an age or a range, (n,) bool."""
        return ages.age_truth(targets).is_labelled

    def exact_losses(self, log_probs: Tensor, years: Tensor, truth: ages.AgeTruth, config: LossConfig) -> Tensor:
        """Return the loss of each row as if its age were `truth.low_years`, (n,).

        Args:
            log_probs: (n, bins); those of a row without a label are constant.
            years: (n,) the expectations.
            truth: ages and ranges.
            config: settings of the loss.
        """
        raise NotImplementedError

    def losses(self, outputs: AgeDistribution, targets: Targets, config: LossConfig) -> Tensor:
        """Return the loss of each row: `exact_losses` for an age, the negative log probability for a range."""
        truth = ages.age_truth(targets)
        bins = self.bins_years
        log_probs = torch.where(truth.is_labelled[:, None], outputs.logits, 0.0).log_softmax(dim=1)
        years = torch.where(truth.is_labelled, outputs.years, 0.0)
        of_ages = self.exact_losses(log_probs, years, truth, config)
        # Without a range no bin is masked: no infinite logarithm.
        is_inside = (bins >= truth.low_years.floor()[:, None]) & (bins <= truth.high_years.ceil()[:, None])
        is_range = truth.is_labelled & ~truth.is_exact
        of_ranges = -log_probs.masked_fill(is_range[:, None] & ~is_inside, -torch.inf).logsumexp(dim=1)
        return torch.where(is_range, of_ranges, torch.where(truth.is_exact, of_ages, 0.0))

    def read_out(self, outputs: AgeDistribution) -> Tensor:
        """Return the expectation, years."""
        return ages.clamped(outputs.years)

    def evidence(self, outputs: AgeDistribution) -> Tensor:
        """Return the expectation, (n,)."""
        return outputs.years

    def distribution(self, outputs: AgeDistribution) -> Tensor:
        """Return the probability of each year, (n, len(AGE_BINS_YEARS))."""
        return outputs.logits.softmax(dim=1)

    def score(self, outputs: AgeDistribution, targets: Targets) -> TaskSum:
        """Return the sum of |error|, years."""
        return ages.age_score(outputs.years, targets)

    def initialise(self, labels: Mapping[str, NDArray[Any]]) -> None:
        """Predict a Gaussian with the training ages' mean and standard deviation at first."""
        moments = ages.mean_and_std_years(labels)
        if moments is not None:
            mean, std = moments
            with torch.no_grad():
                self.layer.bias.copy_(-0.5 * ((self.bins_years - mean) / std).square())


def one_hot(ages_years: Tensor, bins_years: Tensor) -> Tensor:
    """Return (n, bins) targets: 1 at an age in whole years; an age between two years is shared between them."""
    return (1.0 - (bins_years - ages_years[:, None]).abs()).clamp(min=0.0)

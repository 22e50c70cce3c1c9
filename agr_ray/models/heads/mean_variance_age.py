"""Mean-variance loss."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.models.heads import ages
from agr_ray.models.heads.year_bins import YearBins, one_hot

MEAN_WEIGHT: Final = 0.2
VARIANCE_WEIGHT: Final = 0.05


class MeanVarianceAge(YearBins):
    """The loss is the cross-entropy, plus half the squared error of the mean and the variance, weighted 0.2 and 0.05.

    Source: Pan et al., "Mean-Variance Loss for Deep Age Estimation from a Face", CVPR 2018, equations 4 to 8, and
    section 4.2 for the weights.
    """

    def exact_losses(self, log_probs: Tensor, years: Tensor, truth: ages.AgeTruth, config: LossConfig) -> Tensor:  # noqa: ARG002
        """Return the three terms' weighted sum, (n,)."""
        cross_entropy = -(one_hot(truth.low_years, self.bins_years) * log_probs).sum(dim=1)
        mean_term = 0.5 * (years - truth.low_years).square()
        variance = (log_probs.exp() * (self.bins_years - years[:, None]).square()).sum(dim=1)
        return cross_entropy + MEAN_WEIGHT * mean_term + VARIANCE_WEIGHT * variance

"""Label distribution learning: DLDL-v2."""

from __future__ import annotations

import torch
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.models.heads import ages
from agr_ray.models.heads.year_bins import YearBins


class DistributionAge(YearBins):
    """The loss is the KL divergence from a Gaussian around the age, plus the weighted `age_loss` of the expectation.

    Source: Gao et al., "Age Estimation Using Expectation of Label Distribution Learning", IJCAI 2018 (DLDL-v2),
    equations 5 to 9; sigma is `loss.age_sigma_years`, lambda is `loss.age_expectation_weight`. A bin for each year
    from 0 to 116 instead of 0 to 100.
    """

    def exact_losses(self, log_probs: Tensor, years: Tensor, truth: ages.AgeTruth, config: LossConfig) -> Tensor:
        """Return divergence plus error, (n,)."""
        distances = (self.bins_years - truth.low_years[:, None]) / config.age_sigma_years
        target_log = torch.log_softmax(-0.5 * distances.square(), dim=1)
        divergence = (target_log.exp() * (target_log - log_probs)).sum(dim=1)
        return divergence + config.age_expectation_weight * ages.error_losses(years, truth, config)

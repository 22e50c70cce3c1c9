"""Soft labels for ordinal regression: SORD."""

from __future__ import annotations

from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.models.heads import ages
from agr_ray.models.heads.year_bins import YearBins


class SoftOrdinalAge(YearBins):
    """The loss is the KL divergence from a softmax of the negative distances to the age.

    Source: Diaz and Marathe, "Soft Labels for Ordinal Regression", CVPR 2019, equations 1 to 4. The distance is
    |years|. The target's entropy, a constant, is subtracted from the cross-entropy, so that a perfect prediction has
    the loss 0.
    """

    def exact_losses(self, log_probs: Tensor, years: Tensor, truth: ages.AgeTruth, config: LossConfig) -> Tensor:  # noqa: ARG002
        """Return the divergence, (n,)."""
        target_log = (-(self.bins_years - truth.low_years[:, None]).abs()).log_softmax(dim=1)
        return (target_log.exp() * (target_log - log_probs)).sum(dim=1)

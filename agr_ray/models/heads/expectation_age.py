"""Expectation of a softmax over years: DEX."""

from __future__ import annotations

from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.models.heads import ages
from agr_ray.models.heads.year_bins import YearBins, one_hot


class ExpectationAge(YearBins):
    """The loss is the cross-entropy of the year; only the prediction uses the expectation.

    Source: Rothe, Timofte and Van Gool, "Deep Expectation of Real and Apparent Age from a Single Image", IJCV 2018,
    section 3.2. An age between two years, which the publication does not have, is shared between them.
    """

    def exact_losses(self, log_probs: Tensor, years: Tensor, truth: ages.AgeTruth, config: LossConfig) -> Tensor:  # noqa: ARG002
        """Return the cross-entropy, (n,)."""
        return -(one_hot(truth.low_years, self.bins_years) * log_probs).sum(dim=1)

"""Two age heads, between which the predicted gender chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agr_ray.config import LossConfig
from agr_ray.labels import GENDERS
from agr_ray.models.heads import ages
from agr_ray.models.heads.base import Head, Targets, TaskSum


class RoutedOutputs(NamedTuple):
    """Outputs for n faces."""

    outputs: tuple[Any, ...]
    """Of each gender's head."""
    shares: Tensor
    """(n, genders) weight of each head; each row sums to 1."""


class RoutedAge(Head):
    """An age head for each gender, weighted by the **predicted** gender, in training and in prediction alike.

    The row "gender-specific age classification" of the paper's table 10 leaves the routing open. `soft` weights both
    heads by the probability of their gender, `hard` takes the one of the more probable gender. No gradient of the age
    passes to the gender head.

    Args:
        build: returns one age head.
        is_hard: whether the routing is hard.
    """

    def __init__(self, build: Callable[[], Head], *, is_hard: bool) -> None:
        super().__init__()
        self._is_hard = is_hard
        self.heads = nn.ModuleList(build() for _ in GENDERS)
        self.missing_values = self._first.missing_values
        self.metric = self._first.metric

    @property
    def _first(self) -> Head:
        head = self.heads[0]
        assert isinstance(head, Head)
        return head

    def forward(self, features: Tensor, p_second: Tensor | None = None) -> RoutedOutputs:
        """Return the outputs of both heads.

        Args:
            features: (n, num_features).
            p_second: (n,) predicted probability of the second gender.
        """
        assert p_second is not None
        p = p_second.detach()
        if self._is_hard:
            p = (p > 0.5).to(p.dtype)
        return RoutedOutputs(tuple(head(features) for head in self.heads), torch.stack([1.0 - p, p], dim=1))

    def labelled(self, targets: Targets) -> Tensor:
        """Return which rows have an age, (n,) bool."""
        return self._first.labelled(targets)

    def losses(self, outputs: RoutedOutputs, targets: Targets, config: LossConfig) -> Tensor:
        """Return the weighted sum of both heads' losses."""
        known = self.labelled(targets)
        shares = torch.where(known[:, None], outputs.shares, 0.0)
        losses = [head.losses(each, targets, config) for head, each in self._pairs(outputs)]
        return (shares * torch.stack(losses, dim=1)).sum(dim=1)

    def read_out(self, outputs: RoutedOutputs) -> Tensor:
        """Return the prediction from both heads' outputs, weighted."""
        return self._first.mixed(outputs.outputs, outputs.shares.T)

    def evidence(self, outputs: RoutedOutputs) -> Tensor:
        """Return the weighted evidence of both heads, (n,)."""
        each = torch.stack([head.evidence(part) for head, part in self._pairs(outputs)], dim=1)
        return (outputs.shares * each).sum(dim=1)

    def mixed(self, outputs: Sequence[RoutedOutputs], weights: Tensor) -> Tensor:
        """Return the prediction from all heads' outputs, weighted."""
        parts = [part for each in outputs for part in each.outputs]
        shares = [weight * each.shares.T for weight, each in zip(weights, outputs, strict=True)]
        return self._first.mixed(parts, torch.cat(shares))

    def distribution(self, outputs: RoutedOutputs) -> Tensor | None:
        """Return the weighted mean of both heads' distributions; None if they have none."""
        each = [head.distribution(part) for head, part in self._pairs(outputs)]
        known = [part for part in each if part is not None]
        if len(known) < len(each):
            return None
        return (outputs.shares[:, :, None] * torch.stack(known, dim=1)).sum(dim=1)

    def score(self, outputs: RoutedOutputs, targets: Targets) -> TaskSum:
        """Return the sum of |error|, years."""
        return ages.age_score(self.read_out(outputs), targets)

    def likelihood(self, config: LossConfig) -> tuple[float, float]:
        """Return a and b of one head."""
        return self._first.likelihood(config)

    def initialise(self, labels: Mapping[str, NDArray[Any]]) -> None:
        """Initialise both heads alike."""
        for head in self.heads:
            assert isinstance(head, Head)
            head.initialise(labels)

    def _pairs(self, outputs: RoutedOutputs) -> list[tuple[Head, Any]]:
        return [(head, each) for head, each in zip(self.heads, outputs.outputs, strict=True) if isinstance(head, Head)]

"""The interface of all heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agr_ray.config import LossConfig

Targets: TypeAlias = Mapping[str, Tensor]
"""Label arrays of n images by name, (n,) each: float32 with NaN for a missing label, or int64 with -1."""

_INITIAL_STD = 0.01


class TaskSum(NamedTuple):
    """A sum over rows, and the number of these rows; float32 scalars."""

    total: Tensor
    rows: Tensor


class Head(nn.Module):
    """Maps the features of n faces to the outputs of one task.

    A subclass sets `missing_values` and `metric` and defines `forward`, `labelled`, `losses`, `read_out` and `score`.
    """

    missing_values: Mapping[str, float | int]
    """Label arrays that it learns from, and the value of a missing label in each."""
    metric: str
    """Name of the mean of `score`: `mae_years` or `accuracy`."""

    def forward(self, features: Tensor) -> Any:
        """Return the raw outputs, one tensor or a tuple of tensors, of (n, num_features) float32."""
        raise NotImplementedError

    def labelled(self, targets: Targets) -> Tensor:
        """Return which rows have a label, (n,) bool."""
        raise NotImplementedError

    def losses(self, outputs: Any, targets: Targets, config: LossConfig) -> Tensor:
        """Return the loss of each row, (n,) float32.

        For a row without a label the loss is exactly 0, and its outputs, finite or not, get the gradient 0.
        """
        raise NotImplementedError

    def read_out(self, outputs: Any) -> Tensor:
        """Return the prediction, float32: (n,), or (n, k) probabilities of k classes."""
        raise NotImplementedError

    def evidence(self, outputs: Any) -> Tensor:
        """Return what explanations are of, (n,), differentiable: years, or the logit of the predicted class."""
        return self.read_out(outputs)

    def mixed(self, outputs: Sequence[Any], weights: Tensor) -> Tensor:
        """Return the prediction from several outputs for the same faces: the weighted mean of their predictions.

        Args:
            outputs: k outputs for n faces each, such as those of a crop and its mirror image.
            weights: (k, n), or (k, 1) if they are the same for all faces; each column sums to 1.
        """
        predictions = torch.stack([self.read_out(each) for each in outputs])
        shape = [*weights.shape] + [1] * (predictions.dim() - weights.dim())
        return (weights.reshape(shape) * predictions).sum(dim=0)

    def distribution(self, outputs: Any) -> Tensor | None:  # noqa: ARG002  # for subclasses
        """Return the probability of each year from 0 to `AGE_MAX_YEARS`, (n, years); None: the head has none."""
        return None

    def spread(self, outputs: Sequence[Any], weights: Tensor) -> Tensor | None:
        """Return the standard deviation of the predicted distribution, (n,) years; None: the head has none.

        Args:
            outputs: as in `mixed`; several distributions are averaged.
            weights: as in `mixed`.
        """
        each = [self.distribution(part) for part in outputs]
        known = [part for part in each if part is not None]
        if len(known) < len(each):
            return None
        distribution = (weights[:, :, None] * torch.stack(known)).sum(dim=0)
        years = torch.arange(distribution.shape[1], dtype=distribution.dtype, device=distribution.device)
        from_mean = years - (distribution @ years)[:, None]
        return (distribution * from_mean.square()).sum(dim=1).sqrt()

    def score(self, outputs: Any, targets: Targets) -> TaskSum:
        """Return the sum of |error| or the number of correct predictions, without waiting for the device."""
        raise NotImplementedError

    def loss(self, outputs: Any, targets: Targets, config: LossConfig, share: Tensor | None = None) -> TaskSum:
        """Return the sum of `losses` and the number of labelled rows.

        Args:
            outputs: of n images.
            targets: of the same images, on their device.
            config: settings of the loss.
            share: (n,) weight of each row; None: 1.
        """
        return TaskSum(weighted_sum(self.losses(outputs, targets, config), share), self.num_labelled(targets, share))

    def num_labelled(self, targets: Targets, share: Tensor | None = None) -> Tensor:
        """Return the number of labelled rows, or the sum of their weights; a float32 scalar."""
        return weighted_sum(self.labelled(targets), share).float()

    def weight(self, config: LossConfig, task: str) -> float:
        """Return the weight of the task's loss: the configuration's `TASK_weight`, or else 1."""
        return float(getattr(config, f"{task}_weight", 1.0))

    def configure(self, config: LossConfig) -> None:  # most heads need nothing
        """Take the settings that act in the backward pass; called before training."""

    def likelihood(self, config: LossConfig) -> tuple[float, float]:  # noqa: ARG002  # for subclasses
        """Return a and b of the table in `learn.losses`."""
        return 1.0, 0.5

    def initialise(self, labels: Mapping[str, NDArray[Any]]) -> None:  # most heads need nothing
        """Initialise the head so that it predicts typical values of the training labels."""

    def missing_targets(self, num_rows: int) -> dict[str, Tensor]:
        """Return targets on the CPU in which every label is missing."""
        return {
            name: torch.full((num_rows,), value, dtype=torch.int64 if isinstance(value, int) else torch.float32)
            for name, value in self.missing_values.items()
        }

    def targets(self, labels: Mapping[str, Any], num_rows: int) -> dict[str, Tensor]:
        """Return copies of this head's label arrays on the CPU; if an array is absent, all its labels are missing."""
        missing = self.missing_targets(num_rows)
        return {
            name: torch.tensor(np.asarray(labels[name]), dtype=empty.dtype) if name in labels else empty
            for name, empty in missing.items()
        }


def linear(num_features: int, num_outputs: int) -> nn.Linear:
    """Return a linear layer with small initial weights and bias 0, so that the bias alone sets the first outputs."""
    layer = nn.Linear(num_features, num_outputs)
    nn.init.normal_(layer.weight, std=min(_INITIAL_STD, 1.0 / math.sqrt(num_features)))
    nn.init.zeros_(layer.bias)
    return layer


def weighted_sum(rows: Tensor, share: Tensor | None) -> Tensor:
    """Return the sum of (n,) values, each multiplied by its weight."""
    return rows.sum() if share is None else (rows * share).sum()

"""Functions of all age heads: labels that are ages or age ranges, and the loss of an error in years."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from numpy.typing import NDArray
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS, AGE_MISSING
from agr_ray.models.heads.base import Targets, TaskSum

MISSING_VALUES: Final[Mapping[str, float | int]] = {"age": AGE_MISSING, "age_low": AGE_MISSING, "age_high": AGE_MISSING}
"""Values of missing labels, years. A row has an age, or a range with both bounds included, or neither."""


class AgeTruth(NamedTuple):
    """Ages and ranges of n rows; all values are finite."""

    low_years: Tensor
    """(n,); the age itself if it is exact; 0 without a label."""
    high_years: Tensor
    is_exact: Tensor
    """(n,) bool."""
    is_labelled: Tensor
    """(n,) bool."""


def age_truth(targets: Targets) -> AgeTruth:
    """Return the age or range of each row."""
    age = targets["age"]
    low, high = targets.get("age_low", age), targets.get("age_high", age)
    is_exact = torch.isfinite(age)
    is_labelled = is_exact | (torch.isfinite(low) & torch.isfinite(high))
    # Masked before any arithmetic: 0 * NaN is NaN, in the loss and in the gradient alike.
    bounds = [torch.where(is_labelled, torch.where(is_exact, age, bound), 0.0) for bound in (low, high)]
    return AgeTruth(bounds[0], bounds[1], is_exact, is_labelled)


def error_losses(ages_years: Tensor, truth: AgeTruth, config: LossConfig) -> Tensor:
    """Return the `age_loss` of the distance to each age or range, (n,); 0 inside a range and without a label."""
    ages = torch.where(truth.is_labelled, ages_years, 0.0)
    # Detached, so that no gradient passes through the nearest age of the range.
    nearest = torch.minimum(torch.maximum(ages.detach(), truth.low_years), truth.high_years)
    errors = (ages - nearest) / config.age_scale_years
    if config.age_loss == "mse":
        return errors.square()
    if config.age_loss == "huber":
        delta = config.huber_delta_years / config.age_scale_years
        return F.huber_loss(errors, torch.zeros_like(errors), reduction="none", delta=delta)
    return errors.abs()


def error_likelihood(config: LossConfig) -> tuple[float, float]:
    """Return `Head.likelihood` of the `age_loss`."""
    return {"mse": (0.5, 0.5), "huber": (1.0, 0.5), "l1": (1.0, 1.0)}[config.age_loss]


def clamped(ages_years: Tensor) -> Tensor:
    """Return ages clamped to the range of valid labels."""
    return ages_years.clamp(AGE_MIN_YEARS, AGE_MAX_YEARS)


def age_score(ages_years: Tensor, targets: Targets) -> TaskSum:
    """Return the sum of |error|, years, and the number of exact ages: a range has no error in years."""
    known = torch.isfinite(targets["age"])
    errors = (clamped(ages_years) - targets["age"]).abs()
    return TaskSum(torch.where(known, errors, 0.0).sum(), known.sum().float())


def mean_and_std_years(labels: Mapping[str, NDArray[Any]]) -> tuple[float, float] | None:
    """Return mean and standard deviation (at least 1) of ages and of ranges' centres; None if no row has either."""
    ages = np.asarray(labels["age"], np.float64)
    if "age_low" in labels:
        centres = 0.5 * (np.asarray(labels["age_low"], np.float64) + np.asarray(labels["age_high"], np.float64))
        ages = np.where(np.isfinite(ages), ages, centres)
    ages = ages[np.isfinite(ages)]
    return (float(ages.mean()), max(float(ages.std()), 1.0)) if len(ages) else None

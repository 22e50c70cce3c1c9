"""What the age heads have in common: ages and age ranges as labels, and the loss of an error in years."""

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
"""Years. A row has an age, or a range (both bounds, included), or neither."""


class AgeTruth(NamedTuple):
    """Ages and ranges of n rows, finite in all of them."""

    low_years: Tensor
    """(n,); the age where it is exact; 0 where there is no label."""
    high_years: Tensor
    is_exact: Tensor
    """(n,) bool."""
    is_labelled: Tensor
    """(n,) bool."""


def age_truth(targets: Targets) -> AgeTruth:
    """Return each row's age, or range."""
    age = targets["age"]
    low, high = targets.get("age_low", age), targets.get("age_high", age)
    is_exact = torch.isfinite(age)
    is_labelled = is_exact | (torch.isfinite(low) & torch.isfinite(high))
    # Masked before any arithmetic: 0 * NaN is NaN, in the loss and in the gradient alike.
    bounds = [torch.where(is_labelled, torch.where(is_exact, age, bound), 0.0) for bound in (low, high)]
    return AgeTruth(bounds[0], bounds[1], is_exact, is_labelled)


def error_losses(ages_years: Tensor, truth: AgeTruth, config: LossConfig) -> Tensor:
    """Return the `age_loss` of the distance to each age or range, 0 inside a range and where there is no label."""
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
    """Return ages within the range that labels may have."""
    return ages_years.clamp(AGE_MIN_YEARS, AGE_MAX_YEARS)


def age_score(ages_years: Tensor, targets: Targets) -> TaskSum:
    """Return the sum of |error|, years, and the number of exact ages: a range has no error in years."""
    known = torch.isfinite(targets["age"])
    errors = (clamped(ages_years) - targets["age"]).abs()
    return TaskSum(torch.where(known, errors, 0.0).sum(), known.sum().float())


def mean_and_std_years(labels: Mapping[str, NDArray[Any]]) -> tuple[float, float] | None:
    """Return mean and standard deviation, 1 at least, of ages and of ranges' centres; none: no row has either."""
    ages = np.asarray(labels["age"], np.float64)
    if "age_low" in labels:
        centres = 0.5 * (np.asarray(labels["age_low"], np.float64) + np.asarray(labels["age_high"], np.float64))
        ages = np.where(np.isfinite(ages), ages, centres)
    ages = ages[np.isfinite(ages)]
    return (float(ages.mean()), max(float(ages.std()), 1.0)) if len(ages) else None

"""What training shows of its steps: errors and right answers, added up on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS, GENDERS
from agr_ray.learn.losses import Targets
from agr_ray.models.network import Outputs


@torch.no_grad()
def running_sums(outputs: Outputs, targets: Targets) -> Tensor:
    """Count one step's images as `metrics.MetricSums` does, but without waiting for the device.

    Args:
        outputs: of n images.
        targets: of the same, on their device. Of mixed images their own, whatever they were mixed with.

    Returns:
        (6,) float32, in the order of `TASKS`: sum of |error| in years, right genders, right races; then how many
        images each is of, those with a label and a head.
    """
    zero = torch.zeros((), device=targets.age.device)
    sums, counts = [zero, zero, zero], [zero, zero, zero]
    if outputs.age_years is not None:
        known = torch.isfinite(targets.age)
        errors = (outputs.age_years.clamp(AGE_MIN_YEARS, AGE_MAX_YEARS) - targets.age).abs()
        sums[0], counts[0] = torch.where(known, errors, 0.0).sum(), known.sum()
    if outputs.gender_logit is not None:
        known = targets.gender >= 0
        is_male = outputs.gender_logit.sigmoid() > 0.5
        sums[1], counts[1] = (known & (is_male == (targets.gender == GENDERS.index("male")))).sum(), known.sum()
    if outputs.race_logits is not None:
        known = targets.race >= 0
        sums[2], counts[2] = (known & (outputs.race_logits.argmax(dim=1) == targets.race)).sum(), known.sum()
    return torch.stack([each.float() for each in sums + counts])

"""Running metrics of training steps, for display, summed on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agr_ray.learn.losses import Heads
from agr_ray.models.heads.base import Targets
from agr_ray.models.network import Outputs


@torch.no_grad()
def running_sums(heads: Heads, outputs: Outputs, targets: Targets) -> Tensor:
    """Return the sums of `Head.score` in one step, without waiting for the device.

    Args:
        heads: of the network.
        outputs: of n images.
        targets: of the same images, on their device; for mixed images, their own labels.

    Returns:
        (2 * tasks,) float32: the sum of each task, then the number of rows of each.
    """
    scores = [head.score(outputs[task], targets) for task, head in heads.items()]
    return torch.stack([score.total for score in scores] + [score.rows for score in scores])


def running_metrics(heads: Heads, sums_and_counts: Sequence[float]) -> dict[str, float]:
    """Return the means of `running_sums` by `TASK_METRIC`, such as `age_mae_years`. Leave out tasks without a label."""
    sums, counts = sums_and_counts[: len(heads)], sums_and_counts[len(heads) :]
    parts = zip(heads.items(), sums, counts, strict=True)
    return {f"{task}_{head.metric}": total / count for (task, head), total, count in parts if count}

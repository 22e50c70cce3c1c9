"""L = sum of w_task L_task over labelled rows only (paper eqs 11 to 14, 21).

Each task's loss is its sum over the labelled rows of all ranks, divided by their number. DDP averages gradients over
ranks, which have different numbers of labels. So a rank's loss is its own sum, divided by the number of labels on all
ranks and multiplied by the number of ranks: the average is then the exact gradient.

With `LossConfig.weighting` = `uncertainty` the weights are learnt: a task with loss L and learnt s adds a exp(-s) L +
b s, the negative log-likelihood with the scale exp(s) (Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty
to Weigh Losses", CVPR 2018, eqs 7 and 10). A head's `likelihood` gives a and b:

    loss                    likelihood           exp(s)     a     b
    age, mse                Gaussian             sigma^2    1/2   1/2
    age, huber              nearly Gaussian      sigma^2    1     1/2
    age, l1                 Laplace              scale      1     1
    age of `distribution`,  softmax of logits    sigma^2    1     1/2
    gender, race            over sigma^2
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.learn.mix import Mix
from agr_ray.models.heads.base import Head, Targets
from agr_ray.models.network import Outputs

Heads: TypeAlias = Mapping[str, Head]
"""The network's heads by task. A tensor with an entry for each task is in this order."""


class TaskSums(NamedTuple):
    """Unweighted losses of this rank's rows, one entry for each task."""

    sums: Tensor
    """(tasks,) float32, detached."""
    counts: Tensor
    """(tasks,) float32, labelled rows; for mixed images, the sum of their labels' weights."""


def label_counts(heads: Heads, targets: Targets, mix: Mix | None = None) -> Tensor:
    """Return the number of rows with a label, (tasks,) float32 on the targets' device.

    For mixed images, return the sum of their labels' weights.
    """
    counts = [
        torch.stack([head.num_labelled(part, share) for head in heads.values()])
        for part, share in _learnt(targets, mix)
    ]
    return torch.stack(counts).sum(dim=0)


def loss_weights(config: LossConfig, heads: Heads) -> list[float]:
    """Return the weight of each task."""
    return [head.weight(config, task) for task, head in heads.items()]


def weighted_loss(config: LossConfig, heads: Heads, sums: Iterable[float], counts: Iterable[float]) -> float:
    """Return the weighted sum of the tasks' means; a task without a label adds nothing."""
    parts = zip(loss_weights(config, heads), sums, counts, strict=True)
    return sum(weight * total / count for weight, total, count in parts if count)


def first_log_variances(heads: Heads, config: LossConfig) -> Tensor:
    """Return the initial s of each task with `uncertainty`, (tasks,) float32: those that give the fixed weights."""
    factors = [head.likelihood(config)[0] for head in heads.values()]
    return torch.tensor([math.log(a / w) for a, w in zip(factors, loss_weights(config, heads), strict=True)])


def multi_task_loss(
    heads: Heads,
    outputs: Outputs,
    targets: Targets,
    config: LossConfig,
    counts_total: Tensor,
    world_size: int = 1,
    log_variances: Tensor | None = None,
    mix: Mix | None = None,
    rows: slice = slice(None),
    num_parts: int = 1,
) -> tuple[Tensor, TaskSums]:
    """Return the loss to differentiate, and the sums and counts to report.

    With gradient accumulation, the losses, sums and counts of the micro-batches add up to those of the batch.

    A task without any label adds exactly zero, but stays in the graph, so that DDP finds a gradient for every
    parameter. Non-finite values in unlabelled rows reach neither the loss nor a gradient.

    Args:
        heads: of the network.
        outputs: of `rows`, float32.
        targets: of this rank's batch.
        config: the weights, and the age head's loss.
        counts_total: (tasks,) sum of `label_counts` over all ranks. Below 1, as mixed images can have it, it counts
            as 1.
        world_size: number of ranks over which gradients are averaged.
        log_variances: (tasks,) the learnt s, the same on all ranks; a task without a label on any rank does not change
            its own. None: the weights are fixed.
        mix: how the images were mixed, on the targets' device; `counts_total` must be of the same mix. None: not mixed.
        rows: rows of the batch in this micro-batch.
        num_parts: number of micro-batches.

    Returns:
        A scalar, and this rank's `TaskSums`.
    """
    device = next(iter(targets.values())).device
    stacked, counts = torch.zeros(len(heads), device=device), torch.zeros(len(heads), device=device)
    for part, share in _learnt(targets, mix, rows):
        losses = [head.loss(outputs[task], part, config, share) for task, head in heads.items()]
        stacked = stacked + torch.stack([each.total for each in losses])
        counts += torch.stack([each.rows for each in losses])
    totals = counts_total.to(device, stacked.dtype).clamp(min=1.0)
    if log_variances is None:
        weights = torch.tensor(loss_weights(config, heads), device=device)
        loss = world_size * (weights * stacked / totals).sum()
    else:
        a, b = torch.tensor([head.likelihood(config) for head in heads.values()], device=device).unbind(dim=1)
        is_learnt = counts_total.to(device) > 0
        # Each rank adds b s without `world_size`, because the average over ranks is b s again.
        scales = b * log_variances * is_learnt / num_parts
        loss = (world_size * a * torch.exp(-log_variances) * stacked / totals + scales).sum()
    return loss, TaskSums(stacked.detach(), counts)


def rows_of(targets: Targets, rows: slice | Tensor) -> Targets:
    """Return the targets of some rows."""
    return {name: values[rows] for name, values in targets.items()}


def _learnt(targets: Targets, mix: Mix | None, rows: slice = slice(None)) -> list[tuple[Targets, Tensor | None]]:
    """Return the labels to learn, with the (n,) weights of their rows; None: all have weight 1."""
    own = rows_of(targets, rows)
    if mix is None:
        return [(own, None)]
    return [(own, mix.share[rows]), (rows_of(targets, mix.partner[rows]), 1.0 - mix.share[rows])]

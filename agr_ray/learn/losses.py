"""L = w_age L_age + w_gender L_gender + w_race L_race over labelled rows only (paper eqs 11 to 14, 21).

Each task's loss is its sum over the rows of all ranks that have its label, divided by their number.
DDP averages gradients over ranks, which see different numbers of labels, so a rank's loss is its own
sum over the number on all ranks, times the number of ranks: the average is then the exact gradient.

With `LossConfig.weighting` of `uncertainty` the weights are learnt: a task of loss L and learnt s adds
a exp(-s) L + b s, the negative log-likelihood whose scale is exp(s) (Kendall, Gal and Cipolla, "Multi-Task
Learning Using Uncertainty to Weigh Losses", CVPR 2018, eqs 7 and 10):

    loss                    likelihood           exp(s)     a     b
    age, mse                Gaussian             sigma^2    1/2   1/2
    age, huber              nearly Gaussian      sigma^2    1     1/2
    age, l1                 Laplace              its b      1     1
    age of `distribution`,  softmax of logits    sigma^2    1     1/2
    gender, race            over sigma^2
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.learn.mix import Mix
from agr_ray.models.network import AGE_BINS_YEARS, Outputs


class Targets(NamedTuple):
    """Labels of n images."""

    age: Tensor
    """(n,) float32, years; NaN: missing."""
    gender: Tensor
    """(n,) int64, index in the label space; -1: missing."""
    race: Tensor
    """(n,) int64, index in the label space; -1: missing."""


class TaskSums(NamedTuple):
    """Unweighted losses of this rank's rows, one entry for each of `TASKS`."""

    sums: Tensor
    """(3,) float32, detached."""
    counts: Tensor
    """(3,) float32, rows that have the label and a head; of mixed images, shares."""


def label_counts(targets: Targets, mix: Mix | None = None) -> Tensor:
    """Return how many rows have a label, (3,) float32 on the targets' device, one entry for each of `TASKS`.

    Of mixed images, the sum of the shares that are labelled.
    """
    counts = [torch.stack([_total(mask, share) for mask in _masks(part)]) for part, share in _parts(targets, mix)]
    return torch.stack(counts).float().sum(dim=0)


def loss_weights(config: LossConfig) -> tuple[float, float, float]:
    """Return the weights in the order of `TASKS`."""
    return config.age_weight, config.gender_weight, config.race_weight


def first_log_variances(config: LossConfig, *, has_age_bins: bool) -> Tensor:
    """Return the s of each of `TASKS` from which `uncertainty` begins, (3,) float32: they give the fixed weights."""
    factors, _ = _likelihood(config, has_age_bins=has_age_bins)
    return torch.tensor([math.log(a / weight) for a, weight in zip(factors, loss_weights(config), strict=True)])


def multi_task_loss(
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

    Of a batch that is taken in parts, the parts' losses, sums and counts add up to those of the batch.

    A task whose labels all are missing adds exactly zero, but stays in the graph, so that DDP finds a
    gradient for every parameter. Nothing non-finite in an unlabelled row reaches the loss or a gradient.

    Args:
        outputs: of `rows`, float32.
        targets: of this rank's batch.
        config: the weights, and the age head's loss.
        counts_total: (3,) `label_counts` summed over all ranks; less than 1, as of mixed images, is taken for 1.
        world_size: the number of ranks that gradients will be averaged over.
        log_variances: (3,) the learnt s of each of `TASKS`, alike on all ranks; that of a task without a label on any
            rank is left alone. None: the weights are fixed.
        mix: how the images were mixed, on the targets' device; `counts_total` must know of it. None: they were not.
        rows: of the batch, those that this part has.
        num_parts: how many parts the batch is taken in.

    Returns:
        A scalar, and this rank's `TaskSums`.
    """
    zero = torch.zeros((), device=targets.age.device)
    heads = (outputs.age_years, outputs.gender_logit, outputs.race_logits)
    stacked, counts = torch.zeros(3, device=zero.device), torch.zeros(3, device=zero.device)
    for part, share in _parts(targets, mix, rows):
        masks = _masks(part)
        losses = (
            None if heads[0] is None else _age_losses(outputs, part.age, masks[0], config),
            None if heads[1] is None else _gender_losses(heads[1], part.gender, masks[1], config),
            None if heads[2] is None else _race_losses(heads[2], part.race, masks[2], config),
        )
        stacked = stacked + torch.stack([zero if rows is None else _total(rows, share) for rows in losses])
        labelled = zip(heads, masks, strict=True)
        counts += torch.stack([zero if head is None else _total(mask, share) for head, mask in labelled])
    totals = counts_total.to(stacked.device, stacked.dtype).clamp(min=1.0)
    if log_variances is None:
        weights = torch.tensor(loss_weights(config), device=stacked.device)
        loss = world_size * (weights * stacked / totals).sum()
    else:
        a, b = torch.tensor(_likelihood(config, has_age_bins=outputs.age_logits is not None), device=stacked.device)
        is_learnt = torch.tensor([head is not None for head in heads], device=stacked.device)
        is_learnt &= counts_total.to(stacked.device) > 0
        # Each rank adds the whole of b s: averaged over ranks it is itself.
        scales = b * log_variances * is_learnt / num_parts
        loss = (world_size * a * torch.exp(-log_variances) * stacked / totals + scales).sum()
    return loss, TaskSums(stacked.detach(), counts)


def _masks(targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the labels of each of `TASKS` are, (n,) bool each."""
    return torch.isfinite(targets.age), targets.gender >= 0, targets.race >= 0


def _parts(targets: Targets, mix: Mix | None, rows: slice = slice(None)) -> list[tuple[Targets, Tensor | None]]:
    """Return what n rows are to learn: labels, and the (n,) weights of the rows; None: each counts once."""
    own = Targets(*(values[rows] for values in targets))
    if mix is None:
        return [(own, None)]
    partners = Targets(*(values[mix.partner[rows]] for values in targets))
    return [(own, mix.share[rows]), (partners, 1.0 - mix.share[rows])]


def _total(rows: Tensor, share: Tensor | None) -> Tensor:
    return rows.sum() if share is None else (rows * share).sum()


def _likelihood(config: LossConfig, *, has_age_bins: bool) -> tuple[tuple[float, float, float], ...]:
    """Return a and b of the table above, each for all of `TASKS`."""
    age = (1.0, 0.5) if has_age_bins else {"mse": (0.5, 0.5), "huber": (1.0, 0.5), "l1": (1.0, 1.0)}[config.age_loss]
    return (age[0], 1.0, 1.0), (age[1], 0.5, 0.5)


def _age_losses(outputs: Outputs, age_years: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """Return the loss of each error (L1, eq. 12), or DLDL-v2's divergence and that of the expectation's error.

    Source: Gao et al., "Age Estimation Using Expectation of Label Distribution Learning", IJCAI 2018.
    """
    assert outputs.age_years is not None
    # Masked before the arithmetic: 0 * NaN is NaN, in the loss and in the gradient alike.
    truth = torch.where(mask, age_years, 0.0)
    losses = _error_loss(torch.where(mask, outputs.age_years, 0.0) - truth, config)
    if outputs.age_logits is None:
        return losses
    logits = torch.where(mask[:, None], outputs.age_logits, 0.0)
    bins = torch.tensor(AGE_BINS_YEARS, dtype=logits.dtype, device=logits.device)
    target_log = torch.log_softmax(-0.5 * ((bins - truth[:, None]) / config.age_sigma_years).square(), dim=1)
    divergence = (target_log.exp() * (target_log - torch.log_softmax(logits, dim=1))).sum(dim=1)
    return torch.where(mask, divergence + config.age_expectation_weight * losses, 0.0)


def _error_loss(errors_years: Tensor, config: LossConfig) -> Tensor:
    """Return the `age_loss` of errors; of none it is exactly zero."""
    errors = errors_years / config.age_scale_years
    if config.age_loss == "mse":
        return errors.square()
    if config.age_loss == "huber":
        delta = config.huber_delta_years / config.age_scale_years
        return F.huber_loss(errors, torch.zeros_like(errors), reduction="none", delta=delta)
    return errors.abs()


def _gender_losses(logit: Tensor, gender: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """Return each row's binary cross-entropy (eq. 13, with the minus sign that it lacks)."""
    truth = gender.clamp(min=0).float() * (1.0 - config.label_smoothing) + 0.5 * config.label_smoothing
    losses = F.binary_cross_entropy_with_logits(torch.where(mask, logit, 0.0), truth, reduction="none")
    return torch.where(mask, losses, 0.0)


def _race_losses(logits: Tensor, race: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """Return each row's cross-entropy (eq. 14, with the minus sign that it lacks)."""
    finite = torch.where(mask[:, None], logits, 0.0)
    losses = F.cross_entropy(finite, race.clamp(min=0), reduction="none", label_smoothing=config.label_smoothing)
    return torch.where(mask, losses, 0.0)

"""Validation: metrics and loss over the rows of all ranks, each counted once."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from agr_ray.config import LossConfig, PredictConfig
from agr_ray.evaluation.groups import GroupSums
from agr_ray.evaluation.metrics import Baseline, MetricSums
from agr_ray.labels import Labels
from agr_ray.learn.batches import image_ids, num_rows, targets_of, to_device
from agr_ray.learn.context import Context
from agr_ray.learn.losses import label_counts, multi_task_loss, weighted_loss
from agr_ray.learn.monitor import NonFiniteLossError, describe
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.network_input import to_nchw
from agr_ray.models.transform import Transform
from agr_ray.predict.forward import average, infer


class Validation(NamedTuple):
    """Results of a validation, the same on all ranks."""

    metrics: dict[str, Any]
    """As in `EpochReport.metrics`."""
    loss: float | None
    """None: no row has a label."""
    num_rows: int


def validate(
    context: Context,
    model: MultiTaskNet,
    transform: Transform,
    loss_config: LossConfig,
    predict_config: PredictConfig,
    baseline: Baseline,
    when: str,
) -> Validation:
    """Validate on `context.val_batches`.

    Args:
        context: provides the batches, and sums over ranks.
        model: is put into evaluation mode.
        transform: of this epoch.
        loss_config: settings of the loss.
        predict_config: settings of the predictions.
        baseline: constant baseline, measured on the same rows.
        when: epoch and step, for errors.

    Raises:
        NonFiniteLossError: the loss is not finite; raised on all ranks.
    """
    model.eval()
    heads, device, space = model.heads_by_task, context.device, model.space
    groups, guesses = GroupSums(space), MetricSums(space)
    losses = torch.zeros(2 * len(heads), dtype=torch.float64)
    bad_ids: list[str] | None = None
    for batch in context.val_batches():
        if not num_rows(batch):
            continue
        labels = Labels.from_arrays(space, batch)
        targets = to_device(targets_of(heads, batch), device)
        views = infer(model, to_nchw(batch["crop"], device), transform, predict_config, batch.get("pose"))
        _, tasks = multi_task_loss(heads, views[0], targets, loss_config, label_counts(heads, targets))
        losses += torch.cat([tasks.sums, tasks.counts]).double().cpu()
        if bad_ids is None and not torch.isfinite(losses).all():
            bad_ids = image_ids(batch)
        predictions = average(heads, views)
        groups.update(labels, predictions)
        guessed = baseline.predict(num_rows(batch))
        guesses.update(labels, {task: guess for task, guess in guessed.items() if task in predictions})
    parts = (losses.numpy(), guesses.vector, groups.sums.vector)
    total = context.all_reduce_sum(torch.from_numpy(np.concatenate(parts))).numpy()
    ends = np.cumsum([part.size for part in parts])
    summed, guesses.vector[:], groups.sums.vector[:] = np.split(total, ends[:-1])
    task_sums, task_counts = np.split(summed, 2)
    loss = None
    if task_counts.any():
        loss = weighted_loss(loss_config, heads, task_sums.tolist(), task_counts.tolist())
        if not math.isfinite(loss):
            losses_by_task = describe(list(heads), task_sums.tolist(), task_counts.tolist())
            raise NonFiniteLossError(f"{when}, on validation: loss {loss}: {losses_by_task}", bad_ids)
    metrics = {**groups.sums.to_json(), "baseline": guesses.to_json(), "groups": groups.to_json()}
    return Validation(metrics, loss, metrics["n"])

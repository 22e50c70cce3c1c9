"""Optimisers, learning rates and the moving average of weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from agr_ray.config import TrainConfig
from agr_ray.models.network import MultiTaskNet

_WARMUP_START = 1.0 / 25.0
_ONE_CYCLE_END = 1.0 / 25.0e4
_SGD_MOMENTUM = 0.9


def build_optimizer(
    model: MultiTaskNet, config: TrainConfig, log_variances: nn.Parameter | None = None
) -> torch.optim.Optimizer:
    """Build the optimiser (the paper's: Adam, betas 0.9 and 0.999, eq. 19).

    AdamW decays weights only, never biases and norms; Adam and SGD add L2 to all, as the paper's would. Each group
    of parameters has an `lr_scale`, by which `set_learning_rate` multiplies (`TrainConfig.layer_decay`). Frozen
    parameters are in it too, and stand still as long as they have no gradient. The loss's `log_variances`, where they
    are learnt, have the full rate and no weight decay.
    """
    groups: list[dict[str, Any]] = []
    for parameters, lr_scale in _layers(model, config.layer_decay):
        split = [(parameters, config.weight_decay)]
        if config.optimizer == "adamw":
            split = [
                ([p for p in parameters if p.ndim > 1], config.weight_decay),
                ([p for p in parameters if p.ndim <= 1], 0.0),
            ]
        groups += [{"params": part, "weight_decay": decay, "lr_scale": lr_scale} for part, decay in split if part]
    if log_variances is not None:
        groups.append({"params": [log_variances], "weight_decay": 0.0, "lr_scale": 1.0})
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr, fused=True)
    if config.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=config.lr, momentum=_SGD_MOMENTUM, nesterov=True, fused=True)
        # Without them, fused SGD breaks where a frozen backbone joins later, and starts from uninitialised memory where
        # the first gradients overflow.
        sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for group in groups for p in group["params"]})
        return sgd
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def backbone_stages(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """Return the backbone's parameters in stages, from the image to the features.

    A stage begins at each block that makes the image smaller, by a convolution or by pooling. torchvision's ResNets
    and MobileNetV3s have five, at 1/2 to 1/32 of the input's side.
    """
    stages: list[list[nn.Parameter]] = [[]]
    for child in backbone.children():
        for block in child if isinstance(child, nn.Sequential) else [child]:
            if stages[-1] and any(map(_shrinks, block.modules())):
                stages.append([])
            stages[-1].extend(block.parameters())
    assert sum(map(len, stages)) == len(list(backbone.parameters())), "a parameter outside the backbone's blocks"
    return stages


def learning_rate(epochs_done: float, config: TrainConfig, num_cuts: int = 0) -> float:
    """Return the learning rate of the step that begins after so many epochs, a fraction within one.

    A function of progress alone, so a resumed run needs no state of it, and an epoch that happens to
    have a step more than foreseen shifts nothing.

    `step`: times gamma each `step_size_epochs` (eq. 20). `one_cycle`: from 1/25 of `lr` up in the share
    `warmup` of the run, then down to nearly 0, both along a cosine (Smith and Topin, arXiv 1708.07120).
    `cosine`: straight up from 1/25 in the share `warmup`, then down to 0. `plateau`: times gamma for each
    of the `num_cuts` that `plateau_cuts` counts.
    """
    progress = min(max(epochs_done / config.epochs, 0.0), 1.0)
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "step":
        # Rounded, because a sum of fractions of epochs may end a hair before the whole number.
        factor = config.gamma ** int(round(epochs_done, 6) // config.step_size_epochs)
    elif config.schedule == "plateau":
        factor = config.gamma**num_cuts
    elif config.schedule == "one_cycle":
        if progress < config.warmup:
            factor = _cosine(_WARMUP_START, 1.0, progress / config.warmup)
        else:
            factor = _cosine(1.0, _ONE_CYCLE_END, _share(progress - config.warmup, 1.0 - config.warmup))
    elif progress < config.warmup:
        factor = _WARMUP_START + (1.0 - _WARMUP_START) * progress / config.warmup
    else:
        factor = _cosine(1.0, 0.0, _share(progress - config.warmup, 1.0 - config.warmup))
    return config.lr * factor


def plateau_cuts(objectives: Iterable[float | None], config: TrainConfig) -> int:
    """Count how often `plateau` has cut the learning rate after epochs with these objectives on validation.

    A cut comes after `plateau_epochs` epochs none of which was better than all before, and the next one not until
    as many more were not. None, an epoch without a labelled validation row, says nothing either way.
    """
    best, num_stale, num_cuts = math.inf, 0, 0
    for score in objectives:
        if score is None:
            continue
        num_stale = 0 if score < best else num_stale + 1
        best = min(score, best)
        if num_stale == config.plateau_epochs:
            num_stale, num_cuts = 0, num_cuts + 1
    return num_cuts


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set it for all parameters, scaled as `build_optimizer` says."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class Ema:
    """An exponential moving average of a network's weights; batch norm's statistics are copied.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the first steps' weights fade soon.
    """

    def __init__(self, model: MultiTaskNet, decay: float, num_updates: int = 0) -> None:
        """Begin from the model's weights; `num_updates` continues an average that they are."""
        self.decay = decay
        self.num_updates = num_updates
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: MultiTaskNet) -> None:
        """Take in the weights after an optimiser step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(averages, [p.detach() for p in model.parameters()], 1.0 - decay)

    @torch.no_grad()
    def copy_buffers(self, model: MultiTaskNet) -> None:
        """Take over batch norm's statistics; needed only before the average is used."""
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


def _layers(model: MultiTaskNet, decay: float) -> list[tuple[list[nn.Parameter], float]]:
    """Return all parameters in parts, each with its share of the learning rate."""
    if decay == 1.0:
        return [(list(model.parameters()), 1.0)]
    stages = backbone_stages(model.backbone)
    in_backbone = {id(parameter) for stage in stages for parameter in stage}
    heads = [parameter for parameter in model.parameters() if id(parameter) not in in_backbone]
    return [*((stage, decay ** (len(stages) - k)) for k, stage in enumerate(stages)), (heads, 1.0)]


def _shrinks(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return False
    stride = module.stride
    return (max(stride) if isinstance(stride, tuple) else stride) > 1


def _cosine(start: float, end: float, share: float) -> float:
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * share))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 1.0

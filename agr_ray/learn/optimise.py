"""Optimisers and the moving average of weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from agr_ray.config import TrainConfig
from agr_ray.models.network import MultiTaskNet

_SGD_MOMENTUM = 0.9


def build_optimizer(
    model: MultiTaskNet, config: TrainConfig, log_variances: nn.Parameter | None = None
) -> torch.optim.Optimizer:
    """Build the optimiser (the paper's: Adam, betas 0.9 and 0.999, eq. 19).

    AdamW decays only matrices and kernels: parameters named `weight` with two or more dimensions. It does not decay
    biases, norms, position embeddings and layer scales. Adam and SGD apply L2 to all parameters. Each parameter group
    has an `lr_scale`, by which `set_learning_rate` multiplies the rate (`TrainConfig.layer_decay`). Frozen parameters
    are included; they do not change while they have no gradient. The loss's `log_variances`, if they are learnt, have
    the full rate and no weight decay.
    """
    kernels = {id(p) for name, p in model.named_parameters() if p.ndim > 1 and name.endswith("weight")}
    groups: list[dict[str, Any]] = []
    for parameters, lr_scale in _layers(model, config.layer_decay):
        split = [(parameters, config.weight_decay)]
        if config.optimizer == "adamw":
            split = [
                ([p for p in parameters if id(p) in kernels], config.weight_decay),
                ([p for p in parameters if id(p) not in kernels], 0.0),
            ]
        groups += [{"params": part, "weight_decay": decay, "lr_scale": lr_scale} for part, decay in split if part]
    if log_variances is not None:
        groups.append({"params": [log_variances], "weight_decay": 0.0, "lr_scale": 1.0})
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr, fused=True)
    if config.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=config.lr, momentum=_SGD_MOMENTUM, nesterov=True, fused=True)
        # Without these buffers, fused SGD fails when a frozen backbone is unfrozen, and uses uninitialised memory if
        # the first gradients overflow.
        sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for group in groups for p in group["params"]})
        return sgd
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each parameter group, multiplied by its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class Ema:
    """An exponential moving average of a network's weights; buffers such as running statistics are copied.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the initial weights are soon forgotten.
    """

    def __init__(self, model: MultiTaskNet, decay: float, num_updates: int = 0) -> None:
        """Start from the model's weights, which are an average of `num_updates` updates; 0: initial weights."""
        self.decay = decay
        self.num_updates = num_updates
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: MultiTaskNet) -> None:
        """Update the average after an optimiser step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(averages, [p.detach() for p in model.parameters()], 1.0 - decay)

    @torch.no_grad()
    def copy_buffers(self, model: MultiTaskNet) -> None:
        """Copy the buffers, such as running statistics; needed only before the average is used."""
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


def _layers(model: MultiTaskNet, decay: float) -> list[tuple[list[nn.Parameter], float]]:
    """Return all parameters in groups, each with its factor of the learning rate."""
    if decay == 1.0:
        return [(list(model.parameters()), 1.0)]
    stages = model.backbone.stages()
    in_backbone = {id(parameter) for stage in stages for parameter in stage}
    heads = [parameter for parameter in model.parameters() if id(parameter) not in in_backbone]
    return [*((stage, decay ** (len(stages) - k)) for k, stage in enumerate(stages)), (heads, 1.0)]

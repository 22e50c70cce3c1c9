"""A backbone, an attention block and two heads as a contributor might add them; `toy_registry` registers them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from agr_ray.config import LossConfig
from agr_ray.labels import LabelSpace
from agr_ray.models.backbones.base import Backbone
from agr_ray.models.heads import ages
from agr_ray.models.heads.base import Head, Targets, TaskSum


class Patches(Backbone):
    """Patches, embedded and mixed, without batch norm and without a name that a ResNet has."""

    def __init__(self, name: str) -> None:  # as all backbones
        super().__init__()
        self.num_channels, self.num_features = 16, 12
        self.embed = nn.Conv2d(3, 16, 8, stride=8)
        self.mixer = nn.Sequential(nn.GroupNorm(4, 16), nn.GELU(), nn.Conv2d(16, 16, 1))
        self.squash = nn.Linear(16, 12)

    def forward(self, images_nchw: Tensor) -> Tensor:
        embedded = self.embed(images_nchw)
        return embedded + self.mixer(embedded)

    def project(self, pooled: Tensor) -> Tensor:
        return self.squash(pooled)


class Gain(nn.Module):
    """A learnt gain for each channel, under two names: tied weights."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_channels, 1, 1))
        self.tied = self.gain

    def forward(self, feature_map_nchw: Tensor) -> Tensor:
        return feature_map_nchw * self.gain


class LogAge(Head):
    """The logarithm of the age and its spread: two outputs in a tuple."""

    missing_values = ages.MISSING_VALUES
    metric = "mae_years"

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:  # as all heads
        super().__init__()
        self.two = nn.Linear(num_features, 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        logarithm, spread = self.two(features).unbind(dim=1)
        return logarithm + 3.0, spread

    def labelled(self, targets: Targets) -> Tensor:
        return ages.age_truth(targets).is_labelled

    def losses(self, outputs: tuple[Tensor, Tensor], targets: Targets, config: LossConfig) -> Tensor:
        low, high, _, known = ages.age_truth(targets)
        logarithm, spread = (torch.where(known, output, 0.0) for output in outputs)
        truth = (0.5 * (low + high)).log1p()
        return torch.where(known, (logarithm - truth).square() * torch.exp(-spread) + spread, 0.0)

    def read_out(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        return ages.clamped(outputs[0].expm1())

    def score(self, outputs: tuple[Tensor, Tensor], targets: Targets) -> TaskSum:
        return ages.age_score(self.read_out(outputs), targets)


class Smile(Head):
    """A fourth task: how broad a smile is, 0 to 1."""

    missing_values: ClassVar[dict[str, float]] = {"smile": float("nan")}
    metric = "mae_years"

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:  # as all heads
        super().__init__()
        self.layer = nn.Linear(num_features, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features).squeeze(1)

    def labelled(self, targets: Targets) -> Tensor:
        return targets["smile"].isfinite()

    def losses(self, outputs: Tensor, targets: Targets, config: LossConfig) -> Tensor:
        known = self.labelled(targets)
        return torch.where(known, outputs - torch.where(known, targets["smile"], 0.0), 0.0).square()

    def read_out(self, outputs: Tensor) -> Tensor:
        return outputs.clamp(0.0, 1.0)

    def score(self, outputs: Tensor, targets: Targets) -> TaskSum:
        known = self.labelled(targets)
        errors = torch.where(known, (self.read_out(outputs) - targets["smile"]).abs(), 0.0)
        return TaskSum(errors.sum(), known.sum().float())

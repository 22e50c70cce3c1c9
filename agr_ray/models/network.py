"""The network: a backbone, an attention block, a neck, and a head for each task.

    images_nchw -> backbone -> feature map -> attention -> neck -> backbone.project -> dropout -> heads by task

All but the heads may compute in bfloat16 under autocast. The heads always compute in float32, because bfloat16 has
steps of a quarter of a year at an age of 40.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from agr_ray.config import ModelConfig
from agr_ray.errors import ConfigError
from agr_ray.labels import LabelSpace
from agr_ray.models.backbones.base import Backbone
from agr_ray.models.heads.base import Head
from agr_ray.registry import ATTENTION, BACKBONES, HEADS, NECKS, head_name

Outputs: TypeAlias = Mapping[str, Any]
"""Raw outputs of n images by task: what each head's `forward` returns."""


class MultiTaskNet(nn.Module):
    """A network made of the parts that a configuration names.

    Initial weights are drawn from torch's global generator: seed it first. `pretrained.load_backbone` can then replace
    those of the backbone.

    Args:
        config: names of the parts, and the tasks.
        space: the classes of the heads.

    Raises:
        ConfigError: a task has no classes in the label space.
    """

    def __init__(self, config: ModelConfig, space: LabelSpace) -> None:
        super().__init__()
        check_tasks(config, space)
        self.config = config
        self.space = space
        self.backbone: Backbone = BACKBONES[config.backbone](config.backbone)
        self.attention: nn.Module = ATTENTION[config.attention](self.backbone.num_channels)
        self.neck: nn.Module = NECKS[config.neck](self.backbone.num_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.heads = nn.ModuleDict(
            {
                task: HEADS[task][head_name(config, task)](self.backbone.num_features, task, space)
                for task in HEADS
                if task in config.tasks
            }
        )
        if config.bn_momentum is not None:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.momentum = config.bn_momentum

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the tasks, in the order of the heads."""
        return tuple(self.heads)

    @property
    def heads_by_task(self) -> Mapping[str, Head]:
        """Return the heads by task; unlike `heads`, typed."""
        return cast(Mapping[str, Head], dict(self.heads.items()))

    def initialise(self, labels: Mapping[str, NDArray[Any]]) -> None:
        """Initialise every head so that it predicts typical values of the training labels."""
        for head in self.heads_by_task.values():
            head.initialise(labels)

    def features(self, images_nchw: Tensor) -> Tensor:
        """Return the features of normalised images, (n, backbone.num_features)."""
        feature_map = self.attention(self.backbone(images_nchw))
        return self.backbone.project(self.neck(feature_map))

    def forward(self, images_nchw: Tensor) -> dict[str, Any]:
        """Return the raw outputs by task for normalised images, (n, 3, side, side) float."""
        features = self.features(images_nchw)
        with torch.autocast(features.device.type, enabled=False):
            features = self.dropout(features.float())
            return {task: head(features) for task, head in self.heads.items()}


def check_tasks(config: ModelConfig, space: LabelSpace) -> None:
    """Reject a task that has no classes in the label space.

    Raises:
        ConfigError: there is such a task; the message names it.
    """
    if "race" in config.tasks and not space.races:
        allowed = ", ".join(task for task in config.tasks if task != "race") or "others"
        raise ConfigError(f"model.tasks: the label space {space.name} has no races; allowed: {allowed}")

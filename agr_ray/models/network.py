"""The network: a backbone, attention blocks, a neck, and a head for each task.

    images_nchw -> backbone, an attention block after some stages -> feature maps -> neck -> backbone.project
    -> bottleneck -> dropout -> heads by task

All but the heads may compute in bfloat16 under autocast. The heads always compute in float32, because bfloat16 has
steps of a quarter of a year at an age of 40.
"""

from __future__ import annotations

import math
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
from agr_ray.models.head_pose import NUM_POSE_FEATURES, pose_features
from agr_ray.models.heads.base import Head
from agr_ray.models.heads.routed_age import RoutedAge
from agr_ray.models.precision import in_float32
from agr_ray.models.tasks import check_tasks, ordered_tasks
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
        ConfigError: a task has no classes in the label space, or the backbone does not take images of that side.
    """

    def __init__(self, config: ModelConfig, space: LabelSpace) -> None:
        super().__init__()
        check_tasks(config, space)
        check_side(config.backbone, config.image_size, "model.image_size")
        self.config = config
        self.space = space
        self.backbone: Backbone = BACKBONES[config.backbone](config.backbone)
        channels = self.backbone.stage_channels
        self.attention = nn.ModuleDict(
            {
                str(stage): ATTENTION[config.attention](channels[stage - 1])
                for stage in _attention_stages(config, len(channels))
            }
        )
        self.neck: nn.Module = NECKS[config.neck](channels)
        num_features = self.backbone.num_features
        self.bottleneck: nn.Module = (
            nn.Identity() if config.bottleneck is None else nn.Linear(num_features, config.bottleneck)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.heads = self.new_heads()
        if config.bn_momentum is not None:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.momentum = config.bn_momentum

    def new_heads(self) -> nn.ModuleDict:
        """Return heads with initial weights, by task."""
        return nn.ModuleDict({task: self._head(task) for task in ordered_tasks(self.config)})

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
        """Return the features of normalised images, (n, model.bottleneck or backbone.num_features)."""
        pooled = self.neck(self.backbone.feature_maps(images_nchw, self._attend))
        features: Tensor = self.bottleneck(self.backbone.project(pooled))
        return features

    def forward(self, images_nchw: Tensor, pose_degrees: Tensor | None = None) -> dict[str, Any]:
        """Return the raw outputs by task.

        Args:
            images_nchw: normalised images, (n, 3, side, side) float.
            pose_degrees: as in `pose_features`; only `model.head_pose` uses it.
        """
        features = self.features(images_nchw)
        with in_float32(features.device):
            return head_outputs(self.heads, self.config, self.dropout(features.float()), pose_degrees)

    def _attend(self, index: int, feature_map_nchw: Tensor) -> Tensor:
        """Apply the attention block after a stage, if there is one."""
        name = str(index + 1)
        attended: Tensor = self.attention[name](feature_map_nchw) if name in self.attention else feature_map_nchw
        return attended

    def _head(self, task: str) -> Head:
        """Build the head of a task."""

        def build() -> Head:
            num_features = self.config.bottleneck or self.backbone.num_features
            num_features += NUM_POSE_FEATURES * self.config.head_pose
            head: Head = HEADS[task][head_name(self.config, task)](num_features, task, self.space)
            return head

        if task == "age" and self.config.age_routing != "none":
            return RoutedAge(build, is_hard=self.config.age_routing == "hard")
        return build()


def head_outputs(
    heads: nn.ModuleDict, config: ModelConfig, features: Tensor, pose_degrees: Tensor | None = None
) -> dict[str, Any]:
    """Return the raw outputs by task of a network's heads.

    Args:
        heads: of the network.
        config: of the network.
        features: as `MultiTaskNet.features`, float32.
        pose_degrees: as in `MultiTaskNet.forward`.
    """
    if config.head_pose:
        features = torch.cat([features, pose_features(pose_degrees, features)], dim=1)
    outputs = {task: head(features) for task, head in heads.items() if not isinstance(head, RoutedAge)}
    for task, head in heads.items():
        if isinstance(head, RoutedAge):
            gender = cast(Head, heads["gender"]).read_out(outputs["gender"])
            outputs = {task: head(features, gender), **outputs}
    return outputs


def preset_config(preset: str, image_size: int | None = None) -> ModelConfig:
    """Return the configuration of a preset.

    Args:
        preset: its name.
        image_size: side of its images, pixels; the next larger one that its backbone takes. None: the preset's own.
    """
    config = ModelConfig(preset=preset)
    backbone = backbone_class(config.backbone)
    side = max(image_size or config.image_size, backbone.min_side_px)
    side = math.ceil(side / backbone.side_multiple) * backbone.side_multiple
    return config.model_copy(update={"image_size": side})


def backbone_class(name: str) -> type[Backbone]:
    """Return the class of a registered backbone."""
    return cast(type[Backbone], BACKBONES[name])


def check_side(backbone: str, side_px: int, key: str) -> None:
    """Reject images of a side that a backbone does not take; `key` is the configuration's.

    Raises:
        ConfigError: it does not.
    """
    least, multiple = backbone_class(backbone).min_side_px, backbone_class(backbone).side_multiple
    if side_px < least or side_px % multiple:
        also = f" and a multiple of {multiple}" if multiple > 1 else ""
        raise ConfigError(f"{key} {side_px}: the backbone {backbone} needs at least {least}{also}")


def _attention_stages(config: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Return the stages after which there is an attention block, from 1.

    Raises:
        ConfigError: the backbone has no such stage.
    """
    if config.attention == "none":
        return ()
    for stage in config.attention_stages:
        if stage > num_stages:
            raise ConfigError(
                f"model.attention_stages {stage}: the backbone {config.backbone} has stages 1 to {num_stages}"
            )
    return config.attention_stages or (num_stages,)

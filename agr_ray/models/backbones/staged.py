"""Backbones whose blocks run one after another."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from agr_ray.models.backbones.base import After, Backbone


class StagedBackbone(Backbone):
    """A backbone of blocks in stages: a stage begins at each block that shrinks the feature map.

    A subclass registers its layers and then calls `arrange`.
    """

    trunk: ClassVar[tuple[str, ...]]
    """Names of the children that compute the feature map, in the order in which they run. Blocks are these children, or
    the children of those that are `nn.Sequential`."""
    shrinking: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Layers that shrink the feature map, besides convolutions and poolings with a stride."""

    def arrange(self) -> None:
        """Divide the blocks into stages, and find the channels of each."""
        sizes = [0]
        for block in self._blocks():
            if sizes[-1] and any(map(self._shrinks, block.modules())):
                sizes.append(0)
            sizes[-1] += 1
        self._sizes = tuple(sizes)  # kept, because `fuse` replaces blocks
        with torch.no_grad():
            image = torch.zeros(1, 3, self.min_side_px, self.min_side_px)
            maps = self.eval().feature_maps(image, lambda _, feature_map: feature_map)
        self.train()
        self._stage_channels = tuple(feature_map.shape[1] for feature_map in maps)
        self.num_channels = self._stage_channels[-1]

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Return the channels of the feature map after each stage."""
        return self._stage_channels

    def forward(self, images_nchw: Tensor) -> Tensor:
        """Return the last feature map."""
        return self.feature_maps(images_nchw, lambda _, feature_map: feature_map)[-1]

    def feature_maps(self, images_nchw: Tensor, after: After) -> list[Tensor]:
        """Return the feature map after each stage."""
        blocks = self._blocks()
        maps: list[Tensor] = []
        x = images_nchw
        for size in self._sizes:
            for block in itertools.islice(blocks, size):
                x = block(x)
            x = after(len(maps), x)
            maps.append(x)
        return maps

    def stages(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each stage that has some; those of `project` are in the last."""
        blocks = self._blocks()
        stages = [
            [parameter for block in itertools.islice(blocks, size) for parameter in block.parameters()]
            for size in self._sizes
        ]
        stages = [stage for stage in stages if stage]
        known = {id(parameter) for stage in stages for parameter in stage}
        stages[-1] += [parameter for parameter in self.parameters() if id(parameter) not in known]
        return stages

    def _blocks(self) -> itertools.chain[nn.Module]:
        children = (getattr(self, name) for name in self.trunk)
        return itertools.chain.from_iterable(
            child if isinstance(child, nn.Sequential) else [child] for child in children
        )

    def _shrinks(self, layer: nn.Module) -> bool:
        if not isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            return isinstance(layer, self.shrinking)
        stride = layer.stride
        return (max(stride) if isinstance(stride, tuple) else stride) > 1


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution registered right before it: in these networks, its input."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(module, name, nn.Identity())
        fold_batch_norms(child)
        before = name, child

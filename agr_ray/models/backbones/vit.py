"""torchvision's ViT-B/16 (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from agr_ray.models.backbones.base import After
from agr_ray.models.backbones.torchvision_backbone import TorchvisionBackbone


class ViT(TorchvisionBackbone):
    """All layers except the last. Its feature map has one position: the class token.

    The position embeddings are those of 224 pixels, interpolated for other sides, which must be multiples of 16
    (section 3.2 of Dosovitskiy et al.). So published weights serve for every side.
    """

    trunk = ()
    side_multiple = 16
    replaced_layers = ("heads.",)

    def take(self, net: Any) -> None:
        """Take the patch embedding, the class token and the encoder."""
        self.class_token = net.class_token
        self.conv_proj = net.conv_proj
        self.encoder = net.encoder
        self.num_features = int(net.hidden_dim)

    def arrange(self) -> None:
        """Set the channels; there is one stage."""
        self.num_channels = self.num_features
        self._stage_channels = (self.num_channels,)

    def feature_maps(self, images_nchw: Tensor, after: After) -> list[Tensor]:
        """Return the class token after the last layer, (n, num_channels, 1, 1)."""
        patches = self.conv_proj(images_nchw)
        positions = self.positions(patches.shape[2], patches.shape[3])
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        encoder = self.encoder
        encoded = encoder.ln(encoder.layers(encoder.dropout(tokens + positions)))
        return [after(0, encoded[:, 0, :, None, None])]

    def stages(self) -> list[list[nn.Parameter]]:
        """Return the embeddings, then each layer; the last layer norm belongs to the last layer."""
        layers = list(self.encoder.layers)
        embedding = [self.class_token, self.encoder.pos_embedding, *self.conv_proj.parameters()]
        stages = [embedding, *(list(layer.parameters()) for layer in layers)]
        stages[-1] += list(self.encoder.ln.parameters())
        return stages

    def positions(self, height: int, width: int) -> Tensor:
        """Return the position embeddings of the class token and a grid of patches, (1, 1 + height * width, c)."""
        positions: Tensor = self.encoder.pos_embedding
        side = int((positions.shape[1] - 1) ** 0.5)
        if (height, width) == (side, side):
            return positions
        grid = positions[:, 1:].transpose(1, 2).reshape(1, -1, side, side).float()
        resized = functional.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
        return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)

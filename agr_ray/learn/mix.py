"""MixUp and CutMix: mix each image with another of its batch, and train on the labels of both.

Labels are never averaged: a mixture of faces of 20 and 60 years is not labelled 40. The loss of a mixed image is
share * loss(own label) + (1 - share) * loss(partner's label), for ages and classes alike. If one of the two labels is
missing, its term is left out, and so is its weight from the divisor of the mean loss (at least 1): an image of which a
third is labelled counts as a third of an image.

Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix", ICCV 2019.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agr_ray.config import AugmentConfig


class Mix(NamedTuple):
    """How n images are mixed with each other."""

    partner: Tensor
    """(n,) int64: row of the image that is mixed in."""
    share: Tensor
    """(n,) float32: weight of an image's own labels; its partner's labels have weight 1 - share."""
    boxes: Tensor
    """(n, 4) int64, xyxy in pixels of the network's input: area filled with the partner. All 0: the two are blended."""

    def to(self, device: torch.device) -> Mix:
        """Return a copy on a device."""
        return Mix(*(values.to(device, non_blocking=True) for values in self))


def draw_mix(num_images: int, side_px: int, config: AugmentConfig, generator: torch.Generator) -> Mix | None:
    """Draw partners, shares and boxes, on the CPU; return None, without drawing, if nothing is mixed.

    Each image is either blended (`mixup_alpha`) or gets a box of its partner (`cutmix_alpha`), with equal chances if
    both are on. The share is drawn from Beta(alpha, alpha) for each image. For a box, it is then computed from the
    box's exact area, in whole pixels inside the image.

    Args:
        num_images: of the batch.
        side_px: of the network's input.
        config: the alphas of MixUp and CutMix.
        generator: on the CPU; the same state gives the same mix.
    """
    if not (config.mixup_alpha or config.cutmix_alpha):
        return None
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    partner = rng.permutation(num_images)
    cut_chance = 0.0 if not config.cutmix_alpha else 0.5 if config.mixup_alpha else 1.0
    is_cut = rng.random(num_images) < cut_chance
    alphas = np.where(is_cut, config.cutmix_alpha, config.mixup_alpha)
    share = rng.beta(alphas, alphas)
    half = 0.5 * side_px * np.sqrt(1.0 - share)
    centres = side_px * rng.random((num_images, 2))
    corners = np.concatenate([centres - half[:, None], centres + half[:, None]], axis=1)
    boxes = np.clip(np.rint(corners), 0, side_px).astype(np.int64) * is_cut[:, None]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    share = np.where(is_cut, 1.0 - area / side_px**2, share)
    return Mix(torch.from_numpy(partner), torch.from_numpy(share.astype(np.float32)), torch.from_numpy(boxes))


def mix_images(images_nchw: Tensor, mix: Mix) -> Tensor:
    """Return the mixed images, (n, c, side, side) float32; `images_nchw` are normalised and on the mix's device."""
    side = images_nchw.shape[-1]
    pixels = torch.arange(side, device=images_nchw.device)
    x0, y0, x1, y1 = (edge[:, None] for edge in mix.boxes.unbind(dim=1))
    is_column, is_row = (pixels >= x0) & (pixels < x1), (pixels >= y0) & (pixels < y1)
    in_box = is_row[:, :, None] & is_column[:, None, :]
    is_cut = (mix.boxes[:, 2] > 0)[:, None, None]
    own = torch.where(is_cut, (~in_box).float(), mix.share[:, None, None])
    return torch.lerp(images_nchw[mix.partner], images_nchw, own[:, None])

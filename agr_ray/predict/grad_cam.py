"""Grad-CAM: where in a face a prediction comes from.

Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017,
equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from numpy.typing import NDArray
from torch import Tensor, nn

from agr_ray.models.network import MultiTaskNet
from agr_ray.predict.forward import Pose

MIN_POSITIONS: Final = 4
"""Fewest positions a side of the map that is used: a ResNet's last map has 7 at 224 px, but 3 at 88 px."""


class NoFeatureMap(Exception):
    """The network has no feature map with several positions. The message is one line."""


def grad_cam(model: MultiTaskNet, images_nchw: Tensor, task: str, pose_degrees: Pose = None) -> NDArray[np.float32]:
    """Return how much each place of an image speaks for the prediction of a task.

    For gender and race, that is the predicted class, right or wrong. For age, it is a higher age: what makes a face
    look younger is 0. Age groups are classes. Each map is scaled by its maximum, so maps do not tell how sure the model
    is.

    Args:
        model: in evaluation mode.
        images_nchw: (n, 3, side, side), normalised, on the model's device.
        task: one of its tasks.
        pose_degrees: as in `pose_features`.

    Returns:
        (n, side, side), 0 to 1; all 0 if nothing speaks for the prediction.

    Raises:
        NoFeatureMap: the network's feature maps have one position, such as the class token of a vision transformer.
    """
    assert not model.training
    captured: list[list[Tensor]] = []

    def capture(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        captured.append(list(arguments[0]))

    handle = model.neck.register_forward_pre_hook(capture)
    try:
        with torch.enable_grad():
            outputs = model(images_nchw.detach().requires_grad_(), pose_degrees)
            (maps,) = captured
            evidence = model.heads_by_task[task].evidence(outputs[task])
            # Swin's earlier maps are copies, on which the evidence does not depend.
            gradients = torch.autograd.grad(evidence.sum(), maps, allow_unused=True)
    finally:
        handle.remove()
    feature_map, gradient = _last_spatial(maps, gradients, model.config.backbone)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    heat = (weights * feature_map.detach()).sum(dim=1, keepdim=True).relu()
    heat = F.interpolate(heat.float(), images_nchw.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    peak = heat.amax(dim=(1, 2), keepdim=True)
    return np.asarray((heat / torch.where(peak > 0.0, peak, 1.0)).cpu().numpy(), np.float32)


def _last_spatial(maps: Sequence[Tensor], gradients: Sequence[Tensor | None], backbone: str) -> tuple[Tensor, Tensor]:
    """Return the last map with `MIN_POSITIONS` a side, and its gradient; if all have fewer, the last with the most."""
    usable = [(each, gradient) for each, gradient in zip(maps, gradients, strict=True) if gradient is not None]
    sides = [min(feature_map.shape[-2:]) for feature_map, _ in usable]
    wanted = min(MIN_POSITIONS, max(sides, default=1))
    if wanted == 1:
        raise NoFeatureMap(f"the backbone {backbone} has no feature map with several positions")
    return next(each for each, side in zip(reversed(usable), reversed(sides), strict=True) if side >= wanted)

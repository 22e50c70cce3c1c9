"""Crops -> network -> predictions: one path for validation, evaluation and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agr_ray.config import PredictConfig
from agr_ray.models.heads.base import Head
from agr_ray.models.int8_network import Int8Net
from agr_ray.models.network import MultiTaskNet, Outputs
from agr_ray.models.network_input import prepare_eval, to_nchw
from agr_ray.models.precision import autocast
from agr_ray.models.predictions import Predictions
from agr_ray.models.transform import Transform

Pose: TypeAlias = NDArray[np.float32] | Tensor | None


def predict(
    model: MultiTaskNet | Int8Net,
    images_u8: NDArray[np.uint8] | Tensor,
    transform: Transform,
    config: PredictConfig,
    pose_degrees: Pose = None,
) -> Predictions:
    """Predict from one batch of stored crops.

    Args:
        model: in evaluation mode, on any device.
        images_u8: (n, stored, stored, 3) uint8, RGB, with the margin; n may be 0.
        transform: the model's.
        config: whether to average with mirror images, and the precision.
        pose_degrees: as in `pose_features`.
    """
    device = next(model.parameters()).device
    return average(model.heads_by_task, infer(model, to_nchw(images_u8, device), transform, config, pose_degrees))


@torch.inference_mode()
def infer(
    model: MultiTaskNet | Int8Net,
    images_u8: Tensor,
    transform: Transform,
    config: PredictConfig,
    pose_degrees: Pose = None,
) -> list[Outputs]:
    """Run the network on each view of a batch: the crop and, with `flip_average`, its mirror image.

    Args:
        model: in evaluation mode.
        images_u8: (n, 3, stored, stored) uint8 on the model's device.
        transform: the model's.
        config: as in `predict`.
        pose_degrees: as in `pose_features`.
    """
    assert not model.training
    images = prepare_eval(images_u8, transform)
    views = [images, images.flip(-1)] if config.flip_average else [images]
    with autocast(images.device, config.precision):
        return [model(view, pose_degrees) for view in views]


def average(heads: Mapping[str, Head], views: Sequence[Outputs]) -> Predictions:
    """Return each head's predictions from all views of the same faces, with equal weights, and `age_spread`."""
    predictions: dict[str, NDArray[np.float32]] = {}
    for task, head in heads.items():
        outputs, weights = [view[task] for view in views], _equal_weights(head, len(views))
        read_out = head.read_out(outputs[0]) if len(views) == 1 else head.mixed(outputs, weights)
        predictions[task] = read_out.float().cpu().numpy()
        spread = head.spread(outputs, weights)
        if spread is not None:
            predictions[f"{task}_spread"] = spread.float().cpu().numpy()
    return predictions


def _equal_weights(head: Head, num_views: int) -> Tensor:
    return torch.full((num_views, 1), 1.0 / num_views, device=next(head.parameters()).device)

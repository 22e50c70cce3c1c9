"""A network of random weights whose predictions differ between faces as much as a trained network's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agr_ray.config import ModelConfig, PredictConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.labels import UTKFACE
from agr_ray.models.backbones.resnet import ResidualBlock
from agr_ray.models.checkpoint_network import save_checkpoint
from agr_ray.models.int8_network import quantize
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.network_input import prepare_eval, to_nchw
from agr_ray.models.transform import Transform
from agr_ray.predict.attributes import int8_batch_size

_CHUNK: Final = 16


def save_random_network(
    config: ModelConfig,
    crops_u8: NDArray[np.uint8],
    transform: Transform,
    directory: Path,
    residual_scale: float = 1.0,
    precision: str = "float32",
) -> None:
    """Save a checkpoint whose batch norms and heads are fitted to these crops.

    Otherwise, all faces would get the same age and race, and agreement would mean nothing.

    Args:
        config: of a network with the heads age (linear), gender and race.
        crops_u8: (n, S, S, 3), RGB, with the transform's margin.
        transform: of the network.
        directory: new or empty.
        residual_scale: weight of the last batch norm in each block of a ResNet. In a network of random weights,
            rounding grows from block to block: with bfloat16, the ages of 64 faces from a ResNet50 at 96 px change by
            up to 6.3 years at 1, and by 1.8 at 0.2.
        precision: `predict.precision` of the checkpoint; `int8` quantises the network on these crops.
    """
    torch.manual_seed(0)
    model = MultiTaskNet(config, UTKFACE)
    images = prepare_eval(to_nchw(crops_u8, torch.device("cpu")), transform)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # running statistics are the mean of all batches
        if isinstance(module, ResidualBlock):
            _, last = module.layers()[-1]
            nn.init.constant_(last.weight, residual_scale)
    with torch.inference_mode():
        model.train()
        for chunk in images.split(_CHUNK):
            model.features(chunk)
        model.eval()
        features = torch.cat([model.features(chunk) for chunk in images.split(_CHUNK)])
    for task, mean, std in (("age", 40.0, 15.0), ("gender", 0.0, 2.0), ("race", 0.0, 2.0)):
        head: Any = model.heads[task].layer
        with torch.no_grad():
            logits = head(features)
            head.weight.mul_(std / logits.std(dim=0)[:, None])
            head.bias.copy_(mean - (features @ head.weight.T).mean(dim=0))
    size = int8_batch_size(transform.image_size)
    batches = [chunk.contiguous().numpy() for chunk in images.split(size) if len(chunk) == size]
    files = quantize(model, batches) if precision == "int8" else None
    pipeline = Pipeline(predict=PredictConfig(precision=precision))
    save_checkpoint(directory, model, transform, pipeline=pipeline, int8_files=files)

"""The inference form of a network predicts the same as the network."""

import numpy as np
import pytest
import torch

from agr_ray.config import ModelConfig, PredictConfig
from agr_ray.labels import UTKFACE
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.transform import Transform
from agr_ray.predict.forward import predict
from agr_ray.predict.inference import for_inference

TRANSFORM = Transform(image_size=64, crop_side_px=64)


def network(backbone: str, *, head_pose: bool = False, age_head: str = "linear") -> MultiTaskNet:
    """Return an untrained network whose batch norms have seen images, and whose outputs differ between images."""
    torch.manual_seed(0)
    config = ModelConfig(backbone=backbone, image_size=64, head_pose=head_pose, age_head=age_head)
    model = MultiTaskNet(config, UTKFACE)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # running statistics are the mean of all batches
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    for head in model.heads.values():
        torch.nn.init.normal_(head.layer.weight, std=0.01)
    return model.eval()


def crops() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 77, 77, 3), np.uint8)


@pytest.mark.parametrize(
    "backbone", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow), "mobilenet_v3_small"]
)
def test_the_inference_network_predicts_the_same_in_float32(backbone: str) -> None:
    model, config = network(backbone), PredictConfig(flip_average=True)
    before = predict(model, crops(), TRANSFORM, config)
    after = predict(for_inference(model, config.precision), crops(), TRANSFORM, config)
    assert after["age"] == pytest.approx(before["age"], abs=2e-3)
    assert after["gender"] == pytest.approx(before["gender"], abs=2e-5)
    assert after["race"] == pytest.approx(before["race"], abs=2e-5)
    assert np.ptp(before["gender"]) > 0.01


def test_the_inference_network_predicts_nearly_the_same_in_bfloat16() -> None:
    model, config = network("resnet18"), PredictConfig(precision="bfloat16")
    before = predict(model, crops(), TRANSFORM, PredictConfig())
    ready = for_inference(model, config.precision)
    after = predict(ready, crops(), TRANSFORM, config)
    assert {weight.dtype for weight in ready.backbone.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in ready.heads["race"].parameters()} == {torch.float32}
    assert after["gender"] == pytest.approx(before["gender"], abs=0.006)


def test_no_batch_norm_is_left_and_the_network_itself_is_as_it_was() -> None:
    model = network("resnet50")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ready = for_inference(model, "float32")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in ready.modules())
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert model.tasks == ready.tasks

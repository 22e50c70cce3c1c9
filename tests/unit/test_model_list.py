"""The sizes that `agr-ray models` prints."""

from __future__ import annotations

import pytest

from agr_ray.config import ModelConfig
from agr_ray.labels import UTKFACE
from agr_ray.models.network import MultiTaskNet
from agr_ray.report.model_list import network_size, preset_size


@pytest.mark.parametrize("preset", ["lightweight", "sa_net", "gender_routed", "head_pose", "multi_scale", "swin"])
def test_sizes_are_those_of_the_network_that_is_trained(preset: str) -> None:
    config = ModelConfig(preset=preset, image_size=64)

    assert preset_size(config) == network_size(MultiTaskNet(config, UTKFACE).eval())

"""Settings of the network, and of how its outputs become predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from agr_ray.config.section import Section

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"backbone": "resnet50", "age_head": "linear", "image_size": 224},
    "lightweight": {"backbone": "mobilenet_v3_small", "age_head": "linear", "image_size": 112, "bn_momentum": 0.1},
}
"""Values that `model.preset` puts in place of `ModelConfig`'s defaults; explicit keys override both."""


class ModelConfig(Section):
    """The network: backbone and heads."""

    preset: Literal["paper", "lightweight"] = "paper"
    """`paper`: ResNet50 and linear heads; `lightweight`: MobileNetV3-small. Other keys of this table override it."""
    backbone: Literal["resnet18", "resnet34", "resnet50", "mobilenet_v3_small", "mobilenet_v3_large"] = "resnet50"
    """torchvision network, whose last layer the heads replace."""
    pretrained: str = "none"
    """Initial weights of the backbone: `none` (random), `imagenet` (torchvision's download), or a path or URI."""
    tasks: tuple[Literal["age", "gender", "race"], ...] = ("age", "gender", "race")
    """Which heads the network has."""
    age_head: Literal["linear", "distribution"] = "linear"
    """`linear`: one number (paper eq. 7); `distribution`: a bin for each year, 0 to 116, read out as the
    expectation."""
    image_size: Annotated[int, Field(ge=32, le=512)] = 224
    """Side of the network's input, pixels."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout probability of the features before the heads."""
    bn_momentum: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Momentum of all batch norms; none: the backbone's default (0.01 in MobileNetV3: too slow for short runs)."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "paper")
        return {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **values}

    @model_validator(mode="after")
    def _has_distinct_tasks(self) -> Self:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must name at least one of age, gender, race, each at most once: {self.tasks}")
        return self


class PredictConfig(Section):
    """How a network's outputs become predictions, in evaluation and in scoring alike."""

    flip_average: bool = False
    """Predict the crop and its mirror image and average: slightly more accurate, twice the time."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Data type of the network (autocast); auto: bfloat16 if the device supports it natively."""

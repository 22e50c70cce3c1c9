"""Settings of the network and of its predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from agr_ray.config.section import Section
from agr_ray.registry import ATTENTION, BACKBONES, HEADS, NECKS

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"backbone": "resnet50", "age_head": "linear", "image_size": 224},
    "lightweight": {"backbone": "mobilenet_v3_small", "age_head": "linear", "image_size": 112, "bn_momentum": 0.1},
}
"""Values that `model.preset` puts in place of `ModelConfig`'s defaults; explicit keys override both."""


def _distinct_tasks(tasks: tuple[str, ...]) -> tuple[str, ...]:
    if not tasks or len(set(tasks)) != len(tasks) or not all(task in HEADS for task in tasks):
        raise ValueError(f"must name at least one of {', '.join(HEADS)}, each at most once")
    return tasks


class ModelConfig(Section):
    """The network: backbone, attention, neck and heads."""

    preset: Literal["paper", "lightweight"] = "paper"
    """`paper`: ResNet50 at 224 pixels; `lightweight`: MobileNetV3-small at 112 pixels. Other keys override it."""
    backbone: Annotated[str, AfterValidator(BACKBONES.check)] = Field(
        "resnet50", description=f"Network that computes the feature map: {', '.join(BACKBONES.names)}."
    )
    pretrained: str = "none"
    """Pretrained weights of the backbone: `none` (random), `imagenet` (a download), or a path or URI."""
    attention: Annotated[str, AfterValidator(ATTENTION.check)] = Field(
        "none", description=f"Attention block over the feature map: {', '.join(ATTENTION.names)}."
    )
    neck: Annotated[str, AfterValidator(NECKS.check)] = Field(
        "average", description=f"Pooling of the feature map: {', '.join(NECKS.names)}."
    )
    tasks: Annotated[tuple[str, ...], AfterValidator(_distinct_tasks)] = Field(
        ("age", "gender", "race"), description=f"Tasks of the network, one head each: {', '.join(HEADS)}."
    )
    age_head: Annotated[str, AfterValidator(HEADS["age"].check)] = Field(
        "linear",
        description=f"{', '.join(HEADS['age'].names)}. `linear`: one number (paper eq. 7); `distribution`: a bin for "
        "each year, 0 to 116, read out by expectation.",
    )
    gender_head: Annotated[str, AfterValidator(HEADS["gender"].check)] = Field(
        "binary", description=f"{', '.join(HEADS['gender'].names)}: one logit."
    )
    race_head: Annotated[str, AfterValidator(HEADS["race"].check)] = Field(
        "softmax", description=f"{', '.join(HEADS['race'].names)}: a logit for each race."
    )
    image_size: Annotated[int, Field(ge=32, le=512)] = 224
    """Side of the network's input, pixels."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout probability of the features, before the heads."""
    bn_momentum: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Momentum of all batch norms; none: the backbone's default (MobileNetV3: 0.01, too slow for short runs)."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "paper")
        return {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **values}


class PredictConfig(Section):
    """How a network's outputs become predictions, in evaluation and in scoring alike."""

    flip_average: bool = False
    """Average the predictions of a crop and its mirror image: slightly more accurate, but takes twice the time."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Data type of the forward pass (autocast); auto: bfloat16 if the device supports it natively, else float32."""

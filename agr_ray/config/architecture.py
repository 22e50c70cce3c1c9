"""Settings of the network and of its predictions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from agr_ray.config.presets import PRESETS, check_preset, find_preset
from agr_ray.config.section import PositiveInt, Section
from agr_ray.registry import ATTENTION, BACKBONES, HEADS, NECKS


def _distinct_tasks(tasks: tuple[str, ...]) -> tuple[str, ...]:
    if not tasks or len(set(tasks)) != len(tasks) or not all(task in HEADS for task in tasks):
        raise ValueError(f"must name at least one of {', '.join(HEADS)}, each at most once")
    return tasks


class ModelConfig(Section):
    """The network: backbone, attention, neck and heads."""

    preset: Annotated[str, AfterValidator(check_preset)] = Field(
        "paper",
        description=f"Named set of network parts; a few also set training options: {', '.join(PRESETS)}. "
        "`agr-ray models` describes them. Keys that are set beside it override its values.",
    )
    backbone: Annotated[str, AfterValidator(BACKBONES.check)] = Field(
        "resnet50", description=f"Network that computes the feature map: {', '.join(BACKBONES.names)}."
    )
    pretrained: str = "none"
    """Pretrained weights of the backbone: `none` (random), the path or URI of a state dict, or downloaded weights:
    `imagenet` for torchvision's backbones; `vggface2` or `casia-webface` for `inception_resnet_v1`."""
    attention: Annotated[str, AfterValidator(ATTENTION.check)] = Field(
        "none", description=f"Attention block over the feature map: {', '.join(ATTENTION.names)}."
    )
    attention_stages: tuple[PositiveInt, ...] = ()
    """Stages of the backbone, counted from 1, that an attention block follows. A stage begins where the feature map
    shrinks: a ResNet's first convolution is stage 1, and its residual stages are 2 to 5. Empty: only the last stage."""
    neck: Annotated[str, AfterValidator(NECKS.check)] = Field(
        "average",
        description=f"How feature maps become one vector: {', '.join(NECKS.names)}. `average`: the last map's means; "
        "`multi_scale`: the last three maps' means, mixed; `fully_connected`: a linear layer over 3 x 3 positions.",
    )
    bottleneck: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Number of features to which a linear layer reduces the backbone's, before the heads; none: no such layer."""
    tasks: Annotated[tuple[str, ...], AfterValidator(_distinct_tasks)] = Field(
        ("age", "gender", "race"), description=f"Tasks of the network, one head each: {', '.join(HEADS)}."
    )
    age_head: Annotated[str, AfterValidator(HEADS["age"].check)] = Field(
        "linear",
        description=f"{', '.join(HEADS['age'].names)}. `linear`: one number (paper eq. 7); `groups`: the label "
        "space's age groups; `coral` and `corn`: a threshold for each year. The others predict the probability of each "
        "year, 0 to 116; the age is the mean. They differ in the loss: `distribution` DLDL-v2's, `expectation` "
        "cross-entropy, `mean_variance` the mean-variance loss, `soft_ordinal` soft labels.",
    )
    age_routing: Literal["none", "soft", "hard"] = "none"
    """`none`: one age head. Otherwise one for each gender: `soft` averages their ages, weighted by the predicted
    probability of the gender; `hard` uses the one of the more probable gender. Needs the task gender."""
    head_pose: bool = False
    """Give the heads the face's yaw, pitch and roll, too. Needs faces found by `mtcnn` or `mtcnn_int8`,
    which find landmarks."""
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
        preset = find_preset(values, default="paper")
        return values if preset is None else {**preset.model, **values}

    @model_validator(mode="after")
    def _routes_by_gender(self) -> Self:
        if self.age_routing != "none" and not {"age", "gender"} <= set(self.tasks):
            raise ValueError(f"age_routing {self.age_routing} needs the tasks age and gender")
        return self


class PredictConfig(Section):
    """How a network's outputs become predictions, in evaluation and in scoring alike."""

    flip_average: bool = False
    """Average the predictions of a crop and its mirror image: slightly more accurate, but takes twice the time."""
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "float32"
    """Data type of the forward pass (autocast); auto: bfloat16 if the device supports it natively, else float32; int8:
    on CPUs, with a checkpoint of agr-ray quantize and the package openvino."""

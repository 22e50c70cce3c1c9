"""The networks of the paper's tables 10 and 11, composed from the registered parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from agr_ray.config.section import MAX_INT, Section
from agr_ray.registry import PUBLISHED_WEIGHTS, check_name


@dataclass(frozen=True)
class Cited:
    """Figures of a row of the paper's tables 10 and 11, from other data and protocols; None: the row has none."""

    mae_years: float | None
    one_off: float | None
    gender: float | None
    race: float | None


@dataclass(frozen=True)
class Preset:
    """Values in place of the defaults; explicit keys override them."""

    row: str
    """What it stands for."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `[model]`."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `[train]`."""
    fine_tune: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `[train]` that apply only with pretrained weights."""
    cited: Cited | None = None
    """As the paper cites; None: the row is not in its tables."""

    def training(self, *, is_pretrained: bool) -> dict[str, Any]:
        """Return the keys of `[train]`."""
        return {**self.train, **(self.fine_tune if is_pretrained else {})}


_KEPT: Final = ("image_size", "tasks", "dropout")
"""Keys of a recipe's `[model]` that remain when the command line names a preset: its data, its schedule and its
regularisation go with them. So do pretrained weights that fit."""

_RESNET: Final = {"backbone": "resnet50", "image_size": 224}
_FROZEN: Final = {"freeze_epochs": MAX_INT}
_TRANSFORMER: Final = {"optimizer": "adamw", "weight_decay": 0.05, "schedule": "cosine", "warmup": 0.1, "lr": 3e-4}

PRESETS: Final[Mapping[str, Preset]] = {
    "paper": Preset(
        "the proposed model: ResNet50, linear heads",
        _RESNET | {"age_head": "linear"},
        cited=Cited(2.95, 0.907, 0.983, 0.931),
    ),
    "single_task_age": Preset(
        "single-task CNN, deep age estimation",
        _RESNET | {"tasks": ("age",)},
        cited=Cited(4.85, 0.852, None, None),
    ),
    "single_task_gender": Preset(
        "single-task CNN, gender", _RESNET | {"tasks": ("gender",)}, cited=Cited(None, None, 0.951, None)
    ),
    "single_task_race": Preset(
        "single-task CNN, race", _RESNET | {"tasks": ("race",)}, cited=Cited(None, None, None, 0.902)
    ),
    "lightweight": Preset(
        "lightweight CNN for real time",
        {"backbone": "mobilenet_v3_small", "age_head": "linear", "image_size": 112, "bn_momentum": 0.1},
        cited=Cited(4.92, 0.850, 0.942, None),
    ),
    "vgg16_transfer": Preset(
        "transfer learning, VGG-16: age groups, convolutions frozen if pretrained",
        {"backbone": "vgg16", "neck": "fully_connected", "age_head": "groups", "image_size": 224},
        fine_tune=_FROZEN,
        cited=Cited(4.78, 0.855, 0.945, None),
    ),
    "cnn_features": Preset(
        "CNN features: linear classifiers, age groups, backbone frozen if pretrained",
        _RESNET | {"age_head": "groups"},
        fine_tune=_FROZEN,
        cited=Cited(4.90, 0.850, 0.940, 0.890),
    ),
    "sa_net": Preset(
        "SA-Net: shuffle attention after each stage",
        _RESNET | {"attention": "shuffle", "attention_stages": (2, 3, 4, 5), "pretrained": "none"},
        cited=Cited(4.30, 0.875, 0.950, 0.910),
    ),
    "gender_routed": Preset(
        "gender-specific age classification",
        _RESNET | {"age_head": "groups", "age_routing": "hard"},
        cited=Cited(4.55, 0.868, 0.953, None),
    ),
    "head_pose": Preset(
        "CNN + head pose: yaw, pitch and roll beside the features",
        _RESNET | {"head_pose": True},
        cited=Cited(4.60, 0.860, 0.940, 0.900),
    ),
    "multi_scale": Preset(
        "multi-task, multi-instance, multi-scale: c3 to c5, soft gender routing",
        _RESNET | {"neck": "multi_scale", "age_routing": "soft"},
        cited=Cited(4.25, 0.881, 0.952, 0.912),
    ),
    "ldl": Preset(
        "label distribution learning (DLDL-v2)",
        _RESNET | {"age_head": "distribution"},
        cited=Cited(4.20, 0.880, 0.940, 0.910),
    ),
    "plain_cnn": Preset(
        "CNN-based age, gender, ethnicity",
        {"backbone": "plain_cnn", "image_size": 112},
        cited=Cited(4.35, 0.872, 0.951, 0.912),
    ),
    "facenet_bias": Preset(
        "FaceNet-based bias analysis: Inception-ResNet-v1, frozen if pretrained, linear heads",
        {"backbone": "inception_resnet_v1", "image_size": 160},
        fine_tune=_FROZEN,
        cited=Cited(4.85, 0.850, 0.948, 0.901),
    ),
    "faceage": Preset(
        "FaceAge biological age: Inception-ResNet-v1, balanced ages",
        {"backbone": "inception_resnet_v1", "image_size": 160, "bottleneck": 128, "tasks": ("age",)},
        train={"balance": "age"},
        cited=Cited(3.95, 0.885, None, None),
    ),
    "mhsa": Preset(
        "multi-task CNN with multi-head attention",
        _RESNET | {"attention": "self_attention"},
        cited=Cited(4.30, 0.875, 0.950, 0.910),
    ),
    "se": Preset("potential improvement: squeeze-and-excitation", _RESNET | {"attention": "squeeze_excitation"}),
    "cbam": Preset("potential improvement: channel and spatial attention", _RESNET | {"attention": "cbam"}),
    "vit": Preset(
        "potential improvement: vision transformer",
        {"backbone": "vit_b_16", "image_size": 224},
        train=_TRANSFORMER,
        fine_tune={"layer_decay": 0.75},
    ),
    "swin": Preset(
        "potential improvement: Swin transformer",
        {"backbone": "swin_t", "image_size": 224},
        train=_TRANSFORMER,
        fine_tune={"layer_decay": 0.75},
    ),
    "domain_adapt": Preset(
        "potential improvement: a domain head behind gradient reversal, for two sets",
        _RESNET | {"tasks": ("age", "gender", "race", "domain")},
    ),
}
"""The presets by name, in the order of the paper's tables."""


def check_preset(name: str) -> str:
    """Return the name if there is such a preset.

    Raises:
        ValueError: there is none; the message lists the allowed names.
    """
    return check_name("preset", name, PRESETS)


def find_preset(model: Mapping[str, Any], default: str = "") -> Preset | None:
    """Return the preset that `[model]` chooses; None: there is none of that name, which `check_preset` reports."""
    name = model.get("preset", default)
    return PRESETS.get(name) if isinstance(name, str) else None


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a training job, with the preset's values of `[train]` where no key overrides them."""
    model, train = _given(values.get("model", {})), _given(values.get("train", {}))
    preset = find_preset(model)
    if preset is None:
        return dict(values)
    return {**values, "train": preset.training(is_pretrained=_is_pretrained(model)) | dict(train)}


def _given(section: object) -> Mapping[str, Any]:
    """Return the keys of a section that were set, in a table or in code."""
    if isinstance(section, Section):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return section if isinstance(section, Mapping) else {}


def with_chosen_preset(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe with the network of the preset that `overrides` names, and the preset's values of `[train]`.

    Of the recipe's `[model]`, only `_KEPT` and pretrained weights remain, so that the network is the preset's as a
    whole. Weights that do not fit it are dropped (`dropped_weights`).

    Args:
        recipe: sections of a recipe.
        overrides: sections of the command line and the environment.
    """
    model, chosen = recipe.get("model", {}), overrides.get("model", {})
    preset = find_preset(chosen)
    if preset is None:
        return dict(recipe)
    kept = {key: value for key, value in model.items() if key in _KEPT}
    weights, backbone = model.get("pretrained"), _backbone(chosen)
    if weights is not None and (backbone == _backbone(model) or backbone in PUBLISHED_WEIGHTS.get(str(weights), ())):
        kept["pretrained"] = weights
    own = {key: value for key, value in preset.model.items() if key != "image_size" or "image_size" not in kept}
    train = preset.training(is_pretrained=_is_pretrained({**kept, **own, **chosen}))
    return {**recipe, "model": {**kept, **own}, "train": {**recipe.get("train", {}), **train}}


def dropped_weights(
    recipe: Mapping[str, Any], replaced: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[str, str] | None:
    """Return the recipe's pretrained weights and the preset that do not fit each other; None: nothing was dropped.

    Args:
        recipe: as in `with_chosen_preset`.
        replaced: what that returned.
        overrides: as in `with_chosen_preset`.
    """
    before, after, chosen = (each.get("model", {}) for each in (recipe, replaced, overrides))
    if not _is_pretrained(before) or _is_pretrained(after) or "pretrained" in chosen:
        return None
    return before["pretrained"], chosen["preset"]


def _backbone(model: Mapping[str, Any]) -> object:
    """Return the backbone that a `[model]` chooses."""
    preset = find_preset(model, default="paper")
    return model.get("backbone", preset.model["backbone"] if preset is not None else "")


def _is_pretrained(model: Mapping[str, Any]) -> bool:
    return bool(model.get("pretrained", "none") != "none")

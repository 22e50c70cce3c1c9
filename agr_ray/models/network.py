"""One backbone, up to three heads: `MultiTaskNet`, its first weights, and the transform that it expects.

    images_nchw -> backbone (torchvision, last layer removed) -> features -> age, gender, race heads

The backbone may run in bfloat16 under autocast; the heads always compute in float32, because bfloat16
has steps of a quarter of a year at an age of 40.
"""

from __future__ import annotations

import http.client
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from agr_ray.config import ModelConfig
from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS, LabelSpace

TASKS: Final = ("age", "gender", "race")
"""Order of the tasks wherever a tensor has one entry for each."""

AGE_BINS_YEARS: Final = tuple(range(int(AGE_MIN_YEARS), int(AGE_MAX_YEARS) + 1))
"""Ages of the bins of the `distribution` head: one a year, so that every age that a label may have is inside."""

_HEAD_STD: Final = 0.01
_LAST_LAYERS: Final = ("fc.", "classifier.3.")


class WeightsError(Exception):
    """First weights that can't be had or don't fit the backbone; one line."""


class Outputs(NamedTuple):
    """What the network says of n images, float32; None for a task without head."""

    age_years: Tensor | None
    """(n,) years, not clamped."""
    age_logits: Tensor | None
    """(n, len(AGE_BINS_YEARS)); None for the `linear` head too."""
    gender_logit: Tensor | None
    """(n,); its sigmoid is the probability of "male"."""
    race_logits: Tensor | None
    """(n, races), in the order of the label space."""


class MultiTaskNet(nn.Module):
    """A torchvision backbone whose last layer is replaced by one linear head for each task.

    Weights are drawn from torch's global generator: seed it first. `load_backbone` then replaces the backbone's.
    """

    age_bins_years: Tensor

    def __init__(self, config: ModelConfig, space: LabelSpace) -> None:
        """Draw the weights.

        Raises:
            ValueError: there is to be a race head, and the label space has no races.
        """
        super().__init__()
        self.config = config
        self.space = space
        if "race" in config.tasks and not space.races:
            raise ValueError(f"model.tasks has race, and the label space {space.name} has no races")
        self.backbone, num_features = _headless(config.backbone)
        self.dropout = nn.Dropout(config.dropout)
        has_bins = config.age_head == "distribution"
        num_age = len(AGE_BINS_YEARS) if has_bins else 1
        self.age_head = _head(num_features, num_age) if "age" in config.tasks else None
        self.gender_head = _head(num_features, 1) if "gender" in config.tasks else None
        self.race_head = _head(num_features, len(space.races)) if "race" in config.tasks else None
        bins = torch.tensor(AGE_BINS_YEARS, dtype=torch.float32)
        self.register_buffer("age_bins_years", bins, persistent=False)
        if config.bn_momentum is not None:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = config.bn_momentum

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have a head, in the order of `TASKS`."""
        return tuple(task for task in TASKS if task in self.config.tasks)

    def initialise_age(self, mean_years: float, std_years: float = 20.0) -> None:
        """Let the untrained network guess this age, so that L1 needn't walk there in steps of the learning rate.

        Args:
            mean_years: mean age of the training labels.
            std_years: of the training labels; the first spread of the `distribution` head.
        """
        if self.age_head is None:
            return
        with torch.no_grad():
            if self.config.age_head == "linear":
                self.age_head.bias.fill_(mean_years)
            else:
                self.age_head.bias.copy_(-0.5 * ((self.age_bins_years - mean_years) / std_years).square())

    def forward(self, images_nchw: Tensor) -> Outputs:
        """Predict from normalised images, (n, 3, side, side) float."""
        features = self.backbone(images_nchw)
        with torch.autocast(features.device.type, enabled=False):
            features = self.dropout(features.float())
            age_years = age_logits = gender_logit = race_logits = None
            if self.age_head is not None:
                age = self.age_head(features)
                if self.config.age_head == "linear":
                    age_years = age.squeeze(1)
                else:
                    age_logits = age
                    age_years = age.softmax(dim=1) @ self.age_bins_years
            if self.gender_head is not None:
                gender_logit = self.gender_head(features).squeeze(1)
            if self.race_head is not None:
                race_logits = self.race_head(features)
        return Outputs(age_years, age_logits, gender_logit, race_logits)


def first_weights(config: ModelConfig) -> dict[str, Tensor] | None:
    """Return the backbone's state dict that `model.pretrained` asks for, or None for `none`.

    `model.pretrained` must be `none`, `imagenet` or a local path: fetch a remote one first.

    Raises:
        WeightsError: the file or the download can't be read.
    """
    if config.pretrained == "none":
        return None
    if config.pretrained == "imagenet":
        return _imagenet_state(config.backbone)
    return read_state(Path(config.pretrained))


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict: .safetensors, or anything that `torch.load(weights_only=True)` reads.

    Raises:
        WeightsError: there is no such file, or it holds anything but named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"weights {path}: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise WeightsError(f"weights {path}: not a state dict: {_first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"weights {path}: expected a state dict of tensors, found {type(state).__name__} of others")
    return cast(dict[str, Tensor], state)


def load_backbone(model: MultiTaskNet, state: Mapping[str, Tensor], where: str = "weights") -> None:
    """Put a torchvision state dict into the backbone. Its last layer is left out: the heads replace it.

    Args:
        model: the network, changed in place.
        state: as torchvision names it; `num_batches_tracked` may be missing, as in old files.
        where: what messages call the state.

    Raises:
        WeightsError: names the first tensor that is missing, unknown or of another shape.
    """
    found = {name: tensor for name, tensor in state.items() if not name.startswith(_LAST_LAYERS)}
    expected = model.backbone.state_dict()
    counters = {name: expected[name] for name in expected if name.endswith("num_batches_tracked")}
    problem = mismatch(expected, {**counters, **found})
    if problem:
        raise WeightsError(f"{where}: does not fit the backbone {model.config.backbone}: {problem}")
    model.backbone.load_state_dict({**counters, **found})


def mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Say which tensor first keeps `found` from replacing `expected`: name, expected, found. Empty: none does."""
    for name, tensor in expected.items():
        shape = list(tensor.shape)
        if name not in found:
            return f"{name}: expected shape {shape}, found nothing"
        if found[name].shape != tensor.shape:
            return f"{name}: expected shape {shape}, found {list(found[name].shape)}"
    for name, tensor in found.items():
        if name not in expected:
            return f"{name}: expected no such tensor, found shape {list(tensor.shape)}"
    return ""


def _imagenet_state(backbone: str) -> dict[str, Tensor]:
    weights: Any = torchvision.models.get_model_weights(backbone).DEFAULT
    try:
        return cast(dict[str, Tensor], dict(weights.get_state_dict(progress=False, check_hash=True)))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise WeightsError(
            f"weights imagenet: {weights.url} could not be downloaded: {_first_line(error)}; "
            "with no network, set model.pretrained to the path of that file, or to none"
        ) from None


def _headless(name: str) -> tuple[nn.Module, int]:
    """Return the backbone without its last layer, and the number of its features."""
    backbone: Any = torchvision.models.get_model(name, weights=None)
    if name.startswith("resnet"):
        num_features = backbone.fc.in_features
        backbone.fc = nn.Identity()
    else:
        num_features = backbone.classifier[3].in_features
        # MobileNetV3 drops 20 % of these features; here `model.dropout` alone decides.
        backbone.classifier[2] = nn.Identity()
        backbone.classifier[3] = nn.Identity()
    return cast(nn.Module, backbone), int(num_features)


def _head(num_features: int, num_outputs: int) -> nn.Linear:
    """Return a head whose first guess is nearly its bias: even chances, and the age of `initialise_age`."""
    head = nn.Linear(num_features, num_outputs)
    nn.init.normal_(head.weight, std=min(_HEAD_STD, 1.0 / math.sqrt(num_features)))
    nn.init.zeros_(head.bias)
    return head


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__

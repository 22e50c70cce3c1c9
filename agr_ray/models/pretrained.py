"""Pretrained weights of a backbone: read them, and check that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from agr_ray.models.backbones.base import Backbone, WeightsError
from agr_ray.models.network import MultiTaskNet
from agr_ray.registry import PUBLISHED_WEIGHTS
from agr_ray.storage import MissingObject, Storage
from agr_ray.storage.scratch import scratch_folder


def pretrained_weights(backbone: Backbone, pretrained: str, storage: Storage) -> Mapping[str, Tensor] | None:
    """Return the state dict that `model.pretrained` names; None for `none`.

    Args:
        backbone: the backbone to load them into.
        pretrained: `none`, one of the backbone's `published` weights, or a path or URI.
        storage: that reads paths and URIs.

    Raises:
        WeightsError: the backbone has no published weights of that name, the file can't be read, or the download
            failed.
    """
    if pretrained == "none":
        return None
    if pretrained in backbone.published:
        return backbone.published_weights(pretrained)
    allowed = ", ".join(["none", *backbone.published, "or the path or URI of a state dict"])
    if pretrained in PUBLISHED_WEIGHTS:
        raise WeightsError(f"{pretrained}: this backbone has no such weights; allowed: {allowed}")
    try:
        return stored_state(storage, pretrained)
    except MissingObject as error:
        raise WeightsError(f"{error}; allowed: {allowed}") from None


def stored_state(storage: Storage, uri: str) -> dict[str, Tensor]:
    """Read a state dict at a path or URI, as `read_state`.

    Raises:
        WeightsError: as `read_state`; the message names `uri`.
        MissingObject: there is no such file.
    """
    with scratch_folder() as folder:
        path = Path(folder, f"weights{Path(uri).suffix}")
        path.write_bytes(storage.read(uri))
        return read_state(path, uri)


def read_state(path: Path, name: str = "") -> dict[str, Tensor]:
    """Read a state dict: .safetensors, or any file that `torch.load(weights_only=True)` reads.

    Args:
        path: of the local file.
        name: of the file in messages; empty: its path.

    Raises:
        WeightsError: there is no such file, or it holds anything but named tensors.
    """
    name = name or str(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{name}: {error.strerror or error}") from None
    except Exception as error:  # torch's unpickler raises KeyError, IndexError and others on a file of another kind
        reason = (str(error).splitlines() or [""])[0]
        raise WeightsError(f"{name}: not a state dict: {type(error).__name__} {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = "a dict of other values" if isinstance(state, dict) else type(state).__name__
        raise WeightsError(f"{name}: expected a state dict of tensors, found {found}")
    return cast(dict[str, Tensor], state)


def load_backbone(model: MultiTaskNet, state: Mapping[str, Tensor], where: str = "weights") -> None:
    """Load published weights into the backbone, without the layers that the heads replace.

    Args:
        model: its backbone is changed in place.
        state: with the names of the backbone's state dict; `num_batches_tracked` may be missing, as in old files.
        where: name of the state dict in messages.

    Raises:
        WeightsError: names the first tensor that is missing, unknown or of another shape; or an attention block
            between the layers reorders channels.
    """
    backbone = model.backbone
    stages = [int(stage) for stage, block in model.attention.items() if getattr(block, "reorders_channels", False)]
    projects = type(backbone).project is not Backbone.project
    read = [stage for stage in stages if projects or stage < len(backbone.stage_channels)]
    if read:
        raise WeightsError(
            f"{where}: model.attention {model.config.attention} after stage {read[0]} reorders the channels that "
            f"pretrained layers of {model.config.backbone} after it read; set model.pretrained to none"
        )
    found = {name: tensor for name, tensor in state.items() if not name.startswith(backbone.replaced_layers)}
    expected = backbone.state_dict()
    counters = {name: expected[name] for name in expected if name.endswith("num_batches_tracked")}
    problem = mismatch(expected, {**counters, **found})
    if problem:
        raise WeightsError(f"{where}: does not fit the backbone {model.config.backbone}: {problem}")
    backbone.load_state_dict({**counters, **found})


def mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Describe the first tensor that keeps `found` from replacing `expected`: name, expected, found. Empty: none."""
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

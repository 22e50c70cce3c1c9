"""The files of a checkpoint that need torch: save it, load its network, and load the state of its training."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import agr_ray
from agr_ray.config.pipeline import DEFAULT_PIPELINE, Pipeline
from agr_ray.errors import ConfigError
from agr_ray.models.card import model_card
from agr_ray.models.checkpoint import (
    CARD,
    FORMAT_VERSION,
    HEADS_PREFIX,
    META,
    TRAIN_STATE,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    content_code,
    first_line,
)
from agr_ray.models.int8 import Int8Files, write_int8
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.pretrained import mismatch
from agr_ray.models.transform import Transform
from agr_ray.schema import SCHEMA_VERSION


def save_checkpoint(
    directory: Path,
    model: MultiTaskNet,
    transform: Transform,
    *,
    pipeline: Pipeline = DEFAULT_PIPELINE,
    train_state: Mapping[str, Any] | None = None,
    train_images: Tensor | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    git_commit: str = "",
    created: str = "",
    int8_files: Int8Files | None = None,
) -> None:
    """Write a checkpoint into a new or empty directory.

    Args:
        directory: created if necessary.
        model: the network to save.
        transform: of the model's input.
        pipeline: vision settings of its training crops, and predict settings of its validation.
        train_state: `EpochReport.train_state()`, plain values and tensors; None: not written.
        train_images: `content_codes` of the training images, stored in train_state.pt.
        data: description of the training data: split_manifest_sha256, counts, train_labels, source, detector, template;
            for several prepared sets also `sets`, with an entry for each.
        metrics: validation metrics.
        config: configuration of the training run.
        git_commit: of the code; empty: unknown.
        created: UTC time, ISO 8601.
        int8_files: the network in int8; None: there is none.

    Raises:
        ValueError: a value for meta.json is NaN or infinite; nothing is written.
    """
    meta = {
        "format_version": FORMAT_VERSION,
        "schema_version": SCHEMA_VERSION,
        "model": model.config.model_dump(mode="json"),
        "transform": transform.to_json(),
        "label_space": model.space.to_json(),
        **pipeline.to_json(),
        "data": dict(data or {}),
        "metrics": dict(metrics or {}),
        "config": dict(config or {}),
        "git_commit": git_commit,
        "created": created,
        "versions": {"agr_ray": agr_ray.__version__, "torch": str(torch.__version__)},
    }
    text = json.dumps(meta, indent=1, allow_nan=False) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    weights = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / WEIGHTS)
    if train_state is not None or train_images is not None:
        images = {} if train_images is None else {"train_images": train_images}
        torch.save({**(train_state or {}), **images}, directory / TRAIN_STATE)
    if int8_files is not None:
        write_int8(directory, int8_files)
    (directory / CARD).write_text(model_card(meta), encoding="utf-8")
    unfinished = directory / f"{META}.part"
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, directory / META)


def load_network(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> MultiTaskNet:
    """Build the network of a checkpoint; it is in evaluation mode.

    Raises:
        CheckpointError: there is no such network, or its weights are missing, damaged or unreadable, or do not fit it.
    """
    model = _new_network(checkpoint)
    _load(model, checkpoint)
    return model.to(device).eval()


def load_heads(checkpoint: Checkpoint) -> MultiTaskNet:
    """Build a network whose heads alone have weights, on the CPU; it is in evaluation mode.

    An int8 network needs no more, because OpenVINO computes its features.

    Raises:
        CheckpointError: as `load_network`.
    """
    with torch.device("meta"):
        model = _new_network(checkpoint)
    model.heads = model.new_heads()
    _load(model, checkpoint, HEADS_PREFIX)
    return model.eval()


def _new_network(checkpoint: Checkpoint) -> MultiTaskNet:
    try:
        return MultiTaskNet(checkpoint.config, checkpoint.space)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.directory / META}: {first_line(error)}") from None


def _load(model: MultiTaskNet, checkpoint: Checkpoint, prefix: str = "") -> None:
    """Load the weights whose names begin with `prefix`."""
    path = checkpoint.directory / WEIGHTS
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected weights, found no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected safetensors, found {first_line(error)}") from None
    expected, found = (
        {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for tensors in (model.state_dict(), weights)
    )
    problem = mismatch(expected, found)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    part = model.get_submodule(prefix.rstrip("."))
    part.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in found.items()})


def given_network(checkpoint: Checkpoint, uri: str, key: str) -> MultiTaskNet:
    """Build the network of the checkpoint at `uri`, which the setting `key` names.

    Raises:
        ConfigError: as `load_network`; the message names the setting.
    """
    try:
        return load_network(checkpoint)
    except CheckpointError as error:
        raise ConfigError(f"{key} {uri}: {error}") from None


def load_train_state(directory: Path) -> dict[str, Any]:
    """Read the state to resume a run from, with `train_images` if they were saved; tensors are on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, or holds anything but plain values and tensors.
    """
    path = directory / TRAIN_STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected the state of a training run, found no such file") from None
    except Exception as error:  # torch's unpickler raises KeyError, IndexError and others on a damaged file
        raise CheckpointError(f"{path}: expected the state of a training run, found {first_line(error)}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected the state of a training run, found {type(state).__name__}")
    return cast(dict[str, Any], state)


def content_codes(content_hashes: Iterable[str]) -> Tensor:
    """Return the first 8 bytes of each distinct hash of an image's content, sorted, int64.

    Sets of n and m images share an image if and only if their codes intersect, whatever its names are; a false match
    has a probability of about n * m / 2^64. So a checkpoint can tell that it was not trained on an image, without
    storing names.

    Args:
        content_hashes: SHA-256 in hex, as in `schema.MANIFEST`.
    """
    return torch.tensor(sorted(set(map(content_code, content_hashes))), dtype=torch.int64)

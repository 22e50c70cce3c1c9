"""A checkpoint is one self-contained directory, complete or absent.

    CHECKPOINT/
      meta.json             written last
        format_version      of this layout
        model               configuration of the network
        transform           how a stored crop becomes the network's input
        label_space         classes and age groups, in the order of the outputs
        vision              how photographs become faces: the detector and every other setting of [vision]
        predict             how outputs become predictions: every setting of [predict]
        data, metrics, config, git_commit, created, versions    where it comes from
      weights.safetensors   the weights that predict: the moving average, if the run keeps one
      int8.xml, int8.bin    the network in int8, if `agr-ray quantize` wrote the checkpoint
      calibration.json      intervals, temperatures and abstention; agr-ray evaluate --calibrate writes it
      model_card.md         intended uses, training data and errors; agr-ray evaluate adds what it measures
      train_state.pt        optimiser, raw weights, loss weights, epoch, best, history, train_images; resumes a run

Scoring and evaluation need meta.json and weights.safetensors and no recipe. With calibration.json they also give age
intervals, calibrated probabilities and abstention. A copy that only predicts can leave train_state.pt out.
Directories are local; `checkpoint_files` copies them from and to other storage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import agr_ray
from agr_ray.config import ModelConfig
from agr_ray.config.pipeline import DEFAULT_PIPELINE, Pipeline
from agr_ray.config.section import check_keys, rebuilt
from agr_ray.data.prepared import RENDERED
from agr_ray.errors import ConfigError
from agr_ray.labels import LabelSpace
from agr_ray.models.card import model_card
from agr_ray.models.int8 import Int8Files, read_int8, write_int8
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.pretrained import mismatch
from agr_ray.models.transform import Transform
from agr_ray.schema import SCHEMA_VERSION

FORMAT_VERSION: Final = 5
"""Must be increased whenever a reader of the old layout would misread the new one."""

WEIGHTS: Final = "weights.safetensors"
TRAIN_STATE: Final = "train_state.pt"
CALIBRATION: Final = "calibration.json"
CARD: Final = "model_card.md"
META: Final = "meta.json"

_TABLES: Final = ("model", "transform", "label_space", "vision", "predict", "data", "metrics", "config", "versions")
_KEYS: Final = ("format_version", "schema_version", *_TABLES, "git_commit", "created")
"""Keys of meta.json."""


_UNTRAINED: Final = (
    "this checkpoint holds the initial weights of a training run, so its predictions are meaningless; use the folder "
    "best of the finished run"
)
_RENDERED: Final = "this model was trained on rendered faces only, so its estimates for real people mean nothing"


class CheckpointError(Exception):
    """The directory is not a checkpoint of this format. The message names the file, and what was expected and found."""


@dataclass(frozen=True)
class Checkpoint:
    """A network in evaluation mode, and its metadata."""

    directory: Path
    """Local folder from which it was loaded."""
    model: MultiTaskNet
    transform: Transform
    pipeline: Pipeline
    """The settings it was trained with; calibration.json may have been fitted under others."""
    meta: Mapping[str, Any]
    """Contents of meta.json."""
    int8: Int8Files | None
    """The same network in int8; None: it has not been quantised."""

    @cached_property
    def digest(self) -> str:
        """Return the `model_digest`."""
        return model_digest(self.directory)

    @property
    def untrained(self) -> str:
        """Return a warning if these are the initial weights of a training run; else nothing."""
        is_initial = "num_train_rows" in self.meta["data"] and not self.meta["config"]
        return _UNTRAINED if is_initial else ""

    @property
    def rendered(self) -> str:
        """Return a warning if all its training images were rendered; else nothing."""
        return _RENDERED if self.meta["data"].get("source") == RENDERED else ""


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


def load_checkpoint(directory: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Rebuild the network from a local directory; it is in evaluation mode.

    Raises:
        CheckpointError: a file is missing, damaged or unreadable, or of another format, label order or shape.
    """
    meta = read_meta(directory)
    path = directory / META
    with _named(path):
        config, pipeline = rebuilt(ModelConfig, meta["model"], "model"), Pipeline.from_json(meta)
        model = MultiTaskNet(config, LabelSpace.from_json(meta["label_space"]))
    with _named(path, "transform: "):
        transform = Transform.from_json(meta["transform"])
    weights = _read_weights(directory / WEIGHTS)
    problem = mismatch(model.state_dict(), weights)
    if problem:
        raise CheckpointError(f"{directory / WEIGHTS}: {problem}")
    model.load_state_dict(weights)
    return Checkpoint(directory, model.to(device).eval(), transform, pipeline, meta, read_int8(directory))


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
        raise CheckpointError(f"{path}: expected the state of a training run, found {_first_line(error)}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected the state of a training run, found {type(state).__name__}")
    return cast(dict[str, Any], state)


def read_meta(directory: Path) -> dict[str, Any]:
    """Read meta.json and check that this code can use the checkpoint.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    path = directory / META
    meta = _read_json(path)
    if meta is None:
        raise CheckpointError(f"{path}: expected a checkpoint, found no such file")
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: expected format_version {FORMAT_VERSION}, found {version!r}; train it again")
    with _named(path):
        check_keys(meta, _KEYS, "top level")
        for key in _TABLES:
            if not isinstance(meta[key], dict):
                raise ValueError(f"{key}: expected a table, found {meta[key]!r}")
    with _named(path, "label_space: "):
        LabelSpace.from_json(meta["label_space"])
    return cast(dict[str, Any], meta)


def read_calibration_json(directory: Path) -> dict[str, Any] | None:
    """Read what `evaluation.calibration.Calibration.to_json` returned; None if the checkpoint is not calibrated.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / CALIBRATION
    values = _read_json(path)
    if values is not None and not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a table, found {type(values).__name__}")
    return values


def model_digest(directory: Path) -> str:
    """Return the SHA-256, in hex, of everything that decides predictions: weights, network, transform, labels."""
    meta = read_meta(directory)
    network = {key: value for key, value in meta["model"].items() if key not in ("preset", "pretrained")}
    decisive = {"model": network, "transform": meta["transform"], "label_space": meta["label_space"]}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    try:
        digest.update((directory / WEIGHTS).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{directory / WEIGHTS}: expected weights, found no such file") from None
    for body in read_int8(directory) or ():
        digest.update(body)
    return digest.hexdigest()


def content_codes(content_hashes: Iterable[str]) -> Tensor:
    """Return the first 8 bytes of each distinct hash of an image's content, sorted, int64.

    Sets of n and m images share an image if and only if their codes intersect, whatever its names are; a false match
    has a probability of about n * m / 2^64. So a checkpoint can tell that it was not trained on an image, without
    storing names.

    Args:
        content_hashes: SHA-256 in hex, as in `schema.MANIFEST`.
    """
    return torch.tensor(sorted(set(map(content_code, content_hashes))), dtype=torch.int64)


def content_code(content_hash: str) -> int:
    """Return the code of one image in `content_codes`."""
    return int.from_bytes(bytes.fromhex(content_hash)[:8], "big", signed=True)


@contextmanager
def _named(path: Path, key: str = "") -> Iterator[None]:
    """Turn an error about a file's values into a CheckpointError that names the file and, if given, the key."""
    try:
        yield
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {key}{_first_line(error)}") from None


def _read_json(path: Path) -> Any:
    """Return the value in a JSON file; None if there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected JSON, found {_first_line(error)}") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected weights, found no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected safetensors, found {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__

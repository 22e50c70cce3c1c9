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
Directories are local; `checkpoint_files` copies them from and to other storage. This module does not import torch;
`checkpoint_network` does, which builds the network, loads the training state and writes checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

from agr_ray.config import ModelConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.config.section import check_keys, rebuilt
from agr_ray.data.prepared import RENDERED
from agr_ray.errors import ConfigError
from agr_ray.labels import LabelSpace
from agr_ray.models.int8 import Int8Files, read_int8
from agr_ray.models.tasks import check_tasks, ordered_tasks
from agr_ray.models.transform import Transform

FORMAT_VERSION: Final = 5
"""Must be increased whenever a reader of the old layout would misread the new one."""

WEIGHTS: Final = "weights.safetensors"
HEADS_PREFIX: Final = "heads."
"""Begins the names of the heads' weights."""
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
    """What a checkpoint says about its network; `checkpoint_network.load_network` builds the network itself."""

    directory: Path
    """Local folder from which it was read."""
    config: ModelConfig
    """Of the network."""
    space: LabelSpace
    transform: Transform
    pipeline: Pipeline
    """The settings it was trained with; calibration.json may have been fitted under others."""
    meta: Mapping[str, Any]
    """Contents of meta.json."""
    int8: Int8Files | None
    """The same network in int8; None: it has not been quantised."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the network's tasks, in the order of its heads."""
        return ordered_tasks(self.config)

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


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read and check a local checkpoint, except its weights: `checkpoint_network.load_network` does.

    Raises:
        CheckpointError: meta.json is missing, damaged or unreadable, or of another format or label order.
    """
    meta = read_meta(directory)
    path = directory / META
    with _named(path):
        config, pipeline = rebuilt(ModelConfig, meta["model"], "model"), Pipeline.from_json(meta)
        space = LabelSpace.from_json(meta["label_space"])
        check_tasks(config, space)
    with _named(path, "transform: "):
        transform = Transform.from_json(meta["transform"])
    return Checkpoint(directory, config, space, transform, pipeline, meta, read_int8(directory))


def read_meta(directory: Path) -> dict[str, Any]:
    """Read meta.json and check that this code can use the checkpoint.

    Raises:
        CheckpointError: as `read_checkpoint`.
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


def content_code(content_hash: str) -> int:
    """Return the code of one image in `content_codes`."""
    return int.from_bytes(bytes.fromhex(content_hash)[:8], "big", signed=True)


@contextmanager
def _named(path: Path, key: str = "") -> Iterator[None]:
    """Turn an error about a file's values into a CheckpointError that names the file and, if given, the key."""
    try:
        yield
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {key}{first_line(error)}") from None


def _read_json(path: Path) -> Any:
    """Return the value in a JSON file; None if there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected JSON, found {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; without a message, its class."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__

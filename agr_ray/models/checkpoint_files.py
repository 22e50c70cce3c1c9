"""Checkpoints at any URI: copied to a local folder for reading, and published whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import save

from agr_ray.errors import ConfigError
from agr_ray.models.card import with_measured
from agr_ray.models.checkpoint import (
    CALIBRATION,
    CARD,
    HEADS_PREFIX,
    META,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    model_digest,
    read_checkpoint,
)
from agr_ray.models.int8 import INT8_FILES
from agr_ray.schema import TEMPLATE
from agr_ray.storage import ChangedObject, MissingObject, Storage, StorageError, StorageFailed, StorageUnavailable
from agr_ray.storage.scratch import scratch_folder

_REPLACED_WITHIN_S: Final = 15.0
_PAUSE_S: Final = 0.5
_CARD_ATTEMPTS: Final = 20


@contextmanager
def local_checkpoint(storage: Storage, uri: str, key: str) -> Iterator[Checkpoint]:
    """Copy a checkpoint to a local folder, read it, and delete the copy afterwards.

    Raises:
        ConfigError: there is no checkpoint, or this code can't use it; the message names the configuration's `key`.
    """
    with scratch_folder() as temporary:
        directory = Path(temporary, "checkpoint")
        try:
            _download(storage, storage.absolute(uri), directory)
            checkpoint = read_checkpoint(directory)
        except MissingObject:
            raise ConfigError(f"{key} {uri}: {_why_missing(storage, uri)}") from None
        except CheckpointError as error:
            raise ConfigError(f"{key} {uri}: {error}") from None
        except OSError as error:
            raise ConfigError(f"{key} {uri}: can't be copied to a local folder: {error}") from None
        template = checkpoint.transform.template
        if template != TEMPLATE:
            raise ConfigError(
                f"{key} {uri}: was trained on crops aligned to template {template}; this version aligns to {TEMPLATE}"
            )
        yield checkpoint


def _why_missing(storage: Storage, uri: str) -> str:
    """Return why there is no checkpoint at a URI: it is in the folder `best`, or its training run has not finished."""
    missing = f"there is no checkpoint there (a folder with {META})"
    if storage.exists(storage.join(storage.absolute(uri), "best", META)):
        return f"{missing}; did you mean {uri.rstrip('/')}/best?"
    for run in (uri.rstrip("/"), uri.rstrip("/").rpartition("/")[0]):
        if run and storage.exists(storage.join(storage.absolute(run), "run.json")):
            return f"{missing}, because the training run {run} has not finished; the same agr-ray train resumes it"
    return missing


def _download(storage: Storage, uri: str, directory: Path) -> None:
    """Copy a consistent snapshot of a checkpoint; start over if it is replaced during the copy.

    On S3 a checkpoint has no marker while it is being replaced.

    Raises:
        MissingObject: there is no checkpoint, or its upload never finished.
        StorageFailed: the checkpoint keeps being replaced.
    """
    marker, weights = storage.join(uri, META), storage.join(uri, WEIGHTS)
    until_s, is_first = time.monotonic() + _REPLACED_WITHIN_S, True
    while True:
        etag = ""
        try:
            etag = storage.read_with_etag(marker)[1]
            storage.download_tree(uri, str(directory), marker=META)
            if storage.read_with_etag(marker)[1] == etag:
                return
        except (MissingObject, OSError):
            is_being_replaced = bool(etag) or is_first or storage.exists(weights)
            if not is_being_replaced or time.monotonic() > until_s:
                raise
        if time.monotonic() > until_s:
            raise StorageFailed(f"{uri} kept being replaced for {_REPLACED_WITHIN_S:g} s while it was read")
        shutil.rmtree(directory, ignore_errors=True)
        is_first = False
        time.sleep(_PAUSE_S)


def publish_checkpoint(storage: Storage, directory: Path, uri: str, *, replace: bool = True) -> bool:
    """Publish a local checkpoint at `uri`. If the same model is already there, leave it, its calibration and its card.

    Args:
        storage: of `uri`.
        directory: the local checkpoint.
        uri: folder or prefix that it will be.
        replace: delete all that the folder or prefix holds now.

    Returns:
        Whether this replaced another model that had a calibration.

    Raises:
        FileExistsError: with `replace` false, the folder or prefix holds anything but the same model, or part of it.
    """
    with scratch_folder() as temporary:
        earlier = Path(temporary)
        for name in (META, WEIGHTS, *INT8_FILES, CALIBRATION):
            with contextlib.suppress(MissingObject):
                (earlier / name).write_bytes(storage.read(storage.join(uri, name)))
        try:
            if model_digest(earlier) == model_digest(directory):
                return False
        except CheckpointError:  # there is no checkpoint, or only part of one
            pass
        was_calibrated = (earlier / CALIBRATION).exists()
        is_complete = (earlier / META).exists()
    if not replace and storage.exists(uri):
        own = set() if is_complete else {path.name for path in directory.iterdir()}  # of an upload that was killed
        if any(info.key not in own for info in storage.list(uri)):
            raise FileExistsError("is not empty")
    storage.upload_tree(str(directory), uri, overwrite=True)
    return was_calibrated


def calibration_hint(uri: str) -> str:
    """Return the warning for a calibrated checkpoint that was replaced by another model."""
    return (
        f"warning: {uri} now holds another model, without the previous model's calibration; calibrate it: "
        f"agr-ray evaluate --checkpoint {uri} --data DATA --split val --calibrate"
    )


def portable_checkpoint(directory: Path, *, is_int8: bool = False) -> dict[str, bytes]:
    """Return the files that a network is loaded from, by name, to be sent to other machines.

    Args:
        directory: of a local checkpoint.
        is_int8: whether its int8 network is used, so that the heads are all the weights that are needed.
    """
    whole = (META, *INT8_FILES) if is_int8 else (META, WEIGHTS, *INT8_FILES)
    files = {name: (directory / name).read_bytes() for name in whole if (directory / name).exists()}
    if is_int8:
        with safe_open(directory / WEIGHTS, "numpy") as weights:
            names = [name for name in weights.keys() if name.startswith(HEADS_PREFIX)]  # noqa: SIM118
            heads = {name: weights.get_tensor(name) for name in names}
        files[WEIGHTS] = save(heads)
    return files


@contextmanager
def unpacked_checkpoint(files: dict[str, bytes]) -> Iterator[Path]:
    """Write the result of `portable_checkpoint` to a local folder, and delete it afterwards."""
    with scratch_folder() as temporary:
        for name, body in files.items():
            Path(temporary, name).write_bytes(body)
        yield Path(temporary)


def add_to_card(storage: Storage, checkpoint: str, metrics: dict[str, Any], console: Console) -> None:
    """Add an evaluation's metrics to the checkpoint's model card.

    If the card is missing or can't be written, print a warning: the metrics themselves are stored elsewhere.
    """
    uri = storage.join(checkpoint, CARD)
    try:
        for _ in range(_CARD_ATTEMPTS):  # several evaluations of one checkpoint may run at once
            card, etag = storage.read_with_etag(uri)
            with contextlib.suppress(ChangedObject):
                storage.write(uri, with_measured(card.decode(), metrics).encode(), if_match=etag)
                return
        raise StorageFailed(f"{uri} was changed by others in each of {_CARD_ATTEMPTS} attempts to write it")
    except (StorageError, StorageUnavailable) as error:
        console.print(f"warning: the model card was not updated: {error}")

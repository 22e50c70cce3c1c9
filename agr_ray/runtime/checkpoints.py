"""Checkpoints at any URI: brought to a local folder to be read, and published whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from agr_ray.config import ConfigError, PredictConfig, digest
from agr_ray.learn.calibration import Calibration
from agr_ray.models.checkpoint import (
    CALIBRATION,
    META,
    WEIGHTS,
    CheckpointError,
    load_checkpoint,
    model_digest,
    read_calibration_json,
)
from agr_ray.schema import TEMPLATE
from agr_ray.storage import MissingObject, Storage


@contextmanager
def local_checkpoint(storage: Storage, uri: str, key: str) -> Iterator[Path]:
    """Copy a checkpoint to a local folder, check that it can be used, and delete the copy afterwards.

    Raises:
        ConfigError: naming the configuration's `key`: there is none, or one that this code can't use.
    """
    with TemporaryDirectory() as temporary:
        directory = Path(temporary, "checkpoint")
        try:
            storage.download_tree(storage.absolute(uri), str(directory), marker=META)
            meta = load_checkpoint(directory).meta
        except MissingObject:
            raise ConfigError(f"{key} {uri}: there is no checkpoint there (a folder with {META})") from None
        except CheckpointError as error:
            raise ConfigError(f"{key} {uri}: {error}") from None
        template = meta["transform"]["template"]
        if template != TEMPLATE:
            raise ConfigError(
                f"{key} {uri}: was trained on crops aligned to template {template}; this version aligns to {TEMPLATE}"
            )
        yield directory


def read_calibration(directory: Path, config: PredictConfig, key: str) -> tuple[Calibration | None, str]:
    """Return the checkpoint's calibration, or None and the reason why there is none that can be used.

    Args:
        directory: as `local_checkpoint` gives it.
        config: how the network's outputs are to become predictions: calibration holds under the same settings only.
        key: of the configuration, that names the checkpoint.

    Raises:
        ConfigError: calibration.json is damaged, or of another format.
    """
    try:
        said = read_calibration_json(directory)
        if said is None:
            how = "jobs/evaluate.py --evaluate.split val --calibrate writes it"
            return None, f"the checkpoint has no {CALIBRATION}; {how}"
        calibration = Calibration.from_json(said)
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{key}: {CALIBRATION}: {error}") from None
    if calibration.model_digest != model_digest(directory):
        return None, f"the checkpoint's {CALIBRATION} belongs to another model; calibrate again"
    if calibration.predict_digest != digest(config):
        how = "give the recipe that it was fitted with, or calibrate again"
        return None, f"the checkpoint's {CALIBRATION} was fitted under other predict settings; {how}"
    return calibration, ""


def portable_checkpoint(directory: Path) -> dict[str, bytes]:
    """Return the files that predicting needs, and the calibration if there is one, to be sent to other machines."""
    names = [name for name in (WEIGHTS, CALIBRATION, META) if (directory / name).exists()]
    return {name: (directory / name).read_bytes() for name in names}


@contextmanager
def unpacked_checkpoint(files: dict[str, bytes]) -> Iterator[Path]:
    """Put what `portable_checkpoint` gave into a local folder, and delete it afterwards."""
    with TemporaryDirectory() as temporary:
        for name, body in files.items():
            Path(temporary, name).write_bytes(body)
        yield Path(temporary)

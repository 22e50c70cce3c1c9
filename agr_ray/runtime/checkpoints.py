"""Checkpoints at any URI: brought to a local folder to be read, and published whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from agr_ray.config import ConfigError
from agr_ray.models.checkpoint import META, WEIGHTS, CheckpointError, load_checkpoint
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
            raise ConfigError(f"{key} {uri}: there is no checkpoint, that is a folder with {META}") from None
        except CheckpointError as error:
            raise ConfigError(f"{key} {uri}: {error}") from None
        template = meta["transform"]["template"]
        if template != TEMPLATE:
            raise ConfigError(
                f"{key} {uri}: was trained on crops aligned to template {template}; this version aligns to {TEMPLATE}"
            )
        yield directory


def portable_checkpoint(directory: Path) -> dict[str, bytes]:
    """Return the files that predicting needs, to be sent to workers on other machines."""
    return {name: (directory / name).read_bytes() for name in (WEIGHTS, META)}


@contextmanager
def unpacked_checkpoint(files: dict[str, bytes]) -> Iterator[Path]:
    """Put what `portable_checkpoint` gave into a local folder, and delete it afterwards."""
    with TemporaryDirectory() as temporary:
        for name, body in files.items():
            Path(temporary, name).write_bytes(body)
        yield Path(temporary)

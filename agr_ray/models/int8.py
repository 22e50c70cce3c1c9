"""The files of an int8 network, which a checkpoint stores beside its weights. This module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from agr_ray.errors import ConfigError
from agr_ray.openvino_extra import check_installed, core

GRAPH_FILE: Final = "int8.xml"
WEIGHTS_FILE: Final = "int8.bin"
INT8_FILES: Final = (GRAPH_FILE, WEIGHTS_FILE)


class Int8Files(NamedTuple):
    """Contents of the files of an int8 network, in OpenVINO's format. Its batch size is fixed."""

    graph: bytes
    weights: bytes


def read_int8(directory: Path) -> Int8Files | None:
    """Return the int8 network of a local checkpoint; None if it has none."""
    paths = [directory / name for name in INT8_FILES]
    return Int8Files(*(path.read_bytes() for path in paths)) if all(path.exists() for path in paths) else None


def write_int8(directory: Path, files: Int8Files) -> None:
    """Write an int8 network into a local checkpoint."""
    for name, body in zip(INT8_FILES, files, strict=True):
        (directory / name).write_bytes(body)


def check_int8(files: Int8Files | None, key: str) -> None:
    """Reject an int8 network that can't be used here.

    Args:
        files: of the network; None: there is none.
        key: configuration key that names its checkpoint.

    Raises:
        ConfigError: there is none, its files are damaged, or OpenVINO is not installed.
    """
    if files is None:
        raise ConfigError(
            f"{key}: predict.precision int8: the checkpoint has no int8 network; agr-ray quantize makes a checkpoint "
            "that has one"
        )
    check_installed(f"{key}: predict.precision int8", "openvino")
    try:
        core().read_model(model=files.graph, weights=files.weights)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise ConfigError(f"{key}: {GRAPH_FILE} or {WEIGHTS_FILE} is damaged: {last}") from None

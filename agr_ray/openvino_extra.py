"""The packages of the extra `openvino`: whether they are installed, and how OpenVINO is imported and set."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agr_ray.errors import ConfigError, missing_extra


def check_installed(what: str, *packages: str) -> None:
    """Reject what needs packages that are not installed.

    Args:
        what: the command or setting, for the message.
        packages: `openvino`, `nncf` or both.

    Raises:
        ConfigError: one is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{what}: {missing_extra('openvino', missing)}, on every node")


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would otherwise report each use to its makers."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@cache
def core() -> Any:
    """Return OpenVINO's core, the same for the whole process.

    With the last core, OpenVINO unloads the library that computes. After that, a signal that Python handles ends the
    process with a segmentation fault (OpenVINO 2026.4).
    """
    return import_openvino().Core()


class CompiledGraph:
    """A graph on the CPU, which several threads may share: they take turns.

    Args:
        graph: an `openvino.Model`.
        num_threads: for each inference.
        floats: data type of the layers that are not int8, `f32` or `bf16`; OpenVINO itself would choose by the CPU.
    """

    def __init__(self, graph: Any, num_threads: int, floats: str = "f32") -> None:
        settings = {
            "INFERENCE_NUM_THREADS": num_threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": floats,
            "ENABLE_CPU_PINNING": False,
        }
        self._request = core().compile_model(graph, "CPU", settings).create_infer_request()
        self._tensor = import_openvino().Tensor  # faster than letting OpenVINO convert arrays
        self._lock = Lock()

    def __call__(self, batch: NDArray[Any]) -> list[NDArray[np.float32]]:
        """Return the outputs as arrays of their own.

        Args:
            batch: the graph's only input: C-contiguous, of its shape and data type.
        """
        with self._lock:
            return list(self._request.infer(self._tensor(batch, shared_memory=True)).values())

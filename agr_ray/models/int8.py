"""Networks in int8 for CPUs: OpenVINO computes the features, two to five times as fast as PyTorch.

`agr-ray quantize` makes such a network, and a checkpoint stores it beside its weights. The heads stay PyTorch's, in
float32: they take no time, and 256 steps are too few for an age.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agr_ray.errors import ConfigError
from agr_ray.models.heads.base import Head
from agr_ray.models.network import MultiTaskNet, head_outputs
from agr_ray.storage.scratch import scratch_folder

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
        raise ConfigError(
            f"{what}: needs {' and '.join(missing)}, not installed here; pip install 'agr_ray[openvino]', on every node"
        )


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
        _openvino().Core().read_model(model=files.graph, weights=files.weights)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise ConfigError(f"{key}: {GRAPH_FILE} or {WEIGHTS_FILE} is damaged: {last}") from None


class Int8Net(nn.Module):
    """A network whose features OpenVINO computes in int8, on as many threads as PyTorch uses when it is built.

    Args:
        model: in evaluation mode, on the CPU; gives the heads.
        files: of the same network.
    """

    def __init__(self, model: MultiTaskNet, files: Int8Files) -> None:
        super().__init__()
        self.heads = model.heads
        self._config = model.config
        core = _openvino().Core()
        # Without f32, OpenVINO would round the layers that stay in floating point to bfloat16 on some CPUs.
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        graph = core.read_model(model=files.graph, weights=files.weights)
        self.batch_size = int(graph.input(0).shape[0])
        """Images that `forward` takes at a time: as many as when the network was quantised."""
        self._request: Any = core.compile_model(graph, "CPU", settings).create_infer_request()
        self.eval()

    @property
    def heads_by_task(self) -> Mapping[str, Head]:
        """Return the heads by task."""
        return cast(Mapping[str, Head], dict(self.heads.items()))

    def forward(self, images_nchw: Tensor, pose_degrees: Tensor | None = None) -> dict[str, Any]:
        """Return the raw outputs by task, as `MultiTaskNet.forward`; a batch has `batch_size` images."""
        images = np.ascontiguousarray(images_nchw.numpy())
        features = self._request.infer([images], share_inputs=True)[0]
        return head_outputs(self.heads, self._config, torch.from_numpy(np.array(features)), pose_degrees)


def quantize(model: MultiTaskNet, batches: Iterable[NDArray[np.float32]]) -> Int8Files:
    """Quantise a network after training, by NNCF: int8 weights, and int8 activations whose ranges are measured.

    Source: github.com/openvinotoolkit/nncf, post-training quantization. Its default correction of biases is faster, but
    ages then differ by 0.16 years on average instead of 0.12 (`utkface_lite`).

    Args:
        model: in evaluation mode, on the CPU.
        batches: normalised images that are like those to predict, (n, 3, side, side) each, n being the same for all.
    """
    openvino, nncf = _openvino(), _nncf()
    images = list(batches)
    example = torch.from_numpy(images[0])
    with _traceable():
        graph = openvino.convert_model(_Features(model), example_input=example, input=[tuple(example.shape)])
    graph = nncf.quantize(graph, nncf.Dataset(images), subset_size=len(images), fast_bias_correction=False)
    return _serialised(openvino, graph)


class _Features(nn.Module):
    """The part of a network that is quantised."""

    def __init__(self, model: MultiTaskNet) -> None:
        super().__init__()
        self._model = model

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self._model.features(images_nchw)


@contextmanager
def _traceable() -> Iterator[None]:
    """Let OpenVINO call torch.jit.trace without its warnings, and without fused attention, which it can't trace."""
    is_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fused)


def _serialised(openvino: Any, graph: Any) -> Int8Files:
    """Return a network in OpenVINO's format."""
    with scratch_folder() as folder:
        openvino.save_model(graph, Path(folder, GRAPH_FILE), compress_to_fp16=False)
        files = read_int8(Path(folder))
    assert files is not None
    return files


def _openvino() -> Any:
    """Import OpenVINO without its telemetry, which would otherwise report each use to its makers."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _nncf() -> Any:
    """Import NNCF; it and PyTorch's compiler of extensions, which it imports, then print errors only."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import nncf

    nncf.set_log_level(logging.WARNING)
    return nncf

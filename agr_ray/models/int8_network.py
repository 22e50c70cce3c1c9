"""Networks in int8 for CPUs: OpenVINO computes the features, two to five times as fast as PyTorch.

`agr-ray quantize` makes such a network. The heads stay PyTorch's, in float32: they take no time, and 256 steps are too
few for an age.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agr_ray.models.heads.base import Head
from agr_ray.models.int8 import GRAPH_FILE, Int8Files, read_int8
from agr_ray.models.network import MultiTaskNet, head_outputs
from agr_ray.openvino_extra import CompiledGraph, core, import_openvino
from agr_ray.storage.scratch import scratch_folder


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
        graph = core().read_model(model=files.graph, weights=files.weights)
        self.batch_size = int(graph.input(0).shape[0])
        """Images that `forward` takes at a time: as many as when the network was quantised."""
        self._features = CompiledGraph(graph, torch.get_num_threads())
        self.eval()

    @property
    def heads_by_task(self) -> Mapping[str, Head]:
        """Return the heads by task."""
        return cast(Mapping[str, Head], dict(self.heads.items()))

    def forward(self, images_nchw: Tensor, pose_degrees: Tensor | None = None) -> dict[str, Any]:
        """Return the raw outputs by task, as `MultiTaskNet.forward`; a batch has `batch_size` images."""
        images = np.ascontiguousarray(images_nchw.numpy())
        (features,) = self._features(images)
        return head_outputs(self.heads, self._config, torch.from_numpy(features), pose_degrees)


def quantize(model: MultiTaskNet, batches: Iterable[NDArray[np.float32]]) -> Int8Files:
    """Quantise a network after training, by NNCF: int8 weights, and int8 activations whose ranges are measured.

    Source: github.com/openvinotoolkit/nncf, post-training quantization. Its default correction of biases is faster, but
    ages then differ by 0.16 years on average instead of 0.12 (`utkface_lite`).

    Args:
        model: in evaluation mode, on the CPU.
        batches: normalised images that are like those to predict, (n, 3, side, side) each, n being the same for all.
    """
    openvino, nncf = import_openvino(), _nncf()
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


def _nncf() -> Any:
    """Import NNCF; it and PyTorch's compiler of extensions, which it imports, then print errors only."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import nncf

    nncf.set_log_level(logging.WARNING)
    return nncf

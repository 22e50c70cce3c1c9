"""What a user would write first: facenet-pytorch's MTCNN with its defaults, then a float32 network on each face."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from facenet_pytorch import MTCNN
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.models.checkpoint_network import load_network
from agr_ray.models.network_input import normalise
from agr_ray.predict.forward import average

NUMBERS: Final = pa.list_(pa.float64())
FACE: Final = pa.struct(
    {"box": NUMBERS, "score": pa.float64(), "age": pa.float64(), "gender": pa.float64(), "race": NUMBERS}
)
"""What `CheckpointScorer` returns for a face."""
PHOTOGRAPH: Final = pa.schema({"path": pa.string(), "faces": pa.list_(FACE), "scored_at": pa.float64()})
"""A row of the peers' tables. `faces` is null if the file does not decode; `scored_at` is the time, seconds."""


class FacenetScorer:
    """Finds the faces of one photograph and runs a network on them.

    Args:
        network: takes crops of n faces, (n, 3, image_size, image_size) float32 from 0 to 255.
        image_size: side of its input, pixels.
    """

    def __init__(self, network: Callable[[Tensor], Any], image_size: int) -> None:
        self._mtcnn = MTCNN(keep_all=True, image_size=image_size, post_process=False)
        self._network = network

    def __call__(self, image: Image.Image | NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64], Any]:
        """Return boxes (n, 4), scores (n,), and what the network returned, None without faces."""
        boxes, scores, _ = self._mtcnn.detect(image, landmarks=True)
        if boxes is None:
            return np.empty((0, 4)), np.empty(0), None
        with torch.inference_mode():
            outputs = self._network(self._mtcnn.extract(image, boxes, None))
        return np.asarray(boxes, np.float64), np.asarray(scores, np.float64), outputs


class CheckpointScorer:
    """Finds the faces of one photograph and predicts their attributes with the network of a checkpoint.

    Adds a byte for each photograph to the file that PEERS_PROGRESS names, if it is set: `peers.py` watches it.
    """

    def __init__(self, checkpoint: str) -> None:
        loaded = read_checkpoint(Path(checkpoint))
        network = load_network(loaded)
        self._heads = network.heads_by_task
        self._scorer = FacenetScorer(
            lambda crops: network(normalise(crops, loaded.transform)), loaded.transform.image_size
        )

    def __call__(self, image: Image.Image | NDArray[np.uint8]) -> list[dict[str, Any]]:
        """Return a `FACE` for each face."""
        boxes, scores, outputs = self._scorer(image)
        with Path(os.environ.get("PEERS_PROGRESS", os.devnull)).open("ab") as progress:
            progress.write(b".")
        if outputs is None:
            return []
        predictions = average(self._heads, [outputs])
        return [
            {"box": box, "score": score, **{task: predictions[task][row].tolist() for task in self._heads}}
            for row, (box, score) in enumerate(zip(boxes.tolist(), scores.tolist(), strict=True))
        ]

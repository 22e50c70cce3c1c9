"""A worker of the leak check: crops of a prepared set -> the features of a network, and perceptual hashes."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Final

import cv2
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from agr_ray.config import PredictConfig
from agr_ray.data.crops import decoded_crops, select_crops, usable_statuses
from agr_ray.models.checkpoint import content_code, read_checkpoint
from agr_ray.models.checkpoint_files import unpacked_checkpoint
from agr_ray.models.checkpoint_network import load_network
from agr_ray.models.network_input import prepare_eval, to_nchw
from agr_ray.models.precision import autocast
from agr_ray.predict.inference import for_inference
from agr_ray.storage import Storage
from agr_ray.vision.perceptual_hash import perceptual_hash

FEATURES: Final = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("features", pa.list_(pa.float32())),
        pa.field("perceptual_hash", pa.uint64()),
    ]
)
_COLUMNS: Final = ("image_id", "content_hash", "split", "status", "crop")


class CropFeatures:
    """Computes features of parts of crop rows, on as many CPUs as its process may use.

    Args:
        storage: of the parts.
        checkpoint: its files, as `portable_checkpoint`.
        side_px: side of the alignment template of the set's crops, pixels.
        split: whose images are read; `all`: of every split.
        codes: `content_code` of the images to read; None: all of the split.
        batch_size: images that go through the network at a time.
        predict_config: its precision.
        device: where the network runs.
    """

    def __init__(
        self,
        storage: Storage,
        checkpoint: dict[str, bytes],
        side_px: int,
        split: str,
        codes: Set[int] | None,
        batch_size: int,
        predict_config: PredictConfig,
        device: str,
    ) -> None:
        with unpacked_checkpoint(checkpoint) as directory:
            loaded = read_checkpoint(directory)
            model = load_network(loaded, device)
        self._precision = predict_config.precision
        self._model = for_inference(model, self._precision)
        self._transform = loaded.transform
        self._device = torch.device(device)
        self._storage = storage
        self._side_px = side_px
        self._split = split
        self._codes = codes
        self._batch_size = batch_size

    def __call__(self, parts: pa.Table) -> Iterator[pa.Table]:
        """Yield rows of `FEATURES` for the chosen crops in the parts, whose URIs are in the column `part`."""
        for uri in parts["part"].to_pylist():
            rows = self._storage.read_table(uri, columns=_COLUMNS)
            rows = select_crops(rows, self._split, usable_statuses(use_fallback=True))
            if self._codes is not None:
                codes = map(content_code, rows["content_hash"].to_pylist())
                rows = rows.filter(pa.array([code in self._codes for code in codes], pa.bool_()))
            for start in range(0, rows.num_rows, self._batch_size):
                batch = rows.slice(start, self._batch_size)
                crops = decoded_crops(batch, self._side_px)
                features = self._features(crops)
                columns = [batch["image_id"], list(features), _hashes(crops)]
                yield pa.table(dict(zip(FEATURES.names, columns, strict=True)), schema=FEATURES)

    @torch.inference_mode()
    def _features(self, crops_u8: NDArray[np.uint8]) -> NDArray[np.float32]:
        images = prepare_eval(to_nchw(crops_u8, self._device), self._transform)
        with autocast(self._device, self._precision):
            features = self._model.features(images)
        return np.asarray(features.float().cpu().numpy(), np.float32)


def feature_arrays(table: pa.Table) -> tuple[list[str], NDArray[np.float32], NDArray[np.uint64]]:
    """Return image ids, features (n, d) and hashes (n,) of rows of `FEATURES`; n is at least 1."""
    lists = table["features"].combine_chunks()
    features = np.asarray(lists.flatten(), np.float32).reshape(table.num_rows, -1)
    return table["image_id"].to_pylist(), features, np.asarray(table["perceptual_hash"], np.uint64)


def _hashes(crops_u8: NDArray[np.uint8]) -> pa.Array:
    """Hash the crops' grey values; crops of the same photograph are cut alike."""
    grey = (cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY) for crop in crops_u8)
    return pa.array([int(perceptual_hash(np.asarray(each, np.uint8))) for each in grey], pa.uint64())

"""Aligned crops -> attributes: run the network in batches, and calibrate its predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Self

import numpy as np
import torch
from numpy.typing import NDArray

from agr_ray.config import PredictConfig
from agr_ray.evaluation.calibration import CalibratedPredictions, Calibration
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.models.checkpoint_network import load_heads, load_network
from agr_ray.models.int8 import Int8Files
from agr_ray.models.int8_network import Int8Net
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.precision import compute_dtype
from agr_ray.models.predictions import Predictions
from agr_ray.models.transform import Transform
from agr_ray.predict.columns import uncalibrated
from agr_ray.predict.forward import predict
from agr_ray.predict.inference import for_inference

BATCH_SIZE: Final = {"cpu": 8, "cuda": 64}  # other devices use the value of cuda
"""Crops that go through the network at a time; smaller batches are padded.

The size is fixed because oneDNN and cuDNN choose kernels by it, and kernels round differently: a face must get the same
prediction whatever other faces are in its batch. On one thread of an AMD EPYC with AVX-512, a ResNet50 processes 11.7
crops/s at 8 and 11.2 at 32."""


def int8_batch_size(image_size: int) -> int:
    """Return the batch size of a network in int8: 4, or 8 or 16 if so many images have no more pixels than 4 of 224 px.

    At 224 px, 4 is as fast as 8, and needs less padding. With smaller images, the work around the network takes more of
    the time, and larger batches reduce it.
    """
    return next((size for size in (16, 8) if size * image_size**2 <= 4 * 224**2), 4)


class AttributePredictor:
    """Predicts and calibrates: the second half of `FaceModel`, used by both evaluation and scoring.

    Args:
        model: in evaluation mode, on the device where it will run; with precision `int8`, only its heads are used.
        transform: the model's.
        config: how outputs become predictions.
        calibration: fitted under `config`; None: predictions are not calibrated.
        int8: the network in int8, for precision `int8`.
    """

    def __init__(
        self,
        model: MultiTaskNet,
        transform: Transform,
        config: PredictConfig,
        calibration: Calibration | None = None,
        int8: Int8Files | None = None,
    ) -> None:
        self.space = model.space
        device = next(model.parameters()).device
        is_int8 = config.precision == "int8"
        self.precision = "int8" if is_int8 else str(compute_dtype(device, config.precision)).removeprefix("torch.")
        """Data type that the network computes in; with `auto` it depends on the device."""
        self._model: MultiTaskNet | Int8Net
        if is_int8:
            assert int8 is not None
            self._model = Int8Net(model, int8)
            self._batch_size = self._model.batch_size
        else:
            self._model = for_inference(model, config.precision)
            self._batch_size = BATCH_SIZE["cpu" if device.type == "cpu" else "cuda"]
        self._transform = transform
        self._config = config
        self._calibration = calibration

    @property
    def is_calibrated(self) -> bool:
        """Return whether predictions are calibrated."""
        return self._calibration is not None

    @classmethod
    def load(
        cls,
        directory: Path,
        config: PredictConfig,
        calibration: Calibration | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load the network of a local checkpoint.

        Raises:
            CheckpointError: as `read_checkpoint` and `load_network`.
        """
        checkpoint = read_checkpoint(directory)
        model = load_heads(checkpoint) if config.precision == "int8" else load_network(checkpoint, device)
        return cls(model, checkpoint.transform, config, calibration, checkpoint.int8)

    def predict(self, crops_u8: NDArray[np.uint8], pose_degrees: NDArray[np.float32] | None = None) -> Predictions:
        """Return uncalibrated predictions.

        Args:
            crops_u8: (n, S, S, 3), RGB; S is the side of the template and its margins; n may be 0.
            pose_degrees: (n, 3) yaw, pitch and roll; NaN: unknown. None: all are. Only `model.head_pose` uses it.
        """
        size, num_crops = self._batch_size, len(crops_u8)
        batches = []
        for start in range(0, max(num_crops, 1), size):
            batch = crops_u8[start : start + size]
            missing = size - len(batch)
            padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
            pose = None if pose_degrees is None else np.pad(pose_degrees[start : start + size], ((0, missing), (0, 0)))
            batches.append(predict(self._model, padded, self._transform, self._config, pose))
        return {task: np.concatenate([each[task] for each in batches])[:num_crops] for task in batches[0]}

    def attributes(
        self, crops_u8: NDArray[np.uint8], pose_degrees: NDArray[np.float32] | None = None
    ) -> CalibratedPredictions:
        """Return predictions, calibrated if there is a calibration. Arguments are those of `predict`."""
        predictions = self.predict(crops_u8, pose_degrees)
        return uncalibrated(predictions) if self._calibration is None else self._calibration.apply(predictions)

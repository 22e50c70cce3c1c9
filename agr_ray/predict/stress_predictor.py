"""A stress worker: corrupted copies of a sample of crops -> rows of predictions, with the predictor of the evaluation.

The work is divided into units: one corruption of one severity, of a few hundred images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from agr_ray.config import PredictConfig
from agr_ray.data.crops import POSE_COLUMNS, decoded_crops, read_pose
from agr_ray.evaluation.robustness import Condition
from agr_ray.models.checkpoint_files import unpacked_checkpoint
from agr_ray.predict.attributes import AttributePredictor
from agr_ray.predict.crop_predictor import prediction_columns
from agr_ray.schema import LANDMARK_NAMES, STRESS_PREDICTIONS
from agr_ray.vision.align import landmarks_in_crop
from agr_ray.vision.corruptions import CORRUPTIONS, SEVERITIES, corrupt, image_rng

UNIT_ROWS: Final = 256
"""Images of a unit: under a second on a GPU, and some seconds on a CPU."""
SAMPLE_COLUMNS: Final = ("image_id", "crop", "landmarks", *POSE_COLUMNS)
"""Columns of crop rows that a stress test needs."""


class Unit(NamedTuple):
    """Some images under one condition."""

    condition: Condition
    first: int
    """Index of its first image in the sample; it has `UNIT_ROWS` or fewer."""


def conditions_of(corruptions: Sequence[str]) -> list[Condition]:
    """Return all severities of the corruptions, in the order of `CORRUPTIONS`; no name: of all."""
    names = [name for name in CORRUPTIONS if name in corruptions or not corruptions]
    return [Condition(name, severity) for name in names for severity in SEVERITIES]


def units_of(conditions: Sequence[Condition], num_rows: int) -> list[Unit]:
    """Return the units of a sample of `num_rows` images, one condition after another."""
    return [Unit(condition, first) for condition in conditions for first in range(0, num_rows, UNIT_ROWS)]


def level_text(condition: Condition) -> str:
    """Return what a condition does, such as `16 px of the face`."""
    corruption = CORRUPTIONS[condition.corruption]
    level = corruption.levels[SEVERITIES.index(condition.severity)]
    if corruption.unit == "quality":
        return f"quality {level:g}"
    return f"{level:+g} stops" if corruption.unit == "stops" else f"{level:g} {corruption.unit}"


def sampled_ids(image_ids: Sequence[str], num_images: int, seed: int) -> list[str]:
    """Return at most `num_images` of the images, chosen at random, sorted.

    The choice does not depend on the order. A smaller sample of the same seed is part of a larger one.
    """
    by_hash = sorted(image_ids, key=lambda image_id: hashlib.sha256(f"{seed}:{image_id}".encode()).digest())
    return sorted(by_hash[:num_images])


class StressPredictor:
    """Predicts units, on as many CPUs as its process may use.

    Args:
        sample: `SAMPLE_COLUMNS` of the images, as `data.crops.read_images`.
        checkpoint: its files, as `portable_checkpoint`.
        side_px: side of the alignment template of the crops, pixels.
        seed: of all random choices of the corruptions.
        predict_config: how outputs become predictions.
        device: where the network runs.
    """

    def __init__(
        self,
        sample: pa.Table,
        checkpoint: dict[str, bytes],
        side_px: int,
        seed: int,
        predict_config: PredictConfig,
        device: str,
    ) -> None:
        with unpacked_checkpoint(checkpoint) as directory:
            self._predictor = AttributePredictor.load(directory, predict_config, device=device)
        self._sample = sample
        self._side_px = side_px
        self._seed = seed

    def predict(self, unit: Unit) -> pa.Table:
        """Return rows of schema.STRESS_PREDICTIONS, in the order of the sample.

        The head pose that some networks use is that of the clean image.
        """
        rows = self._sample.slice(unit.first, UNIT_ROWS)
        name, severity = unit.condition
        image_ids = rows["image_id"].to_pylist()
        crops = decoded_crops(rows, self._side_px)
        for index, (image_id, landmarks) in enumerate(zip(image_ids, crop_landmarks(rows, self._side_px), strict=True)):
            rng = image_rng(self._seed, name, image_id)
            crops[index] = corrupt(crops[index], name, severity, rng, landmarks)
        predictions = self._predictor.predict(crops, read_pose(rows))
        columns = prediction_columns(predictions, rows.num_rows, self._predictor.space)
        return pa.table({"image_id": rows["image_id"], **columns}, schema=STRESS_PREDICTIONS)


def crop_landmarks(rows: pa.Table, side_px: int) -> NDArray[np.float64]:
    """Return the landmarks of crop rows, (n, 5, 2), in pixels of their crops; NaN where no face was found."""
    none = [float("nan")] * (2 * len(LANDMARK_NAMES))
    points = np.array([each or none for each in rows["landmarks"].to_pylist()], np.float64)
    points = points.reshape(-1, len(LANDMARK_NAMES), 2)
    return np.stack([landmarks_in_crop(each, side_px) for each in points]) if len(points) else points

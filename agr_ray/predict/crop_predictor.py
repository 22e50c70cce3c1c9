"""An evaluation worker: crops of a prepared set -> rows of predictions, with the same predictor as scoring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import pyarrow as pa

from agr_ray.config import EvaluateConfig, PredictConfig
from agr_ray.data.crops import decoded_crops, map_races, read_pose, select_crops, usable_statuses
from agr_ray.labels import LabelSpace
from agr_ray.models.checkpoint_files import unpacked_checkpoint
from agr_ray.models.predictions import Predictions
from agr_ray.predict.attributes import AttributePredictor
from agr_ray.predict.columns import attribute_columns, uncalibrated
from agr_ray.schema import PREDICTION_FIELDS, PREDICTIONS
from agr_ray.storage import Storage

_KEPT_COLUMNS: Final = tuple(field.name for field in PREDICTIONS if field not in PREDICTION_FIELDS)


class CropPredictor:
    """Predicts from parts of crop rows, on as many CPUs as its process may use.

    Args:
        storage: of the parts.
        checkpoint: its files, as `portable_checkpoint`.
        side_px: side of the alignment template of the set's crops, pixels.
        config: split, batch size and device.
        predict_config: how outputs become predictions.
        mapping: race of the checkpoint for each race of the set, as `labels.race_mapping`.
    """

    def __init__(
        self,
        storage: Storage,
        checkpoint: dict[str, bytes],
        side_px: int,
        config: EvaluateConfig,
        predict_config: PredictConfig,
        mapping: Mapping[str, str],
    ) -> None:
        with unpacked_checkpoint(checkpoint) as directory:
            device = "cuda" if config.use_gpu else "cpu"
            self._predictor = AttributePredictor.load(directory, predict_config, device=device)
        self._storage = storage
        self._side_px = side_px
        self._config = config
        self._mapping = mapping

    def __call__(self, parts: pa.Table) -> Iterator[pa.Table]:
        """Yield rows of schema.PREDICTIONS for the split's crops in the parts, whose URIs are in the column `part`."""
        for uri in parts["part"].to_pylist():
            rows = self._storage.read_table(uri, columns=[*_KEPT_COLUMNS, "crop"])
            rows = select_crops(rows, self._config.split, usable_statuses(use_fallback=True))
            rows = map_races(rows, self._mapping)
            for start in range(0, rows.num_rows, self._config.batch_size):
                batch = rows.slice(start, self._config.batch_size)
                predictions = self._predictor.predict(decoded_crops(batch, self._side_px), read_pose(batch))
                columns = prediction_columns(predictions, batch.num_rows, self._predictor.space)
                columns["precision"] = pa.array([self._predictor.precision] * batch.num_rows)
                yield pa.table({name: batch[name] for name in _KEPT_COLUMNS} | columns, schema=PREDICTIONS)


def prediction_columns(predictions: Predictions, num_rows: int, space: LabelSpace) -> dict[str, pa.Array]:
    """Return the columns of schema.PREDICTION_FIELDS except `precision`; a task without a head gives nulls."""
    columns = attribute_columns(uncalibrated(predictions), num_rows, space)
    if "age_spread" in predictions:
        columns["age_spread"] = pa.array(predictions["age_spread"], pa.float32(), from_pandas=True)
    return {
        field.name: columns.get(field.name.removesuffix("_pred"), pa.nulls(num_rows, field.type))
        for field in PREDICTION_FIELDS
        if field.name != "precision"
    }

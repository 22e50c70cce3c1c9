"""Read predictions.parquet: rows of schema.PREDICTIONS -> labels, predictions and persons as arrays."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from agr_ray.data.crops import read_labels
from agr_ray.labels import Labels, LabelSpace
from agr_ray.models.predictions import Predictions, class_probs_array
from agr_ray.schema import LABEL_COLUMNS, Status

_COLUMNS: Final = {"age": "age_pred", "gender": "p_male", "race": "race_probs"}
"""Column of each task."""
MEASURED_COLUMNS: Final = ("group_id", *LABEL_COLUMNS, "status", *_COLUMNS.values(), "age_spread")
"""Columns that metrics are computed from."""


class PredictionRows(NamedTuple):
    """n rows of predictions beside the truth."""

    labels: Labels
    predictions: Predictions
    fallback: NDArray[np.bool_]
    """(n,) whether no face was found."""
    persons: NDArray[np.uint32] | None
    """(n,) a number for each `group_id`; None: some rows have none. It is a 32-bit hash, so two persons in four billion
    pairs count as one, which hardly widens an interval."""


def read_predictions(
    table: pa.Table | pa.RecordBatch, tasks: Collection[str], space: LabelSpace
) -> dict[str, NDArray[np.float32]]:
    """Return the predictions of those `tasks` that schema.PREDICTIONS has columns for; a null becomes NaN.

    A column `age_spread` of nulls only means that the age head predicts no distribution.
    """
    predictions = {
        task: class_probs_array(table[name], space.races) if task == "race" else np.asarray(table[name], np.float32)
        for task, name in _COLUMNS.items()
        if task in tasks
    }
    if "age" in tasks and table["age_spread"].null_count < table.num_rows:
        predictions["age_spread"] = np.asarray(table["age_spread"], np.float32)
    return predictions


def read_rows(
    batches: Iterable[pa.RecordBatch],
    num_rows: int,
    tasks: Collection[str],
    space: LabelSpace,
    measured_in: LabelSpace,
) -> PredictionRows:
    """Read rows from batches with `MEASURED_COLUMNS`; about 70 bytes of each row are kept.

    Args:
        batches: of any sizes.
        num_rows: in all batches together.
        tasks: that the network predicts.
        space: of the network: the classes of its predictions.
        measured_in: of the labels.
    """
    columns: dict[str, NDArray[Any]] = {}

    def keep(name: str, values: NDArray[Any]) -> None:
        # Filled in place: hundreds of small arrays to be joined later would leave holes in the heap.
        if name not in columns:
            columns[name] = np.empty((num_rows, *values.shape[1:]), values.dtype)
        columns[name][first : first + len(values)] = values

    first, has_persons = 0, True
    for batch in batches:
        for name, values in read_labels(batch, measured_in).arrays.items():
            keep(name, values)
        for task, values in read_predictions(batch, tasks, space).items():
            keep(f"predicted_{task}", values)
        keep("fallback", np.asarray(pc.equal(batch["status"], str(Status.FALLBACK))))
        has_persons = has_persons and not batch["group_id"].null_count
        if has_persons:
            keep("persons", _hashed(batch["group_id"]))
        first += batch.num_rows
    assert first == num_rows, (first, num_rows)
    return PredictionRows(
        Labels.from_arrays(measured_in, columns),
        {name: columns[f"predicted_{name}"] for name in (*_COLUMNS, "age_spread") if f"predicted_{name}" in columns},
        columns["fallback"],
        columns["persons"] if has_persons else None,
    )


def _hashed(names: pa.Array) -> NDArray[np.uint32]:
    """Return a hash of each name, (n,)."""
    return np.fromiter(map(zlib.crc32, names.cast(pa.binary()).to_pylist()), np.uint32, len(names))

"""Predictions for faces, as arrays and as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Predictions: TypeAlias = Mapping[str, NDArray[np.float32]]
"""Predictions for n faces, by task; tasks without a head are absent.

- `age`: (n,) years, within the range that labels may have.
- `age_spread`: (n,) standard deviation of the predicted distribution over years; absent if the age head predicts no
  distribution.
- `gender`: (n,) probability of "male"; above 0.5, the predicted gender is male.
- `race`: (n, races) probabilities in the order of the label space; each row sums to 1.
"""


def finite_rows(predictions: Predictions) -> NDArray[np.bool_]:
    """Return whether all predictions of each face are finite, (n,); at least one task is predicted."""
    finite = [np.isfinite(values).reshape(len(values), -1).all(axis=1) for values in predictions.values()]
    return np.asarray(np.logical_and.reduce(finite), np.bool_)


def class_probs_column(probs: NDArray[np.float32], names: Sequence[str]) -> pa.MapArray:
    """Return (n, classes) probabilities as a column of schema.CLASS_PROBS, with the classes' names; NaN: null."""
    num_rows, num_classes = probs.shape
    offsets = pa.array(np.arange(num_rows + 1) * num_classes, pa.int32())
    keys = pa.array(list(names) * num_rows, pa.string())
    return pa.MapArray.from_arrays(offsets, keys, pa.array(probs.ravel(), pa.float32(), from_pandas=True))


def class_probs_array(column: pa.ChunkedArray | pa.MapArray, names: Sequence[str]) -> NDArray[np.float32]:
    """Return the (n, classes) probabilities of a column of schema.CLASS_PROBS. A null probability becomes NaN.

    Raises:
        ValueError: its classes are not these, in this order.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return np.concatenate([_probs(chunk, names) for chunk in chunks] or [np.empty((0, len(names)), np.float32)])


def _probs(maps: pa.MapArray, names: Sequence[str]) -> NDArray[np.float32]:
    first, last = (maps.offsets[place].as_py() for place in (0, len(maps)))
    keys, items = maps.keys[first:last], maps.items[first:last]
    expected = pa.array(list(names), pa.string()).take(pa.array(np.tile(np.arange(len(names)), len(maps))))
    if not keys.equals(expected):
        raise ValueError(f"expected probabilities of {', '.join(names)}, found others")
    return np.asarray(items, np.float32).reshape(-1, len(names))

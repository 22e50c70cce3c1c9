"""A fold of a cross-validation: which images train its network, and which test it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from agr_ray.data.near_duplicates import find_crossings
from agr_ray.data.splits import assign_splits, check_no_leak
from agr_ray.schema import MANIFEST, Status

BoolArray = NDArray[np.bool_]


class ProtocolError(ValueError):
    """The set can't be divided by the protocol. The message is one line."""


@dataclass(frozen=True, eq=False)
class Partition:
    """One fold, before validation is drawn from its training images."""

    name: str
    """A folder name, different for each fold."""
    train: BoolArray
    """(n,) of the images."""
    test: BoolArray
    """(n,) of the images; none of them is in `train`."""


def fold_splits(
    images: pa.Table, partition: Partition, val: float, seed: int, *, exclude: bool
) -> tuple[pa.Array, int]:
    """Return the split of each image in a fold, and the number of images that were left out as leaks.

    Validation is a stratified share of the training images, drawn by group. Images that are in neither part of the
    partition have no split.

    Args:
        images: (n,) rows of schema.MANIFEST and schema.FINGERPRINT_FIELDS, all with a group.
        partition: of these rows.
        val: share of the training images.
        seed: of the draw.
        exclude: whether to leave out of training the images that share a person or their bytes with a test image, or
            that are near-duplicates of one. Val then has none of them either.

    Raises:
        SplitLeakError: a person or the bytes of an image are on both sides, and `exclude` is not given; it names both
            images.
    """
    num_before = int(partition.train.sum())
    train = pa.array(partition.train)
    if exclude:
        tested = pc.unique(images["group_id"].filter(pa.array(partition.test)))
        train = pc.and_not(train, pc.is_in(images["group_id"], value_set=tested))
    splits = pc.if_else(pa.array(partition.test), "test", pc.if_else(train, "train", None))
    check_no_leak(images.set_column(images.schema.get_field_index("split"), MANIFEST.field("split"), splits))
    chosen = pc.equal(splits, "train").fill_null(False)
    pool = images.select(MANIFEST.names).filter(chosen)
    pool = pool.set_column(pool.schema.get_field_index("split"), "split", pa.nulls(pool.num_rows, pa.string()))
    status = pa.array([str(Status.OK)] * pool.num_rows, pa.string())
    pool = pool.set_column(pool.schema.get_field_index("status"), MANIFEST.field("status"), status)
    drawn = assign_splits(pool, {"train": 1.0 - val, "val": val}, seed)["split"]
    merged = np.array(splits.to_pylist(), object)
    merged[np.flatnonzero(np.asarray(chosen))] = drawn.to_pylist()
    if exclude:
        columns = {name: images[name] for name in ("key", "perceptual_hash", "thumbnail")}
        crossings = find_crossings(pa.table(columns | {"split": pa.array(merged, pa.string())}))
        merged[np.asarray(pc.is_in(images["key"], value_set=crossings["key"].combine_chunks()))] = None
    num_after = int(np.isin(merged, ["train", "val"]).sum())
    return pa.array(merged, pa.string()), num_before - num_after

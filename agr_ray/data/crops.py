"""Read prepared crops as arrays: choose which rows to read together, select and decode them.

Imports neither torch nor a module that does, because each process of Ray Data that decodes crops imports this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from agr_ray.labels import AGE_MISSING, CLASS_MISSING, Labels, LabelSpace
from agr_ray.schema import CROP_STATUSES, LABEL_COLUMNS, Status
from agr_ray.storage import Storage
from agr_ray.vision.align import DEFAULT_MARGIN, stored_side_px
from agr_ray.vision.decode import decode_crop

POSE_COLUMNS: Final = ("yaw", "pitch", "roll")
TRAINING_COLUMNS: Final = ("image_id", "crop", *LABEL_COLUMNS, *POSE_COLUMNS)


class Slice(NamedTuple):
    """Every `step`-th row of a Parquet part, beginning with row `first`."""

    uri: str
    first: int
    step: int


def deal_parts(listed: Sequence[Sequence[str]]) -> list[list[Slice]]:
    """Group slices of parts such that each group has rows of all sets.

    There are as many groups as the largest set has parts. A part of a smaller set is read several times, for some of
    its rows each time, which costs little compared with decoding.

    Args:
        listed: the URIs of each set's parts, at least one.

    Returns:
        For each group, a slice of each set, in the sets' order.
    """
    groups: list[list[Slice]] = [[] for _ in range(max(map(len, listed)))]
    for uris in listed:
        for uri, sharing in zip(uris, np.array_split(np.arange(len(groups)), len(uris)), strict=True):
            for first, group in enumerate(sharing):
                groups[group].append(Slice(uri, first, len(sharing)))
    return groups


def take_turns(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Return an order of the rows of several concatenated tables that spreads the rows of each table evenly."""
    places = np.concatenate([(np.arange(length) + 0.5) / length for length in lengths])
    return np.argsort(places, kind="stable")


def usable_statuses(*, use_fallback: bool) -> list[str]:
    """Return the statuses of rows with a crop, with or without chips in which no face was found."""
    return [str(status) for status in CROP_STATUSES if use_fallback or status != Status.FALLBACK]


def select_crops(table: pa.Table, split: str, statuses: list[str]) -> pa.Table:
    """Return the rows of a split ("all": of every split) that have a crop."""
    keep = pc.is_in(table["status"], value_set=pa.array(statuses))
    if split != "all":
        keep = pc.and_(keep, pc.equal(table["split"], split))
    return table.filter(keep)


def read_images(storage: Storage, parts: Sequence[str], image_ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """Return the rows of some images, sorted by image_id.

    Args:
        storage: of the parts.
        parts: URIs of tables of schema.CROPS.
        image_ids: distinct; all have a row.
        columns: with image_id among them.
    """
    chosen = pa.array(image_ids, pa.string())
    tables = []
    for uri in parts:  # one at a time, so that only the crops of these images stay in memory
        table = storage.read_table(uri, columns=columns)
        tables.append(table.filter(pc.is_in(table["image_id"], value_set=chosen)))
    rows = pa.concat_tables(tables).sort_by("image_id")
    assert rows.num_rows == len(image_ids), (rows.num_rows, len(image_ids))
    return rows


def decoded_crops(table: pa.Table, side_px: int) -> NDArray[np.uint8]:
    """Return the crops as uint8 (n, S, S, 3), S being the template's side and its margins."""
    side = stored_side_px(side_px, DEFAULT_MARGIN)
    crops = np.empty((table.num_rows, side, side, 3), np.uint8)
    for index, jpeg in enumerate(table["crop"]):
        crops[index] = decode_crop(jpeg.as_buffer())
    return crops


def read_pose(columns: Mapping[str, pa.Array] | pa.Table) -> NDArray[np.float32]:
    """Return yaw, pitch and roll of n faces, (n, 3) float32, degrees; a null becomes NaN."""
    return np.stack([np.asarray(columns[name].cast(pa.float32()), np.float32) for name in POSE_COLUMNS], axis=1)


def read_labels(table: pa.Table, space: LabelSpace) -> Labels:
    """Return the labels of n rows: `LABEL_COLUMNS` as arrays. A race that the space does not have is missing."""

    def codes(column: str, words: Sequence[str]) -> NDArray[np.int64]:
        indices = pc.index_in(table[column], value_set=pa.array(words, pa.string()))
        return np.asarray(pc.fill_null(indices, CLASS_MISSING)).astype(np.int64)

    age, low, high = (
        np.asarray(pc.fill_null(table[column], AGE_MISSING)).astype(np.float32)
        for column in ("age", "age_low", "age_high")
    )
    return Labels(space, age, codes("gender", space.genders), codes("race", space.races), low, high)


def map_races(table: pa.Table, mapping: Mapping[str, str]) -> pa.Table:
    """Return a table with races replaced by `labels.race_mapping`; races that it leaves out become null."""
    words = [mapping.get(race) for race in table["race"].to_pylist()]
    return table.set_column(table.schema.get_field_index("race"), "race", pa.array(words, pa.string()))


def training_arrays(table: pa.Table, side_px: int, space: LabelSpace) -> dict[str, NDArray[Any]]:
    """Return the arrays that a network is trained on.

    image_id: (n,) strings, which name the rows of a failed step; about 100 bytes each, a crop takes tens of thousands.
    crop: `decoded_crops`. pose: `read_pose`. set_index: (n,) int64, the set of each row; 0 if the table has no such
    column. The others are `Labels.arrays`.
    """
    image_ids = np.asarray(table["image_id"].to_pylist(), dtype=object)
    has_index = "set_index" in table.column_names
    set_index = np.asarray(table["set_index"]) if has_index else np.zeros(table.num_rows, np.int64)
    return {
        "image_id": image_ids,
        "crop": decoded_crops(table, side_px),
        "pose": read_pose(table),
        **read_labels(table, space).arrays,
        "set_index": set_index,
    }


def read_slices(
    storage: Storage,
    slices: Sequence[Slice],
    split: str,
    statuses: list[str],
    mappings: Sequence[Mapping[str, str]] = (),
) -> pa.Table:
    """Return the rows of a split that have a crop, from one slice of each set, interleaved; set_index names the set.

    Args:
        storage: where the sets are.
        slices: one of each set.
        split: as in `select_crops`.
        statuses: as in `select_crops`.
        mappings: `map_races`' mapping for each set; empty: races are kept.
    """
    tables = []
    for index, (uri, first, step) in enumerate(slices):
        rows = storage.read_table(uri, columns=[*TRAINING_COLUMNS, "split", "status"])
        rows = select_crops(rows, split, statuses)
        rows = rows.take(np.arange(first, rows.num_rows, step))
        if mappings:
            rows = map_races(rows, mappings[index])
        tables.append(rows.append_column("set_index", pa.array(np.full(rows.num_rows, index, np.int64))))
    return pa.concat_tables(tables).take(take_turns([table.num_rows for table in tables]))

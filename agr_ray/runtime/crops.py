"""Prepared crops as a Ray dataset of arrays: what training and evaluation read.

Imports neither torch nor what needs it, because every process of Ray Data that decodes crops imports this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray
from ray.data import DataIterator, Dataset, TaskPoolStrategy
from ray.train import DataConfig

from agr_ray.data.prepared import PreparedSet
from agr_ray.runtime.cluster import configure_ray_data, worker_count
from agr_ray.schema import AGE_MISSING, CLASS_MISSING, CROP_STATUSES, GENDERS, RACES, Status
from agr_ray.storage import Storage
from agr_ray.storage.retry import Patience
from agr_ray.vision.align import DEFAULT_MARGIN, crop_side_px
from agr_ray.vision.decode import decode_crop

TRAINING_COLUMNS: Final = ("image_id", "crop", "age", "gender", "race")
DECODED_ROWS: Final = 256
"""Rows of a block of decoded crops: some 50 MiB at 224 pixels."""


def part_dataset(storage: Storage, prepared: PreparedSet) -> Dataset:
    """Return one row a Parquet part of the crops: its URI, in the column `part`.

    Whoever maps over it reads the part. One operator that reads and decodes needs a third of the processes of Ray
    Data's Parquet reader followed by a map, and on a small machine starting processes is what takes the time.
    """
    # Here and not in the driver: Ray Train calls this in a process of its own.
    configure_ray_data()
    parts = [{"part": info.uri} for info in storage.list(prepared.crops(storage), (".parquet",))]
    return ray.data.from_items(parts, override_num_blocks=len(parts))


def training_dataset(
    storage: Storage,
    sets: Sequence[PreparedSet],
    split: str,
    *,
    use_fallback: bool,
    outage_s: float = 0.0,
    cpus_per_task: float = 1.0,
) -> Dataset:
    """Return the crops of one split of all sets, decoded as they stream: the columns of `training_arrays`.

    Every stretch of it, and so what each worker gets, has rows of all sets in proportion.

    Args:
        storage: where the sets are.
        sets: whose crops have the same side.
        split: train, val or test; all: every one.
        use_fallback: whether chips in which no face was found are among them.
        outage_s: how long storage that has gone away is waited for.
        cpus_per_task: logical CPUs that Ray reserves for each task that reads; 0 where workers may take all there are.
    """
    configure_ray_data()  # as in part_dataset
    decode = partial(
        _decode_slices,
        storage=storage,
        split=split,
        statuses=usable_statuses(use_fallback=use_fallback),
        side_px=sets[0].crop_side_px,
        patience=Patience(outage_s),
    )
    listed = [[info.uri for info in storage.list(each.crops(storage), (".parquet",))] for each in sets]
    slices = [{"slices": [each._asdict() for each in group]} for group in deal_parts(listed)]
    return ray.data.from_items(slices, override_num_blocks=len(slices)).map_batches(
        decode,
        batch_format="pyarrow",
        batch_size=1,
        compute=TaskPoolStrategy(size=worker_count(None)),
        num_cpus=cpus_per_task,
    )


class Slice(NamedTuple):
    """Every `step`-th row of a Parquet part, beginning with row `first`."""

    uri: str
    first: int
    step: int


def deal_parts(listed: Sequence[Sequence[str]]) -> list[list[Slice]]:
    """Return what is read together: a slice of each set, so that whatever reads one of these has rows of all sets.

    There are as many as the longest list has parts. Of a set with fewer, a part is read several times, for some of its
    rows each time, which costs little beside decoding.

    Args:
        listed: the URIs of each set's parts, one at least.

    Returns:
        For each reading, a slice of each set, in the sets' order.
    """
    groups: list[list[Slice]] = [[] for _ in range(max(map(len, listed)))]
    for uris in listed:
        for uri, sharing in zip(uris, np.array_split(np.arange(len(groups)), len(uris)), strict=True):
            for first, group in enumerate(sharing):
                groups[group].append(Slice(uri, first, len(sharing)))
    return groups


def take_turns(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Return an order of the rows of several tables, one below the other, that spreads each table's evenly."""
    places = np.concatenate([(np.arange(length) + 0.5) / length for length in lengths])
    return np.argsort(places, kind="stable")


class SplitShares(DataConfig):
    """Training in equal shares, which lose a row at most to each worker; validation in shares that lose none."""

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        """Return each worker's iterators by the dataset's name; Ray asks for one dataset at a time."""
        others = {name: dataset for name, dataset in datasets.items() if name != "val"}
        shards = super().configure(others, world_size, *args, **kwargs)
        if "val" in datasets:
            val = datasets["val"].streaming_split(world_size, equal=False)
            for shard, iterator in zip(shards, val, strict=True):
                shard["val"] = iterator
        return shards


def usable_statuses(*, use_fallback: bool) -> list[str]:
    """Return the statuses of rows with a crop, with or without chips in which no face was found."""
    return [str(status) for status in CROP_STATUSES if use_fallback or status != Status.FALLBACK]


def select_crops(table: pa.Table, split: str, statuses: list[str]) -> pa.Table:
    """Return the rows of a split ("all": of every one) that carry a crop."""
    keep = pc.is_in(table["status"], value_set=pa.array(statuses))
    if split != "all":
        keep = pc.and_(keep, pc.equal(table["split"], split))
    return table.filter(keep)


def decoded_crops(table: pa.Table, side_px: int) -> NDArray[np.uint8]:
    """Return the crops as uint8 (n, S, S, 3), S being the template's side and its margins."""
    side = crop_side_px(side_px, DEFAULT_MARGIN)
    crops = np.empty((table.num_rows, side, side, 3), np.uint8)
    for index, jpeg in enumerate(table["crop"]):
        crops[index] = decode_crop(jpeg.as_buffer())
    return crops


def label_arrays(table: pa.Table) -> dict[str, NDArray[Any]]:
    """Return the fields of `learn.metrics.Labels`: (n,) age float32, gender and race int64, missing marked."""

    def codes(column: str, words: tuple[str, ...]) -> NDArray[Any]:
        indices = pc.index_in(table[column], value_set=pa.array(words))
        return np.asarray(pc.fill_null(indices, CLASS_MISSING)).astype(np.int64)

    ages = np.asarray(pc.fill_null(table["age"], AGE_MISSING)).astype(np.float32)
    return {"age": ages, "gender": codes("gender", GENDERS), "race": codes("race", RACES)}


def training_arrays(table: pa.Table, side_px: int) -> dict[str, NDArray[Any]]:
    """Return what a network is trained on: image_id (n,) words, `decoded_crops`, and the fields of `label_arrays`.

    And set_index, (n,) int64: which of several sets a row is from; 0 where the table has no such column.

    Some hundred bytes of image_id beside a crop's tens of thousands: so a row that breaks a run can be named.
    """
    image_ids = np.asarray(table["image_id"].to_pylist(), dtype=object)
    has_index = "set_index" in table.column_names
    set_index = np.asarray(table["set_index"]) if has_index else np.zeros(table.num_rows, np.int64)
    return {
        "image_id": image_ids,
        "crop": decoded_crops(table, side_px),
        **label_arrays(table),
        "set_index": set_index,
    }


def _decode_slices(
    groups: pa.Table, storage: Storage, split: str, statuses: list[str], side_px: int, patience: Patience
) -> Iterator[dict[str, NDArray[Any]]]:
    for slices in groups["slices"].to_pylist():
        read = partial(read_slices, storage, [Slice(**each) for each in slices], split, statuses)
        rows = patience.call(read)
        for start in range(0, rows.num_rows, DECODED_ROWS):
            yield training_arrays(rows.slice(start, DECODED_ROWS), side_px)


def read_slices(storage: Storage, slices: Sequence[Slice], split: str, statuses: list[str]) -> pa.Table:
    """Return the rows of a split, with a crop, of one slice of each set, taking turns; set_index says of which set."""
    tables = []
    for index, (uri, first, step) in enumerate(slices):
        rows = storage.read_table(uri, columns=[*TRAINING_COLUMNS, "split", "status"])
        rows = select_crops(rows, split, statuses)
        rows = rows.take(np.arange(first, rows.num_rows, step))
        tables.append(rows.append_column("set_index", pa.array(np.full(rows.num_rows, index, np.int64))))
    return pa.concat_tables(tables).take(take_turns([table.num_rows for table in tables]))

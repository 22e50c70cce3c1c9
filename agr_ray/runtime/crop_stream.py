"""Prepared crops as Ray datasets, which training and evaluation read.

Imports neither torch nor a module that does, because each process of Ray Data that decodes crops imports this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import DataIterator, Dataset, TaskPoolStrategy
from ray.train import DataConfig

from agr_ray.data.crops import Slice, deal_parts, read_slices, training_arrays, usable_statuses
from agr_ray.data.prepared import PreparedSet
from agr_ray.labels import LabelSpace, race_mapping
from agr_ray.runtime.cluster import configure_ray_data, worker_count
from agr_ray.storage import Storage
from agr_ray.storage.retry import Retry

DECODED_ROWS: Final = 256
"""Rows of a block of decoded crops: about 50 MiB at 224 pixels."""


def part_dataset(storage: Storage, prepared: PreparedSet) -> Dataset:
    """Return one row for each Parquet part of the crops: its URI, in the column `part`.

    A map over this dataset reads the parts. A single operator that reads and decodes needs a third of the processes of
    Ray Data's Parquet reader followed by a map. On a small machine, starting processes takes most of the time.
    """
    # Not in the driver, because Ray Train calls this in another process.
    configure_ray_data()
    parts = [{"part": uri} for uri in prepared.parts(storage)]
    return ray.data.from_items(parts, override_num_blocks=len(parts))


def training_dataset(
    storage: Storage,
    sets: Sequence[PreparedSet],
    split: str,
    space: LabelSpace,
    *,
    use_fallback: bool,
    outage_s: float = 0.0,
    cpus_per_task: float = 1.0,
) -> Dataset:
    """Return the crops of one split of all sets, decoded as they stream: the columns of `training_arrays`.

    Rows of all sets are interleaved in proportion, so each worker's share has rows of all sets.

    Args:
        storage: where the sets are.
        sets: prepared sets whose crops have the same side.
        split: train, val or test; "all" for every split.
        space: onto which the sets' races are mapped.
        use_fallback: whether to include chips in which no face was found.
        outage_s: seconds for which reading is retried while storage is unavailable.
        cpus_per_task: logical CPUs that Ray reserves for each reading task; 0 if workers may take all.
    """
    configure_ray_data()  # as in part_dataset
    decode = partial(
        _decode_slices,
        storage=storage,
        split=split,
        statuses=usable_statuses(use_fallback=use_fallback),
        side_px=sets[0].crop_side_px,
        space=space,
        mappings=[race_mapping(each.label_space, space) for each in sets],
        retry=Retry(outage_s),
    )
    slices = [
        {"slices": [each._asdict() for each in group]} for group in deal_parts([each.parts(storage) for each in sets])
    ]
    return ray.data.from_items(slices, override_num_blocks=len(slices)).map_batches(
        decode,
        batch_format="pyarrow",
        batch_size=1,
        compute=TaskPoolStrategy(size=worker_count(None)),
        num_cpus=cpus_per_task,
    )


class SplitShares(DataConfig):
    """Equal shares of training, which drop at most one row for each worker; shares of validation that drop none."""

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


def _decode_slices(
    groups: pa.Table,
    storage: Storage,
    split: str,
    statuses: list[str],
    side_px: int,
    space: LabelSpace,
    mappings: Sequence[Mapping[str, str]],
    retry: Retry,
) -> Iterator[dict[str, NDArray[Any]]]:
    for slices in groups["slices"].to_pylist():
        read = partial(read_slices, storage, [Slice(**each) for each in slices], split, statuses, mappings)
        rows = retry.call(read)
        for start in range(0, rows.num_rows, DECODED_ROWS):
            yield training_arrays(rows.slice(start, DECODED_ROWS), side_px, space)

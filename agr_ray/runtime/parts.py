"""Folders of Parquet parts, written by many workers, that a killed job leaves whole and its next run adds to.

Each block of input rows becomes one part, whose name is the hash of the rows' ids and which appears whole or not
at all. So nothing is half written, a block that Ray tries twice overwrites itself, and what is done can be read
from the parts alone. Rows that failed (storage kept refusing, say) are tried again by the next run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy
from rich.console import Console

from agr_ray.progress import progress
from agr_ray.runtime.cluster import configure_ray_data
from agr_ray.storage import Storage

MakeRows = Callable[[pa.Table], pa.Table]
"""Input rows -> output rows, one for one; both have `image_id`, the output has `status` too."""


def without(table: pa.Table, ids: pa.Array) -> pa.Table:
    """Return the rows whose `image_id` is not among `ids`."""
    return table.filter(pc.invert(pc.is_in(table["image_id"], value_set=ids)))


def write_parts(
    rows: pa.Table,
    make_worker: Callable[[], MakeRows],
    *,
    storage: Storage,
    folder: str,
    num_workers: int,
    batch_size: int,
    max_rows_per_part: int,
    label: str,
    console: Console,
    check: Callable[[], None],
) -> Counter[str]:
    """Turn rows into parts on the cluster that is connected, showing progress; return the new rows by status.

    `make_worker` is called once in each worker process, and what it returns gets `batch_size` rows at a time.
    `max_rows_per_part` is what a kill may cost each worker; where rows are few, parts are smaller, so that every
    worker gets several. `check` is called after each part and may raise to stop the work.
    """
    configure_ray_data()
    part_rows = max(1, min(max_rows_per_part, -(-rows.num_rows // (4 * num_workers))))
    blocks = [rows.slice(start, part_rows) for start in range(0, rows.num_rows, part_rows)]
    statuses = ray.data.from_arrow(blocks).map_batches(
        _PartWriter,
        fn_constructor_args=(make_worker, storage, folder, batch_size),
        batch_format="pyarrow",
        batch_size=None,
        compute=ActorPoolStrategy(size=num_workers),
        num_cpus=1,
    )
    counts: Counter[str] = Counter()
    with progress(console, label, rows.num_rows) as update:
        for batch in statuses.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(batch, pa.Table)
            check()
            counts.update(batch["status"].to_pylist())
            update(counts.total(), ", ".join(f"{status} {count:,}" for status, count in sorted(counts.items())))
    return counts


class _PartWriter:
    """Makes the rows of one block and writes them; passes on their statuses only."""

    def __init__(self, make_worker: Callable[[], MakeRows], storage: Storage, folder: str, batch_size: int) -> None:
        self._make_rows = make_worker()
        self._storage = storage
        self._folder = folder
        self._batch_size = batch_size

    def __call__(self, block: pa.Table) -> pa.Table:
        starts = range(0, block.num_rows, self._batch_size)
        made = pa.concat_tables([self._make_rows(block.slice(start, self._batch_size)) for start in starts])
        name = hashlib.sha256("\n".join(made["image_id"].to_pylist()).encode()).hexdigest()[:16]
        self._storage.write_table(made, self._storage.join(self._folder, f"part-{name}.parquet"))
        return made.select(["status"])

"""Work divided into numbered parts, so that prepare and scoring can resume after a kill at any time.

    WORK/manifest/parts-000000.parquet ...   input rows, PARTS_PER_FILE row groups a file: row group N is part N
    WORK/manifest/plan.json                  the plan's record; written last
    WORK/parts/part-00000000.parquet ...     output rows of each part, complete or absent
    WORK/attempts/part-00000000.json ...     notes on parts in progress

The manifest never changes, so the names in parts/ show which parts are finished, without reading any rows. A part that
is written twice replaces itself.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from agr_ray.storage import MissingObject, Storage, StorageUnavailable
from agr_ray.storage.retry import Retry
from agr_ray.storage.scratch import scratch_folder

PLAN: Final = "plan.json"
PARTS_PER_FILE: Final = 256
"""A reader of one part reads the footer of its file, which grows with the number of row groups."""
MAX_DEATHS: Final = 3
"""Number of times an image may kill its worker before its row gets the status `failed`."""
KILLED_ITS_WORKER: Final = f"killed its worker {MAX_DEATHS} times"
"""Error message of such an image."""


@dataclass(frozen=True)
class Parts:
    """The numbered parts of one plan, in any process. Each call is retried while storage is unavailable."""

    storage: Storage
    work: str
    """Folder of the plan, its parts and its notes."""
    outage_s: float = 0.0
    """Seconds for which a call is retried; 0: never."""

    @property
    def manifest(self) -> str:
        """Return the folder of the manifest."""
        return self.storage.join(self.work, "manifest")

    def uri(self, number: int) -> str:
        """Return the URI of a part's output rows."""
        return self.storage.join(self.work, "parts", f"part-{number:08d}.parquet")

    def finished(self) -> list[int]:
        """Return the numbers of the finished parts, in order."""
        folder = self.storage.join(self.work, "parts")
        if not self.storage.exists(folder):
            return []
        return sorted(
            int(Path(info.key).stem.removeprefix("part-")) for info in self.storage.list(folder, (".parquet",))
        )

    def rows(self, number: int) -> pa.Table:
        """Read a part's input rows."""
        return Retry(self.outage_s).call(lambda: read_rows(self.storage, self.manifest, number))

    def begin(self, number: int) -> Attempts:
        """Note that work on a part begins, and return the notes on it."""
        return Attempts(self.storage, self._attempts_uri(number), self.outage_s)

    def write(self, number: int, table: pa.Table) -> None:
        """Write a part's output rows, and delete its notes."""
        retry = Retry(self.outage_s)
        retry.call(lambda: self.storage.write_table(table, self.uri(number)))
        retry.call(lambda: self.storage.delete(self._attempts_uri(number)))

    def _attempts_uri(self, number: int) -> str:
        return self.storage.join(self.work, "attempts", f"part-{number:08d}.json")


class Attempts:
    """Notes on the image in progress of a part, kept in storage because a killed worker loses its memory.

    After a worker has died on the part, its images must be processed one at a time, and each must be noted while it is
    processed. It must not be noted while its worker waits for storage, because a job that ends in an outage must not
    count as a death. An image that has killed its worker `MAX_DEATHS` times gets the status `failed`.
    """

    def __init__(self, storage: Storage, uri: str, outage_s: float = 0.0) -> None:
        self._storage = storage
        self._uri = uri
        self._retry = Retry(outage_s)
        record = self._retry.call(self._read)
        self.has_died = record is not None
        """Whether an earlier attempt at the part died."""
        self.deaths: Counter[str] = Counter(record["deaths"] if record else {})
        """Number of times each image has killed its worker, by image_id."""
        if record and record["suspect"]:
            self.deaths[record["suspect"]] += 1
        self.suspect("")

    def is_given_up(self, image_id: str) -> bool:
        """Return whether the image has killed its worker too often."""
        return self.deaths[image_id] >= MAX_DEATHS

    def suspect(self, image_id: str) -> None:
        """Note the image that is processed next; empty: a death would not be due to a single image."""
        record = {"suspect": image_id, "deaths": self.deaths}
        self._retry.call(lambda: self._storage.write(self._uri, json.dumps(record).encode()))

    def _read(self) -> Any:
        try:
            return json.loads(self._storage.read(self._uri))
        except MissingObject:
            return None


def write_manifest(
    storage: Storage,
    folder: str,
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    rows_per_part: int,
    record: Mapping[str, Any],
) -> None:
    """Write input rows as parts of exactly `rows_per_part` rows, except the last; all of them or none.

    Args:
        storage: storage of `folder`.
        folder: new folder or prefix of the manifest.
        batches: rows of `schema`, streamed through a temporary folder.
        schema: schema of the rows.
        rows_per_part: number of rows in each part.
        record: what `read_plan` will return.

    Raises:
        FileExistsError: `folder` holds a whole manifest.
        StorageUnavailable: it can't be written.
    """
    with scratch_folder() as local:
        parts = enumerate(_cut(batches, schema, rows_per_part))
        for number, group in groupby(parts, key=lambda numbered: numbered[0] // PARTS_PER_FILE):
            path = os.path.join(local, _file_name(number))
            with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=False) as writer:
                for _, part in group:
                    writer.write_table(part, row_group_size=rows_per_part)
        Path(local, PLAN).write_text(json.dumps(record, indent=2), encoding="utf-8")
        storage.upload_tree(local, folder, marker=PLAN)


def read_plan(storage: Storage, folder: str) -> dict[str, Any] | None:
    """Return the record of the manifest at `folder`, or None if there is no complete one."""
    try:
        record: dict[str, Any] = json.loads(storage.read(storage.join(folder, PLAN)))
        return record
    except MissingObject:
        return None


def read_rows(storage: Storage, folder: str, number: int) -> pa.Table:
    """Return the rows of one part, from 0, of the manifest at `folder`.

    Raises:
        MissingObject: there is no such manifest.
        StorageUnavailable: it can't be read.
    """
    uri = storage.join(folder, _file_name(number // PARTS_PER_FILE))
    fs, path = storage.arrow_filesystem(uri)
    try:
        with pq.ParquetFile(path, filesystem=fs) as file:
            return file.read_row_group(number % PARTS_PER_FILE)
    except FileNotFoundError:
        raise MissingObject(f"{uri} does not exist") from None
    except OSError as error:
        raise StorageUnavailable(f"{uri} can't be read: {' '.join(str(error).split())}") from error


def _cut(batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows_per_part: int) -> Iterator[pa.Table]:
    rest = schema.empty_table()
    for batch in batches:
        rest = pa.concat_tables([rest, pa.Table.from_arrays(batch.columns, schema=schema)])
        num_whole = rest.num_rows // rows_per_part
        for number in range(num_whole):
            yield rest.slice(number * rows_per_part, rows_per_part)
        rest = rest.slice(num_whole * rows_per_part)
    if rest.num_rows:
        yield rest


def _file_name(number: int) -> str:
    return f"parts-{number:06d}.parquet"

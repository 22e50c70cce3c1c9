"""The parts of a finished scoring run -> what readers see: images/, faces/, rejects/ and demographics/.

Each file of the run's manifest becomes one file in each of the first three, under a name that only depends on its
number: publishing that was killed can be done again. Nothing is published before `_SUCCESS/run=ID.json`, which is
written last; `views.sql` reads the published runs only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import pyarrow as pa

from agr_ray.learn.calibration import Calibration
from agr_ray.runtime.patience import Patience
from agr_ray.runtime.scoring.planning import PARTS_PER_FILE, read_part
from agr_ray.runtime.scoring.scorer import manifest_folder, part_file
from agr_ray.schema import IMAGES, REJECTS
from agr_ray.storage import Storage
from agr_ray.tables.demographics import demographics
from agr_ray.tables.faces import count_faces, count_images, explode_faces, select_rejects, sum_counts
from agr_ray.tables.suppression import suppress

SUCCESS: Final = "_SUCCESS"
CELL_COLUMNS: Final = ("age_group", "gender", "race")
LEDGER_COLUMNS: Final = ("image_id", "status")
_NUM_READS: Final = 8


class Counts(NamedTuple):
    """Of one file, or added up."""

    cells: pa.Table
    """`tables.faces.count_faces` by the grouping columns."""
    groups: pa.Table
    """`tables.faces.count_images` by the grouping columns."""
    statuses: Counter[str]
    """Images by status."""


@dataclass(frozen=True)
class Publication:
    """What turning parts into published files needs to know."""

    storage: Storage
    work: str
    out: str
    run_id: str
    num_parts: int
    attributes: tuple[str, ...]
    group_by: tuple[str, ...]
    aggregate_only: bool
    ledger: str
    key: bytes
    """Of the HMACs that stand in for URIs; empty: URIs stay."""
    outage_s: float

    @property
    def num_files(self) -> int:
        """Return how many files there will be: one at least, so that readers of an empty run find its columns."""
        return max(1, -(-self.num_parts // PARTS_PER_FILE))

    def publish_file(self, file: int) -> Counts:
        """Write one file of each table, and count what is in it."""
        return Patience(self.outage_s).call(lambda: self._publish_file(file))

    def _publish_file(self, file: int) -> Counts:
        images = self._image_rows(file)
        faces = explode_faces(images, self.group_by)
        counts = Counts(
            count_faces(faces, self.group_by),
            count_images(images, faces, self.group_by),
            Counter(images["status"].to_pylist()),
        )
        kept = images.select(IMAGES.names)
        if self.key:
            kept = pseudonymised(kept, self.key)
        if self.aggregate_only:
            folder = self.storage.join(self.ledger, f"run={self.run_id}")
            self._write(kept.select(LEDGER_COLUMNS), folder, "ledger", file)
        else:
            kept = kept.sort_by("uri")
            for name, table in (
                ("images", kept),
                ("faces", explode_faces(kept)),
                ("rejects", select_rejects(kept)),
            ):
                self._write(table, self.folder(name), name, file)
        return counts

    def folder(self, table: str) -> str:
        """Return the run's folder of a table."""
        return self.storage.join(self.out, table, f"run={self.run_id}")

    def _write(self, table: pa.Table, folder: str, name: str, file: int) -> None:
        self.storage.write_table(table, self.storage.join(folder, f"{name}-{file:05d}.parquet"))

    def _image_rows(self, file: int) -> pa.Table:
        """Return the image rows of a file's parts, with the grouping columns of the manifest."""
        first = file * PARTS_PER_FILE
        parts = range(first, min(first + PARTS_PER_FILE, self.num_parts))
        if not parts:
            grouping = [pa.field(name, pa.string()) for name in self.group_by]
            return pa.schema([*IMAGES, *grouping]).empty_table()
        with ThreadPoolExecutor(_NUM_READS) as pool:
            uris = [part_file(self.storage, self.work, part) for part in parts]
            images = pa.concat_tables(pool.map(self.storage.read_table, uris))
            folder = manifest_folder(self.storage, self.work)
            manifest = pa.concat_tables(pool.map(lambda part: read_part(self.storage, folder, part), parts))
        # A part has the rows of its row group, in their order.
        if images["image_id"].combine_chunks() != manifest["image_id"].combine_chunks():
            raise RuntimeError(f"{self.work}: the parts of manifest file {file} do not hold its rows")
        for name in self.group_by:
            images = images.append_column(name, manifest[name])
        return images


def pseudonymised(images: pa.Table, key: bytes) -> pa.Table:
    """Replace all that names or identifies an image: URI and id by HMACs, etag and size by null.

    Errors, which quote them, are null too: why an image was rejected is left to its status.
    """
    aliases = [pseudonym(uri, key) for uri in images["uri"].to_pylist()]
    columns = {
        "image_id": pa.array([pseudonym(image, key) for image in images["image_id"].to_pylist()], pa.string()),
        "uri": pa.array(aliases, pa.string()),
        "etag": pa.nulls(images.num_rows, pa.string()),
        "size_bytes": pa.nulls(images.num_rows, pa.int64()),
        "error": pa.nulls(images.num_rows, pa.string()),
    }
    return pa.table({name: columns.get(name, images[name]) for name in images.column_names}, schema=images.schema)


def pseudonym(text: str, key: bytes) -> str:
    """Return 32 hex digits of the HMAC-SHA256 of a text."""
    return hmac.digest(key, text.encode(), hashlib.sha256).hex()[:32]


def add_counts(counts: Sequence[Counts], group_by: Sequence[str]) -> Counts:
    """Add up the counts of all files."""
    return Counts(
        sum_counts([each.cells for each in counts], [*group_by, *CELL_COLUMNS]),
        sum_counts([each.groups for each in counts], group_by),
        sum((each.statuses for each in counts), Counter()),
    )


def publish_demographics(
    publication: Publication, counts: Counts, calibration: Calibration | None, min_cell: int
) -> None:
    """Write the run's demographic tables."""
    table = demographics(
        counts.cells,
        counts.groups,
        None if calibration is None else calibration.rows,
        ["age_group" if name == "age" else name for name in publication.attributes],
    )
    if min_cell:
        table = suppress(table, min_cell)
    uri = publication.storage.join(publication.folder("demographics"), "demographics.parquet")
    publication.storage.write_table(table, uri)


def published_runs(storage: Storage, out: str) -> Iterator[dict[str, Any]]:
    """Yield the records of all published runs, oldest first."""
    folder = storage.join(out, SUCCESS)
    if storage.exists(folder):
        for info in storage.list(folder, (".json",)):
            yield json.loads(storage.read(info.uri))


def finish(storage: Storage, out: str, record: dict[str, Any]) -> None:
    """Declare a run published: the last step."""
    has_images = storage.exists(storage.join(out, "images"))
    storage.write(storage.join(out, "views.sql"), views_sql(out, has_images=has_images).encode())
    body = json.dumps(record, indent=2) + "\n"
    storage.write(_success_uri(storage, out, record["run_id"]), body.encode())


def is_published(storage: Storage, out: str, run_id: str) -> bool:
    """Return whether the run is published."""
    return storage.exists(_success_uri(storage, out, run_id))


def _success_uri(storage: Storage, out: str, run_id: str) -> str:
    return storage.join(out, SUCCESS, f"run={run_id}.json")


def views_sql(out: str, *, has_images: bool) -> str:
    """Return DuckDB's views over all published runs; without `has_images`, all of them were aggregate_only."""
    quoted = out.replace("'", "''")
    sql = f"""-- Views over the published runs, for DuckDB: duckdb -init views.sql
CREATE OR REPLACE VIEW runs AS
    SELECT * FROM read_json('{quoted}/{SUCCESS}/run=*.json', union_by_name = true);
CREATE OR REPLACE VIEW demographics AS
    SELECT * FROM read_parquet('{quoted}/demographics/run=*/*.parquet', union_by_name = true, hive_partitioning = true)
    WHERE run IN (SELECT run_id FROM runs);
"""
    if not has_images:
        return sql
    return f"""{sql}
-- Each image counts as it was last scored; that a listing was older than the image (changed) says nothing of it.
-- One that was deleted from its bucket stays until a run has met it as missing: scoring does not look for keys that
-- are gone.
CREATE OR REPLACE VIEW images AS
    SELECT i.* FROM read_parquet('{quoted}/images/run=*/*.parquet', union_by_name = true) AS i
    SEMI JOIN runs USING (run_id)
    QUALIFY row_number() OVER (PARTITION BY i.uri ORDER BY i.status = 'changed', i.scored_at DESC, i.run_id DESC) = 1;
CREATE OR REPLACE VIEW faces AS
    SELECT f.* FROM read_parquet('{quoted}/faces/run=*/*.parquet', union_by_name = true) AS f
    SEMI JOIN images USING (image_id, run_id);
CREATE OR REPLACE VIEW rejects AS
    SELECT {", ".join(REJECTS.names)} FROM images WHERE status NOT IN ('ok', 'no_face');
"""

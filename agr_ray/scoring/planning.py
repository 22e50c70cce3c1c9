"""Plan a scoring run: write the manifest of `storage.parts` once, with the photographs that are new.

The input and the ids of scored photographs are streamed to Parquet files in a temporary folder. DuckDB joins these
within a memory limit, so neither is ever in memory as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from agr_ray.config import ScoreConfig
from agr_ray.data.manifest import image_id
from agr_ray.errors import ConfigError
from agr_ray.schema import IMAGES, RETRIED_STATUSES, SCORE_MANIFEST, Status
from agr_ray.scoring.grouping import Grouping, make_grouping
from agr_ray.scoring.listing import MAX_ENDINGS, Listing, one_line
from agr_ray.storage import Storage, StorageUnavailable
from agr_ray.storage.parts import read_plan, write_manifest
from agr_ray.storage.scratch import scratch_folder

MAX_GROUPS: Final = 10_000
"""Maximum groups of score.group_by: each has over a hundred rows of demographics, which are computed together."""

MEMORY_LIMIT: Final = "1GB"
"""Memory limit of DuckDB, which then spills to the temporary folder."""
NUM_THREADS: Final = 4
"""Maximum threads of DuckDB, because each takes a share of the memory."""

_BATCH_ROWS = 65_536
_FILES_AHEAD = 16
SCORED: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("is_archived", pa.bool_(), nullable=False),
        pa.field("storage_class", pa.string()),
    ]
)
"""Schema of already scored photographs, one row each."""
_STATUSES = pa.schema([IMAGES.field(name) for name in ("image_id", "status", "storage_class")])
_SPOOLED = pa.schema([*SCORE_MANIFEST, pa.field("scored_id", pa.string())])


@dataclass(frozen=True, slots=True)
class Plan:
    """Counts of a planned run: listed = excluded + scored + duplicates + to do."""

    num_listed: int
    """Listed objects: the whole input, or as many as were needed to reach `limit`."""
    num_excluded: int
    """Left out by patterns and min_bytes."""
    num_scored: int
    """Skipped because an earlier run scored them."""
    num_duplicates: int
    """Repeated rows with the same URI and etag."""
    num_to_do: int
    """Rows of the manifest."""
    num_parts: int
    rows_per_part: int
    endings_left_out: dict[str, int]
    """Number of left-out keys by lower-case ending, most frequent first; the empty ending stands for none."""
    num_grouped: dict[str, int]
    """Rows of the manifest with a value, by column of score.group_by."""

    def rows_of(self, part: int) -> int:
        """Return the number of rows of a part."""
        return min(self.rows_per_part, self.num_to_do - part * self.rows_per_part)


def plan(
    storage: Storage,
    config: ScoreConfig,
    out: str,
    scored: Iterable[pa.RecordBatch] = (),
    *,
    scored_as: Callable[[str], str] | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Plan:
    """Write the manifest of a run to the new folder or prefix `out`, whole or not at all, and return its counts.

    The rows are the filtered input, each URI and etag once, without those in `scored`. They are in input order or,
    with `scored_as`, sorted by the mapped ids, which reveals nothing about the keys. The same input always gives the
    same manifest. A manifest without rows has no parts.

    Args:
        storage: of the input and of `out`.
        config: names the input, the filters, the limit and the rows of a part (rows_per_file).
        out: must not hold a whole manifest (`read_counts` returns None).
        scored: photographs to skip, with schema `SCORED` (`scored_ids`).
        scored_as: maps an image_id to its id in `scored` if they differ (an HMAC); None: they are the same.
        progress: called with the number of listed objects and a remark, every few thousand rows and before the
            manifest is written; it may raise an error to stop the planning.

    Raises:
        ConfigError: the input does not match its kind (score.input_kind), a pattern is invalid, or the grouping is.
        FileExistsError: `out` holds a whole manifest.
        StorageUnavailable: input or output can't be reached.
    """
    listing = Listing(storage, config)
    report = progress or (lambda _done, _remark: None)
    with scratch_folder() as folder:
        grouping = make_grouping(storage, config, folder)  # first, because listing can take hours
        listed = _spool(
            (_with_ids(batch, scored_as) for batch in listing.kept()),
            f"{folder}/listed.parquet",
            _SPOOLED,
            lambda _: report(listing.num_listed, "listing"),
        )
        known = _spool(
            scored,
            f"{folder}/scored.parquet",
            SCORED,
            lambda num_rows: report(listing.num_listed, f"{num_rows:,} already scored"),
        )
        with _open_database(folder) as database:
            num_fresh, num_to_do = _select(database, listed, known)
            report(listing.num_listed, f"{num_to_do:,} to do")
            num_grouped = _check_groups(database, listed, grouping)
            made = Plan(
                num_listed=listing.num_listed,
                num_excluded=listing.num_listed - listing.num_kept,
                num_scored=listing.num_kept - num_fresh,
                num_duplicates=num_fresh - num_to_do,
                num_to_do=num_to_do,
                num_parts=-(-num_to_do // config.rows_per_file),
                rows_per_part=config.rows_per_file,
                endings_left_out=dict(listing.endings.most_common(MAX_ENDINGS)),
                num_grouped=num_grouped,
            )
            schema = pa.schema([*SCORE_MANIFEST, *grouping.fields])
            rows = _rows_to_do(database, listed, grouping)
            write_manifest(storage, out, rows, schema, config.rows_per_file, asdict(made))
    report(listing.num_listed, f"{num_to_do:,} to do")
    return made


def read_counts(storage: Storage, out: str) -> Plan | None:
    """Return the counts of the manifest at `out`, or None if there is no whole one."""
    record = read_plan(storage, out)
    return None if record is None else Plan(**record)


def photograph_id(uri: str, etag: str | None) -> str:
    """Return the image_id of a photograph to score, which depends on its etag: a replaced file is a new photograph."""
    return image_id(f"{uri}\n{etag or ''}")


def scored_ids(storage: Storage, folders: Iterable[str]) -> Iterator[pa.RecordBatch]:
    """Yield the photographs to skip, with schema `SCORED`: rows whose status is not in `RETRIED_STATUSES`.

    An archived photograph is skipped only as long as its storage class stays the same. Several files are read at a
    time, because there are many small ones. A folder that does not exist holds none.

    Args:
        storage: storage of the folders.
        folders: folders of Parquet files with the columns image_id, status and storage_class.

    Raises:
        StorageUnavailable: a file can't be read.
    """
    is_archived = pc.field("status") == str(Status.ARCHIVED)
    columns = {
        "image_id": pc.field("image_id"),
        "is_archived": is_archived,
        "storage_class": pc.field("storage_class"),
    }
    for folder in folders:
        if storage.exists(folder):
            fs, _ = storage.arrow_filesystem(folder)
            paths = [storage.arrow_filesystem(info.uri)[1] for info in storage.list(folder, (".parquet",))]
            rows = pyarrow.dataset.dataset(paths, schema=_STATUSES, filesystem=fs, format="parquet")
            try:
                yield from rows.to_batches(
                    columns=columns,
                    filter=~pc.field("status").isin([*RETRIED_STATUSES]),
                    batch_readahead=_FILES_AHEAD,
                    fragment_readahead=_FILES_AHEAD,
                )
            except (OSError, pa.ArrowInvalid) as error:
                raise StorageUnavailable(f"{folder} can't be read: {one_line(error)}") from error


# Through the temporary folder


def _with_ids(batch: pa.RecordBatch, scored_as: Callable[[str], str] | None) -> pa.RecordBatch:
    """Return rows of `LISTED` as `_SPOOLED`; scored_id is null where it is the image_id."""
    uris, etags = batch.column("uri"), batch.column("etag")
    ids = [photograph_id(uri, etag) for uri, etag in zip(uris.to_pylist(), etags.to_pylist(), strict=True)]
    scored = pa.nulls(len(ids)) if scored_as is None else pa.array([scored_as(each) for each in ids])
    columns = [pa.array(ids), uris, etags, batch.column("size_bytes"), batch.column("storage_class"), scored]
    return pa.record_batch([column.cast(field.type) for column, field in zip(columns, _SPOOLED, strict=True)], _SPOOLED)


def _spool(
    batches: Iterable[pa.RecordBatch], path: str, schema: pa.Schema, report: Callable[[int], None] | None = None
) -> str:
    """Write the batches to a Parquet file and return its path; call `report` with the number of rows so far."""
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=False) as writer:
        num_rows = 0
        for batch in batches:
            if batch.num_rows:
                writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
            num_rows += batch.num_rows
            if report is not None:
                report(num_rows)
    return path


def _open_database(folder: str) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(
        ":memory:",
        config={
            "memory_limit": MEMORY_LIMIT,
            "threads": min(NUM_THREADS, os.cpu_count() or 1),
            "temp_directory": f"{folder}/spill",
        },
    )


def _select(database: duckdb.DuckDBPyConnection, listed: str, scored: str) -> tuple[int, int]:
    """Create the table `to_do`: the position in `listed` of each photograph to score.

    Returns:
        Number of rows that are not in `scored`, and number of photographs to score (rows without duplicates).
    """
    database.execute(
        """
        CREATE TEMP TABLE to_do AS
        SELECT min(file_row_number) AS position, count(*) AS num_rows
        FROM read_parquet(?, file_row_number = true) AS listed
        ANTI JOIN read_parquet(?) AS scored ON coalesce(listed.scored_id, listed.image_id) = scored.image_id
            AND (NOT scored.is_archived OR listed.storage_class IS NOT DISTINCT FROM scored.storage_class)
        GROUP BY listed.image_id
        """,
        [listed, scored],
    )
    ((num_rows, num_to_do),) = database.execute("SELECT coalesce(sum(num_rows), 0), count(*) FROM to_do").fetchall()
    return int(num_rows), int(num_to_do)


_TO_DO: Final = """
    SELECT image_id, uri, etag, size_bytes, storage_class{grouping.select}
    FROM (
        SELECT *, coalesce(scored_id, format('{{:020d}}', file_row_number)) AS listed_order
        FROM read_parquet(?, file_row_number = true)
        SEMI JOIN (SELECT position AS file_row_number FROM to_do) USING (file_row_number)
    ) AS listed
    {grouping.join}
"""


def _check_groups(database: duckdb.DuckDBPyConnection, listed: str, grouping: Grouping) -> dict[str, int]:
    """Reject a grouping with too many groups before anything is scored.

    Returns:
        Number of photographs to score that have a value, for each grouping column.

    Raises:
        ConfigError: there are more than `MAX_GROUPS`.
    """
    if not grouping.names:
        return {}
    names = [f'"{name}"' for name in grouping.names]
    counted = ", ".join(f"count({name})" for name in names)
    sql = f"SELECT count(DISTINCT row({', '.join(names)})), {counted} FROM ({_TO_DO.format(grouping=grouping)})"
    ((num_groups, *num_known),) = database.execute(sql, [listed]).fetchall()
    if num_groups > MAX_GROUPS:
        raise ConfigError(
            f"score.group_by {', '.join(grouping.names)}: makes {num_groups:,} groups of these photographs; at most "
            f"{MAX_GROUPS:,} are allowed"
        )
    return dict(zip(grouping.names, num_known, strict=True))


def _rows_to_do(database: duckdb.DuckDBPyConnection, listed: str, grouping: Grouping) -> Iterator[pa.RecordBatch]:
    """Yield the rows of `to_do` as schema.SCORE_MANIFEST with the grouping columns, in their order."""
    rows = database.sql(f"{_TO_DO.format(grouping=grouping)} ORDER BY listed.listed_order", params=[listed])
    yield from rows.to_arrow_reader(_BATCH_ROWS)

"""Columns by which demographic tables are grouped: captured from URIs, or joined from a table about the images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from agr_ray.config import ScoreConfig
from agr_ray.data.inventory import LISTED
from agr_ray.errors import ConfigError
from agr_ray.schema import DEMOGRAPHICS, FACES, IMAGES, REJECTS
from agr_ray.storage import BadUri, Storage, StorageUnavailable

RESERVED: Final = frozenset(
    {
        "run",
        "file_row_number",
        "listed_order",
        *(name for schema in (DEMOGRAPHICS, IMAGES, FACES, REJECTS, LISTED) for name in schema.names),
    }
)
"""Names that a grouping column must not have, in any case: columns of the tables that grouping columns pass through,
columns of the SQL that plans a run, and `run`, which readers derive from run=ID/."""

_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class Grouping:
    """SQL that adds grouping columns to rows with a `uri`. All are strings; null: unknown."""

    names: tuple[str, ...]
    select: str
    """Expressions to append to a SELECT list; begins with a comma unless empty."""
    join: str
    """Join to append to the FROM clause."""

    @property
    def fields(self) -> list[pa.Field]:
        """Return the columns."""
        return [pa.field(name, pa.string()) for name in self.names]


def check_grouping(config: ScoreConfig) -> dict[str, int]:
    """Return the number of each named group of score.key_pattern.

    Raises:
        ConfigError: the pattern is invalid, or a grouping column has no source or a reserved name.
    """
    try:
        # DuckDB's engine is RE2, which supports less than Python's; only Python's reports the groups' numbers.
        with duckdb.connect() as database:
            database.execute("SELECT regexp_extract('', ?)", [config.key_pattern]).fetchall()
        captured = dict(re.compile(config.key_pattern).groupindex)
    except (re.error, duckdb.Error) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"score.key_pattern {config.key_pattern!r}: not a valid RE2 expression: {reason}") from None
    for name in config.group_by:
        if name.lower() in RESERVED:
            raise ConfigError(f"score.group_by {name}: the tables have a column of that name; choose another")
        if [other.lower() for other in config.group_by].count(name.lower()) > 1:
            raise ConfigError(f"score.group_by {name}: is named twice (case does not count)")
        if not re.fullmatch(r"\w+", name):
            raise ConfigError(f"score.group_by {name!r}: a name may only contain letters, digits and _")
        if name not in captured and not config.metadata:
            has = ", ".join(captured) or "none"
            raise ConfigError(
                f"score.group_by {name}: score.key_pattern captures no such group (it has {has}), and there is no "
                "score.metadata with such a column"
            )
    return captured


def make_grouping(storage: Storage, config: ScoreConfig, folder: str) -> Grouping:
    """Prepare the grouping; the needed columns of score.metadata are copied into the local `folder`.

    Raises:
        ConfigError: as `check_grouping`, or the metadata lack a column or have several rows for one URI.
        StorageUnavailable: the metadata can't be read.
    """
    captured = check_grouping(config)
    joined = [name for name in config.group_by if name not in captured]
    pattern = config.key_pattern.replace("'", "''")
    columns = {name: f"nullif(regexp_extract(uri, '{pattern}', {number}), '')" for name, number in captured.items()} | {
        name: f'metadata."{name}"' for name in joined
    }
    join = ""
    if joined:
        path = f"{folder}/metadata.parquet"
        _copy_metadata(storage, config.metadata, joined, path)
        _check_unique(config.metadata, path)
        join = f"LEFT JOIN read_parquet('{path}') AS metadata USING (uri)"
    select = "".join(f', {columns[name]} AS "{name}"' for name in config.group_by)
    return Grouping(config.group_by, select, join)


def _copy_metadata(storage: Storage, uri: str, names: list[str], path: str) -> None:
    """Write a local copy of a Parquet file or folder with the columns uri (canonical) and `names`, as strings.

    Rows whose uri is null or malformed are dropped, because they match no photograph.
    """
    if not storage.exists(uri):
        raise ConfigError(f"score.metadata {uri}: there is no such Parquet file or folder")
    fs, found = storage.arrow_filesystem(storage.absolute(uri))
    schema = pa.schema([pa.field(name, pa.string()) for name in ("uri", *names)])
    try:
        metadata = pyarrow.dataset.dataset(found, filesystem=fs, format="parquet")
        missing = [name for name in schema.names if name not in metadata.schema.names]
        if missing:
            has = ", ".join(metadata.schema.names)
            raise ConfigError(f"score.metadata {uri}: there is no column {missing[0]}; it has {has}")
        with pq.ParquetWriter(path, schema) as writer:
            for batch in metadata.to_batches(columns=schema.names, batch_size=_BATCH_ROWS):
                batch.validate(full=True)  # text that is not UTF-8
                columns = [batch.column(name).cast(pa.string()) for name in schema.names]
                columns[0] = pa.array([_canonical(storage, each) for each in columns[0].to_pylist()], pa.string())
                rows = pa.record_batch(columns, schema=schema)
                writer.write_batch(rows.filter(pc.is_valid(columns[0])))
    except pa.ArrowNotImplementedError as error:
        raise ConfigError(f"score.metadata {uri}: a grouping column must be of a simple type: {error}") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise StorageUnavailable(f"{uri} can't be read: {' '.join(str(error).split())}") from error


def _canonical(storage: Storage, uri: str | None) -> str | None:
    """Return the URI in the form that listings use; None if it is null or malformed."""
    try:
        return None if uri is None else storage.object_uri(uri)
    except BadUri:
        return None


def _check_unique(uri: str, path: str) -> None:
    """Reject metadata with several rows for one photograph, because either could be the right one."""
    with duckdb.connect() as database:
        twice = database.execute(
            "SELECT uri, count(*) FROM read_parquet(?) GROUP BY uri HAVING count(*) > 1 ORDER BY uri LIMIT 1", [path]
        ).fetchone()
    if twice:
        raise ConfigError(
            f"score.metadata {uri}: has {twice[1]} rows for {twice[0]}; only one row per photograph is allowed"
        )

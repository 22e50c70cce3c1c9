"""Columns by which demographic tables are grouped: captured from URIs, or joined from a table about the images."""

from __future__ import annotations

import re
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from agr_ray.config import ConfigError, ScoreConfig
from agr_ray.schema import DEMOGRAPHICS, FACES, IMAGES
from agr_ray.storage import Storage, StorageUnavailable

_BATCH_ROWS = 65_536
_TAKEN = {*DEMOGRAPHICS.names, *IMAGES.names, *FACES.names, "run", "file_row_number"}
"""Columns of the tables, of their folders (`run=ID/`) and of DuckDB's Parquet reader; capitals do not count."""


@dataclass(frozen=True)
class Grouping:
    """How SQL makes the grouping columns of rows with a `uri`. All are strings; null: not known."""

    names: tuple[str, ...]
    select: str
    """Expressions with their names, to follow other columns: begins with a comma unless empty."""
    join: str
    """To follow FROM."""

    @property
    def fields(self) -> list[pa.Field]:
        """Return the columns."""
        return [pa.field(name, pa.string()) for name in self.names]


def check_grouping(config: ScoreConfig) -> dict[str, int]:
    """Return the number of each named group of score.key_pattern.

    Raises:
        ConfigError: a pattern that is none, or a grouping column that nothing gives, or whose name is taken.
    """
    try:
        # DuckDB's engine is RE2, which knows less than Python's; Python's knows the names' numbers.
        with duckdb.connect() as database:
            database.execute("SELECT regexp_extract('', ?)", [config.key_pattern]).fetchall()
        captured = dict(re.compile(config.key_pattern).groupindex)
    except (re.error, duckdb.Error) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"score.key_pattern {config.key_pattern!r}: no regular expression of RE2: {said}") from None
    for name in config.group_by:
        if name.lower() in _TAKEN:
            raise ConfigError(f"score.group_by {name}: the tables have a column of that name; choose another")
        if [other.lower() for other in config.group_by].count(name.lower()) > 1:
            raise ConfigError(f"score.group_by {name}: is named twice (capitals do not count)")
        if not re.fullmatch(r"\w+", name):
            raise ConfigError(f"score.group_by {name!r}: a name has letters, digits and _ only")
        if name not in captured and not config.metadata:
            has = ", ".join(captured) or "none"
            raise ConfigError(
                f"score.group_by {name}: score.key_pattern captures no such group (it has {has}), and there is no "
                "score.metadata to have such a column"
            )
    return captured


def make_grouping(storage: Storage, config: ScoreConfig, folder: str) -> Grouping:
    """Prepare the grouping; a copy of what is needed of score.metadata goes into the local `folder`.

    Raises:
        ConfigError: as `check_grouping`, or the metadata lack a column.
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
        firsts = ", ".join(f'any_value("{name}") AS "{name}"' for name in joined)
        join = f"LEFT JOIN (SELECT uri, {firsts} FROM read_parquet('{path}') GROUP BY uri) AS metadata USING (uri)"
    select = "".join(f', {columns[name]} AS "{name}"' for name in config.group_by)
    return Grouping(config.group_by, select, join)


def _copy_metadata(storage: Storage, uri: str, names: list[str], path: str) -> None:
    """Write the columns uri and `names`, as strings, of a Parquet file or folder to a local file."""
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
                columns = [batch.column(name).cast(pa.string()) for name in schema.names]
                writer.write_batch(pa.record_batch(columns, schema=schema))
    except pa.ArrowNotImplementedError as error:
        raise ConfigError(f"score.metadata {uri}: a grouping column must be of a simple type: {error}") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise StorageUnavailable(f"{uri} can't be read: {' '.join(str(error).split())}") from error

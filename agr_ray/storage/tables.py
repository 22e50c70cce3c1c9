"""Tables in Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agr_ray.storage.backend import Backend
from agr_ray.storage.errors import NotParquet

if TYPE_CHECKING:
    import pyarrow as pa


def read_table(backend: Backend, uri: str, columns: Sequence[str] | None) -> pa.Table:
    """Read a Parquet file, or all Parquet files of a folder as one table; see `Storage.read_table`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = backend.arrow_filesystem(uri)
    with backend.library_errors(uri):
        try:
            # No partitioning: `run=7/` in a path must not become a column.
            return pq.read_table(path, columns=columns and [*columns], filesystem=fs, partitioning=None)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise NotParquet(f"{uri} can't be read as Parquet: {error}") from error


def write_table(backend: Backend, table: pa.Table, uri: str) -> None:
    """Write a table as one Parquet file; see `Storage.write_table`."""
    import pyarrow.parquet as pq

    backend.write_with(uri, lambda file: pq.write_table(table, file, compression="zstd"))

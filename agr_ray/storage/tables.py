"""Tables in Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from agr_ray.storage.backend import Backend
from agr_ray.storage.errors import NotParquet

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


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


def read_batches(backend: Backend, uri: str, columns: Sequence[str], num_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield a Parquet file's rows in batches; see `Storage.read_batches`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = backend.arrow_filesystem(uri)
    with backend.library_errors(uri):
        try:
            with fs.open_input_file(path) as file:
                # pre_buffer would read all row groups ahead, and hold them in memory.
                parquet = pq.ParquetFile(file, pre_buffer=False)
                missing = [name for name in columns if name not in parquet.schema_arrow.names]
                if missing:
                    raise NotParquet(f"{uri} has no column {', '.join(missing)}")
                yield from parquet.iter_batches(num_rows, columns=[*columns])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise NotParquet(f"{uri} can't be read as Parquet: {error}") from error


def read_footer(backend: Backend, uri: str) -> pq.FileMetaData:
    """Return a Parquet file's footer; see `Storage.read_footer`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = backend.arrow_filesystem(uri)
    with backend.library_errors(uri):
        try:
            return pq.read_metadata(path, filesystem=fs)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise NotParquet(f"{uri} can't be read as Parquet: {error}") from error


def write_table(backend: Backend, table: pa.Table, uri: str) -> None:
    """Write a table as one Parquet file; see `Storage.write_table`."""
    import pyarrow.parquet as pq

    backend.write_with(uri, lambda file: pq.write_table(table, file, compression="zstd"))

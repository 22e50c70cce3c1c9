"""Read a label file that a data set publishes: fixed columns, one row for each image, possibly damaged rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from agr_ray.data.sources.label_table import LabelTableError
from agr_ray.storage import Storage, StorageError


def published_rows(
    storage: Storage, uri: str, columns: Sequence[str], separator: str
) -> Iterator[tuple[int, dict[str, str], str | None]]:
    """Yield each row's line number, its values by column, and an error if the row is malformed, else None.

    Values are not quoted. Bytes that are not UTF-8 are replaced, so that they damage only one value. Missing values of
    a malformed row are empty.

    Args:
        storage: where the file is.
        uri: of the file, with a header.
        columns: that the header must have, in any order and among others.
        separator: between values.

    Raises:
        LabelTableError: the file can't be read, or its header lacks a column.
        StorageUnavailable: no file can be read.
    """
    try:
        data = storage.read(uri)
    except StorageError as failure:
        raise LabelTableError(f"the label file can't be read: {failure}") from failure
    lines = data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").split("\n")
    header = [name.strip() for name in lines[0].split(separator)]
    absent = [name for name in columns if name not in header]
    if absent:
        raise LabelTableError(f"{uri}: expected the columns {', '.join(columns)}, found {', '.join(header)}")
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            values = [value.strip() for value in line.split(separator)]
            row = dict.fromkeys(columns, "") | dict(zip(header, values, strict=False))
            is_whole = len(values) == len(header)
            error = None if is_whole else f"line {number} has {len(values)} values for {len(header)} columns"
            yield number, row, error

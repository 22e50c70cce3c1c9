"""Group rejected images by reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

import pyarrow as pa

_PARTICULAR = re.compile(r"\S*[\d/#][^\s:]*")
"""Parts of errors that differ from object to object: numbers, request ids, ARNs, paths."""


def reject_reasons(rows: pa.Table, usable: Collection[str]) -> Counter[str]:
    """Count rejected rows by status and error, ignoring details such as the object's name and numbers.

    Args:
        rows: columns uri, status and error; any others.
        usable: statuses of rows that are not rejected.
    """
    columns = (rows[name].to_pylist() for name in ("uri", "status", "error"))
    return Counter(
        f"{status}: {_general(error or '', uri)}".rstrip(": ")
        for uri, status, error in zip(*columns, strict=True)
        if status not in usable
    )


def _general(error: str, uri: str) -> str:
    """Return an error without the object's name, which may be its URI, `bucket/key`, key or file name."""
    path = uri.removeprefix("s3://")
    names = {uri, path, path.partition("/")[2], path.rpartition("/")[2]} - {""}
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    error = re.sub(rf"(?<!\w)(?:{longest_first})(?!\w)", "#", error)
    return " ".join(_PARTICULAR.sub("#", error).removeprefix("#:").split())

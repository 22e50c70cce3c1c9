"""Why images were rejected, so that equal reasons count together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

import pyarrow as pa

_NUMBER = re.compile(r"\d+")


def reject_reasons(rows: pa.Table, usable: Collection[str]) -> Counter[str]:
    """Count rejected rows by status and error, without what differs between equal errors: the URI and numbers.

    Args:
        rows: columns uri, status and error; any others.
        usable: statuses of rows that are no rejects.
    """
    columns = (rows[name].to_pylist() for name in ("uri", "status", "error"))
    return Counter(
        f"{status}: {_NUMBER.sub('#', _without(error or '', uri))}".rstrip(": ")
        for uri, status, error in zip(*columns, strict=True)
        if status not in usable
    )


def _without(error: str, uri: str) -> str:
    """Return an error without the URI that it may begin with or quote."""
    return " ".join(error.replace(uri, "").strip(" :").split())

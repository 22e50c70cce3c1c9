"""Read a label table: CSV with any of three separators, or Parquet."""

from __future__ import annotations

import csv
import difflib
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.config.source import COLUMN_WORDS
from agr_ray.schema import LABEL_COLUMNS
from agr_ray.storage import MissingObject, Storage, StorageError

KEY_COLUMN: Final = "key"
OPTIONAL_COLUMNS: Final = ("subject", "split", "fold")
TABLE_NAMES: Final = ("labels.parquet", "labels.csv", "labels.tsv")
"""Names of label tables that are searched for in the folder of the images."""

_SEPARATORS: Final = (",", "\t", ";")
_LIMIT_WORDS: Final = {
    **dict.fromkeys(("low", "lower", "min", "from"), "age_low"),
    **dict.fromkeys(("high", "upper", "max", "to"), "age_high"),
}
_CLOSE: Final = 0.8
"""Minimum similarity (`difflib`) of a misspelt name."""
_NUM_SHOWN: Final = 3
"""Most tables that an error names."""
_LONG: Final = 5
"""Minimum length of a column's name that is recognised within another name."""


_Columns = dict[str, list[str | None]]


class LabelTableError(ValueError):
    """The label table as a whole can't be used. The message is one line."""


@dataclass(frozen=True, slots=True)
class LabelTable:
    """The rows of a label table, with all values as text and empty ones as None."""

    rows: list[dict[str, str | None]]
    """By `KEY_COLUMN`, `LABEL_COLUMNS` and `OPTIONAL_COLUMNS`, if the table has them."""
    other_columns: list[str]
    """Columns that are ignored."""


def find_labels(storage: Storage, uri: str) -> str:
    """Return the URI of the one label table in the folder of the images.

    Raises:
        LabelTableError: there is none, or more than one.
    """
    candidates = [storage.join(uri, name) for name in TABLE_NAMES]
    tables = [each for each in candidates if storage.exists(each)]
    if len(tables) > 1:
        raise LabelTableError(
            f"source.labels: there are several label tables, {' and '.join(tables)}; name the one to use"
        )
    if not tables and not storage.exists(uri):
        raise LabelTableError(f"source.uri: there is no folder {uri}")
    if not tables:
        suffixes = tuple(f".{name.rpartition('.')[2]}" for name in TABLE_NAMES)
        others = [info.key for info in storage.list(uri, suffixes) if "/" not in info.key][:_NUM_SHOWN]
        remedy = f"; name it, such as --source.labels {shlex.quote(others[0])}" if others else ""
        found = f"; the folder has {', '.join(others)}" if others else ""
        raise LabelTableError(
            f"source.labels: there is no {', '.join(TABLE_NAMES[:-1])} or {TABLE_NAMES[-1]} in {uri}{found}"
            f"{remedy or '; add one, or name another with --source.labels FILE'}"
        )
    return tables[0]


def given_labels(storage: Storage, uri: str, labels: str) -> str:
    """Return the URI of the label table that `source.labels` names: as it is, or below the folder of the images."""
    given = storage.absolute(labels)
    if "://" in labels or labels.startswith("/") or storage.exists(given):
        return given
    below = storage.join(uri, labels)
    return below if storage.exists(below) else given


def read_labels(storage: Storage, uri: str, columns: Mapping[str, str]) -> LabelTable:
    """Read a label table: Parquet by the ending `.parquet`, else CSV (UTF-8, with a header).

    The separator of a CSV is a comma, tab or semicolon. Names of columns are matched regardless of case and outer
    blanks. The table has the column `KEY_COLUMN`, the path of the image below its folder, at least one of
    `LABEL_COLUMNS`, and may have `OPTIONAL_COLUMNS`.

    Args:
        storage: of the table.
        uri: of the table.
        columns: names of these columns in the table, where they are others; empty: the table has no such column.

    Raises:
        LabelTableError: it does not exist, can't be read, lacks a column, or has a misspelt one.
    """
    try:
        if uri.lower().endswith(".parquet"):
            found, others = _columns_of_parquet(storage.read_table(uri), uri, columns)
        else:
            found, others = _columns_of_csv(storage.read(uri), uri, columns)
    except MissingObject as error:
        raise LabelTableError(f"source.labels: there is no label table at {uri}") from error
    except StorageError as error:
        raise LabelTableError(f"the label table can't be read: {error}") from error
    rows = [
        {name: text if text and text.strip() else None for name, text in zip(found, values, strict=True)}
        for values in zip(*found.values(), strict=True)
    ]
    return LabelTable([row for row in rows if any(row.values())], [name for name in others if name.strip()])


def _columns_of_parquet(table: pa.Table, uri: str, theirs: Mapping[str, str]) -> tuple[_Columns, list[str]]:
    """Return the columns that are known, and the names of the others."""
    try:
        names = table.column_names
    except UnicodeDecodeError:
        raise LabelTableError(f"{uri}: the name of a column is not UTF-8") from None
    columns: _Columns = {}
    indices = _find_columns(names, uri, theirs)
    for column, index in indices.items():
        try:
            values = _without_nan(table.column(index)).cast(pa.string())
            values.validate(full=True)  # not UTF-8
            columns[column] = values.to_pylist()
        except pa.ArrowException as error:
            reason = " ".join(str(error).split())
            raise LabelTableError(f"{uri}: column {names[index]!r} is neither text nor numbers: {reason}") from error
    return columns, [name for index, name in enumerate(names) if index not in indices.values()]


def _without_nan(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of a Parquet table with null for NaN, which many tools use for a missing value."""
    return pc.if_else(pc.is_nan(values), None, values) if pa.types.is_floating(values.type) else values


def _columns_of_csv(data: bytes, uri: str, theirs: Mapping[str, str]) -> tuple[_Columns, list[str]]:
    """Return the columns that are known, and the names of the others."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LabelTableError(
            f"{uri} is not UTF-8 text: line {line} has the byte 0x{data[error.start]:02x}; save the table as UTF-8"
        ) from error
    separator, names = _header(text, uri, theirs)
    indices = _find_columns(names, uri, theirs)
    columns: dict[str, list[str | None]] = {column: [] for column in indices}
    # If names follow a blank, so do values and their quotes.
    has_blanks = any(name.startswith(" ") for name in names)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=has_blanks)
    try:
        next(reader)
        for values in reader:
            if values and len(values) != len(names):
                raise LabelTableError(
                    f"{uri} can't be read as CSV: line {reader.line_num} has {len(values)} values for {len(names)} "
                    "columns; a value that holds the separator needs quotes"
                )
            for column, index in indices.items() if values else ():
                columns[column].append(values[index])
    except csv.Error as error:
        raise LabelTableError(f"{uri} can't be read as CSV: line {reader.line_num}: {error}") from error
    return columns, [name for index, name in enumerate(names) if index not in indices.values()]


def _header(text: str, uri: str, theirs: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the separator that gives the first line the most known columns, then the most columns; and the columns."""
    known = set(_wanted(theirs).values())
    headers: dict[str, list[str]] = {}
    for separator in _SEPARATORS:
        try:
            headers[separator] = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), [])
        except csv.Error:
            continue
    if not any(headers.values()):
        raise LabelTableError(f"{uri} can't be read as CSV: its first line is not a header")
    best = max(headers, key=lambda each: (len(known & set(map(_plain, headers[each]))), len(headers[each])))
    return best, headers[best]


def _wanted(theirs: Mapping[str, str]) -> dict[str, str]:
    """Return the plain names of all known columns in the table, without those that the user says it lacks."""
    names = (KEY_COLUMN, *LABEL_COLUMNS, *OPTIONAL_COLUMNS)
    return {name: _plain(theirs.get(name, name)) for name in names if theirs.get(name, name)}


def _find_columns(names: Sequence[str], uri: str, theirs: Mapping[str, str]) -> dict[str, int]:
    """Return the index of each known column.

    Raises:
        LabelTableError: two columns have the same name, a name is misspelt, or a column is missing. It names every
            fault.
    """
    plain_names = [_plain(name) for name in names]
    faults = []
    for index, plain in enumerate(plain_names):
        if plain and plain in plain_names[:index]:
            faults.append(f"{names[plain_names.index(plain)]!r} and {names[index]!r} differ only in case or spaces")
    wanted = _wanted(theirs)
    indices = {name: plain_names.index(plain) for name, plain in wanted.items() if plain in plain_names}
    faults += [
        f"source.columns maps {name} to {theirs[name]!r}, which the table does not have"
        for name in wanted
        if name in theirs and name not in indices
    ]
    lacking = [name for name in wanted if name not in indices and name not in theirs]
    meant = {
        name: column
        for name, plain in zip(names, plain_names, strict=True)
        if plain not in wanted.values() and (column := _column_meant(name, lacking))
    }
    if meant:
        pairs = ", ".join(f"{name!r} probably means {column!r}" for name, column in meant.items())
        faults.append(f"{pairs} ({next(iter(meant.values()))}= says that the table has no such column)")
    lacks_key = KEY_COLUMN in lacking and KEY_COLUMN not in meant.values()
    if lacks_key:
        faults.append(f"{KEY_COLUMN!r}, the path of the image, is missing")
    if meant or lacks_key:
        setting = {KEY_COLUMN: "PATHS"} if lacks_key else {}
        setting |= {column: name for name, column in reversed(meant.items())}
        words = ",".join(f"{column}={name}" for column, name in setting.items())
        faults.append(f"add --source.columns {shlex.quote(words)}")
    if not set(LABEL_COLUMNS) & {*indices, *meant.values(), *theirs}:
        faults.append(f"at least one of {', '.join(LABEL_COLUMNS)} is needed")
    if ("age_low" in indices) != ("age_high" in indices) and not {"age_low", "age_high"} & {*meant.values(), *theirs}:
        faults.append("age_low and age_high must be given together")
    if faults:
        raise LabelTableError(f"{uri} has the columns {', '.join(names)}: {'; '.join(faults)}")
    return indices


def _column_meant(name: str, lacking: Sequence[str]) -> str | None:
    """Return the missing column that a name probably means, or None."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W_]+", spaced.casefold())
    joined = "".join(words)
    guesses = []
    if "age" in words:
        guesses += [_LIMIT_WORDS[word] for word in words if word in _LIMIT_WORDS] or ["age"]
    guesses += [COLUMN_WORDS.get(word, word) for word in words]
    guesses += [each for each in lacking if len(each) >= _LONG and each in joined]
    guesses += [each for each in lacking if each.replace("_", "") == joined]
    guesses += difflib.get_close_matches(joined, lacking, n=1, cutoff=_CLOSE)
    # A table of age ranges may have another column about age.
    absent = [each for each in lacking if each != "age" or "age_low" in lacking]
    return next((guess for guess in guesses if guess in absent), None)


def _plain(name: str) -> str:
    """Return a column's name in lower case, without outer blanks and byte order mark."""
    return name.strip("\ufeff \t\r\n\u00a0").casefold()

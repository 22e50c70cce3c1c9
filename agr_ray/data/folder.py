"""Any folder of images with a CSV or Parquet table of their labels."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from agr_ray.data.manifest import IMAGE_SUFFIXES, ParsedLabel, SourceRow, check_age, match_word
from agr_ray.schema import GENDERS, RACES, SPLITS
from agr_ray.storage import Storage, StorageError

KEY_COLUMN: Final = "key"
LABEL_COLUMNS: Final = ("age", "gender", "race")
OPTIONAL_COLUMNS: Final = ("subject", "split")


class LabelTableError(ValueError):
    """The table of labels as a whole can't be used. The message is one line."""


def read_labels(storage: Storage, uri: str, *, key_column: str = KEY_COLUMN) -> list[dict[str, str | None]]:
    """Return the rows of a table of labels, every value as text and a blank one as None.

    The table is CSV (UTF-8, with a header) or, by the ending `.parquet`, Parquet. It has the column `key_column`,
    the path of the image below its folder, at least one of age (years), gender and race, and may have subject and
    split. Further columns are ignored.

    Raises:
        LabelTableError: it is not there, can't be read, or lacks a column.
    """
    try:
        table = storage.read_table(uri) if uri.lower().endswith(".parquet") else _read_csv(storage.read(uri), uri)
    except StorageError as error:
        raise LabelTableError(f"the table of labels can't be read: {error}") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise LabelTableError(f"{uri} has two columns of one name among {', '.join(table.column_names)}")
    if key_column not in table.column_names or not set(LABEL_COLUMNS) & set(table.column_names):
        raise LabelTableError(
            f"{uri} has the columns {', '.join(table.column_names)}: expected {key_column!r} and at least one of "
            f"{', '.join(LABEL_COLUMNS)}"
        )
    wanted = [name for name in (*LABEL_COLUMNS, *OPTIONAL_COLUMNS) if name in table.column_names]
    try:
        texts = {
            name: _without_nan(table.column(column)).cast(pa.string()).to_pylist()
            for name, column in [(KEY_COLUMN, key_column), *((name, name) for name in wanted)]
        }
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise LabelTableError(f"{uri} has a column that is neither text nor numbers: {error}") from error
    return [
        {name: text if text and text.strip() else None for name, text in zip(texts, values, strict=True)}
        for values in zip(*texts.values(), strict=True)
    ]


def _without_nan(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of a Parquet table with null for NaN, by which many tools mean the same."""
    return pc.if_else(pc.is_nan(values), None, values) if pa.types.is_floating(values.type) else values


def parse_label(
    row: Mapping[str, str | None],
    *,
    gender_codes: Mapping[str, str] | None = None,
    race_codes: Mapping[str, str] | None = None,
) -> ParsedLabel:
    """Return the label of one row of the table, or what is wrong with it.

    Words are matched regardless of case. A code, such as 0 for a gender, means something only if it is given in
    `gender_codes` or `race_codes`. What is blank is missing, which is allowed.
    """
    age, age_error = _parse_age(row.get("age"))
    gender, gender_error = match_word("gender", row.get("gender"), GENDERS, gender_codes)
    race, race_error = match_word("race", row.get("race"), RACES, race_codes)
    split, split_error = match_word("split", row.get("split"), SPLITS)
    errors = [error for error in (age_error, gender_error, race_error, split_error) if error]
    if errors:
        return ParsedLabel(error="; ".join(errors))
    return ParsedLabel(age, gender, race, subject=(row.get("subject") or "").strip() or None, split=split)


def source_rows(
    storage: Storage,
    uri: str,
    labels_uri: str,
    *,
    key_column: str = KEY_COLUMN,
    gender_codes: Mapping[str, str] | None = None,
    race_codes: Mapping[str, str] | None = None,
) -> Iterator[SourceRow]:
    """Yield a row for each image below `uri`, and one for each labelled image that is not there.

    Images are the files with one of `IMAGE_SUFFIXES`, and whatever else has a row in the table.

    An image without a row in the table is a bad label ("no label row"), and so is one whose rows disagree. Rows
    that say the same count once.

    Raises:
        LabelTableError: the table can't be used, or the codes name a word that does not exist.
        StorageUnavailable: the folder or bucket can't be listed.
    """
    _check_codes("gender", gender_codes, GENDERS)
    _check_codes("race", race_codes, RACES)
    labels: dict[str, set[ParsedLabel]] = defaultdict(set)
    for number, row in enumerate(read_labels(storage, labels_uri, key_column=key_column), start=1):
        key = row[KEY_COLUMN]
        if key is None:
            raise LabelTableError(f"{labels_uri}: row {number} has no {key_column}")
        key = key.removeprefix("./")
        if key.startswith("/") or ".." in key.split("/"):
            raise LabelTableError(f"{labels_uri}: row {number}: {key_column} {key!r} is not a path below the folder")
        labels[key].add(parse_label(row, gender_codes=gender_codes, race_codes=race_codes))

    for info in storage.list_readable(uri):
        if info.key in labels or info.key.lower().endswith(IMAGE_SUFFIXES):
            yield SourceRow.listed(info, _only_label(labels.pop(info.key, set()), labels_uri))
    for key, found in labels.items():
        yield SourceRow(storage.join(uri, key), key, _only_label(found, labels_uri), missing=True)


def _only_label(found: set[ParsedLabel], labels_uri: str) -> ParsedLabel:
    """Return the label that an image's rows in the table agree on."""
    if not found:
        return ParsedLabel(error=f"no label row in {labels_uri.rpartition('/')[2]}")
    if len(found) > 1:
        return ParsedLabel(error=f"{len(found)} label rows disagree")
    (label,) = found
    return label


def _parse_age(text: str | None) -> tuple[float | None, str | None]:
    if text is None or not text.strip():
        return None, None
    try:
        years = float(text)
    except ValueError:
        return None, f"age {text!r} is not a number of years"
    error = check_age(years)
    return (None, error) if error else (years, None)


def _check_codes(name: str, codes: Mapping[str, str] | None, words: tuple[str, ...]) -> None:
    for code, word in (codes or {}).items():
        if word not in words:
            raise LabelTableError(f"{name} code {code!r} means {word!r}: expected one of {', '.join(words)}")


def _read_csv(data: bytes, uri: str) -> pa.Table:
    """Read CSV with every column as text: left to guess, a reader would turn the subject 007 into 7."""
    try:
        header = pa.csv.open_csv(io.BytesIO(data)).schema.names
        return pa.csv.read_csv(
            io.BytesIO(data),
            convert_options=pa.csv.ConvertOptions(
                column_types={name: pa.string() for name in header}, strings_can_be_null=True, null_values=[""]
            ),
        )
    except pa.ArrowInvalid as error:
        raise LabelTableError(f"{uri} can't be read as CSV: {' '.join(str(error).split())}") from error

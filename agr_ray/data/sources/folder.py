"""Any folder of images with a CSV or Parquet table of their labels."""

from __future__ import annotations

import shlex
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from agr_ray.config import MISSING_VALUES
from agr_ray.data.manifest import IMAGE_SUFFIXES, ParsedLabel, SourceRow
from agr_ray.data.sources.label_table import KEY_COLUMN, LabelTable, LabelTableError, read_labels
from agr_ray.data.sources.label_values import LabelCodeError, LabelParser, RowLabels, merge_labels
from agr_ray.json_log import print_to_stderr
from agr_ray.labels import LabelSpace
from agr_ray.storage import Storage

NUM_EXAMPLES = 3
_MIN_VALUES = 10
"""Fewest values of a column of which most may not be invalid; a smaller table is easily looked through."""


def print_note(text: str) -> None:
    """Write a note on the labels to standard error."""
    print_to_stderr(text)


def source_rows(
    storage: Storage,
    uri: str,
    labels_uri: str,
    *,
    space: LabelSpace,
    columns: Mapping[str, str] | None = None,
    gender_codes: Mapping[str, str] | None = None,
    race_codes: Mapping[str, str] | None = None,
    missing_values: Iterable[str] = MISSING_VALUES,
    note: Callable[[str], None] = print_note,
) -> Iterator[SourceRow]:
    """Yield a row for each image below `uri`, and one for each labelled image that does not exist.

    Images are the files with one of `IMAGE_SUFFIXES`, and any other file with a row in the table. A row's key is the
    path of its image below `uri`. If no file has exactly that path, backslashes count as slashes, and a leading `./`
    and outer blanks are ignored.

    An image without a row in the table, or whose rows disagree, gets the status bad_label. Identical rows count once.
    A value that can't be read is dropped, and the image keeps its other labels.

    Args:
        space: allowed genders and races.
        columns: names of columns in the table, where they are not ours.
        note: called with a line for each kind of thing that is dropped or ignored.

    Raises:
        LabelTableError: the table can't be used, a code stands for an unknown word, or no key matches an image.
        StorageUnavailable: the folder or bucket can't be listed.
    """
    name = labels_uri.rpartition("/")[2]
    try:
        parser = LabelParser(space, gender_codes, race_codes, missing_values)
    except LabelCodeError as error:
        raise LabelTableError(str(error)) from error
    table = read_labels(storage, labels_uri, columns or {})
    by_key = _rows_by_key(table, parser, labels_uri)
    if not by_key:
        raise LabelTableError(f"{labels_uri} has no rows")
    if table.other_columns:
        note(f"{name}: ignoring the columns {_examples(table.other_columns, len(table.other_columns))}")
    _check_words(name, by_key, space, columns or {})
    yield from labelled_images(storage, uri, name, by_key, note, options=True)


def labelled_images(
    storage: Storage,
    uri: str,
    name: str,
    by_key: Mapping[str, Sequence[RowLabels]],
    note: Callable[[str], None],
    *,
    options: bool = False,
) -> Iterator[SourceRow]:
    """Yield a row for each image below `uri`, and one for each labelled image that does not exist; see `source_rows`.

    Args:
        storage: where the images are.
        uri: folder or prefix of the images.
        name: of the label table, in notes and errors.
        by_key: labels of each image, by its path below `uri`.
        note: called with a line for each kind of thing that is dropped or ignored.
        options: whether the notes may name options of the kind `folder`.

    Raises:
        LabelTableError: no key matches an image.
        StorageUnavailable: the folder or bucket can't be listed.
    """
    _note_dropped(name, (row for rows in by_key.values() for row in rows), note, options)
    keys = by_key.keys() | {_plain_key(key) for key in by_key}
    files = {
        info.key: info
        for info in storage.list_readable(uri)
        if info.key in keys or info.key.lower().endswith(IMAGE_SUFFIXES)
    }
    labels: dict[str, list[RowLabels]] = defaultdict(list)
    written: dict[str, str] = {}
    for written_key, rows in by_key.items():
        key = written_key if written_key in files else _plain_key(written_key)
        labels[key] += rows
        written.setdefault(key, written_key)
    _check_keys(name, uri, written, list(files), note)

    for key, info in files.items():
        rows = labels.pop(key, [])
        label = merge_labels(rows) if rows else ParsedLabel(error=f"no label row in {name}")
        yield SourceRow.listed(info, label)
    for key, rows in labels.items():
        yield SourceRow(storage.join(uri, key), key, merge_labels(rows), missing=True)


def _rows_by_key(table: LabelTable, parser: LabelParser, labels_uri: str) -> dict[str, list[RowLabels]]:
    by_key: dict[str, list[RowLabels]] = defaultdict(list)
    for number, row in enumerate(table.rows, start=1):
        key = row[KEY_COLUMN]
        if key is None:
            raise LabelTableError(f"{labels_uri}: row {number} has no {KEY_COLUMN}")
        by_key[key].append(parser.parse(row))
    return by_key


def _plain_key(key: str) -> str:
    """Return a key with slashes, and without a leading `./` and outer blanks."""
    plain = key.strip().replace("\\", "/")
    while plain.startswith("./"):
        plain = plain.removeprefix("./")
    return plain


def _check_keys(
    name: str, uri: str, written: Mapping[str, str], files: Sequence[str], note: Callable[[str], None]
) -> None:
    """Report labelled images that do not exist and images without a label row.

    Args:
        name: of the label table, in notes.
        uri: of the images.
        written: each labelled key, and its spelling in the table.
        files: keys of the existing images.
        note: called with each line.

    Raises:
        LabelTableError: no key matches an image.
    """
    file_keys = set(files)
    missing = [key for key in written if key not in file_keys]
    missing_written = [written[key] for key in missing]
    unlabelled = [key for key in files if key not in written]
    how = "a key is the path of an image below source.uri, in the same upper and lower case"
    if len(missing) == len(written):
        if not files:
            raise LabelTableError(f"source.uri {uri}: there is no image below it, and {name} labels {len(written):,}")
        raise LabelTableError(
            f"no key of {name} matches an image below {uri}: a key is {missing_written[0]!r}, and an image is "
            f"{_likeliest(missing[0], unlabelled)!r}; {how}"
        )
    if missing:
        note(f"{name}: labelled images that do not exist: {len(missing):,} ({_examples(missing_written)})")
    if unlabelled:
        note(f"{name}: images without a label row: {len(unlabelled):,} ({_examples(unlabelled)})")
    if missing and unlabelled and 2 * len(missing) > len(written):
        note(
            f"{name}: most keys match no image: a key is {missing_written[0]!r}, and an image is "
            f"{_likeliest(missing[0], unlabelled)!r}; {how}"
        )
    folded = {_fold(key): key for key in unlabelled}
    pairs = [f"{written[key]!r} for {folded[_fold(key)]!r}" for key in missing if _fold(key) in folded]
    if pairs:
        shown = ", ".join(pairs[:NUM_EXAMPLES])
        note(f"{name}: keys that differ from an image's only in case or Unicode form: {len(pairs):,} ({shown})")


def _likeliest(key: str, files: Sequence[str]) -> str:
    """Return the file that the key probably means, or else the first."""
    name = _fold(_plain_key(key)).rpartition("/")[2]
    return next((each for each in files if _fold(each).rpartition("/")[2] == name), files[0])


def _fold(key: str) -> str:
    return unicodedata.normalize("NFC", key).casefold()


def _check_words(
    name: str, by_key: Mapping[str, Sequence[RowLabels]], space: LabelSpace, columns: Mapping[str, str]
) -> None:
    """Reject a table with values of gender or race that are mostly invalid.

    Raises:
        LabelTableError: most are; the message names the options that help.
    """
    rows = [row for each in by_key.values() for row in each]
    for column, words in (("gender", space.genders), ("race", space.races)):
        invalid = [dropped.text for row in rows for dropped in row.dropped if dropped.column == column]
        num_given = len(invalid) + sum(getattr(row, column) is not None for row in rows)
        if num_given >= _MIN_VALUES and 2 * len(invalid) > num_given:
            texts = list(dict.fromkeys(invalid))
            code = shlex.quote(f"{texts[0]}={words[0]}")
            raise LabelTableError(
                f"{name}: {len(invalid):,} of {num_given:,} values of {columns.get(column) or column} are not "
                f"understood ({_examples(texts)}): expected {', '.join(words)}; say what they mean, such as "
                f"--source.{column}_codes {code}, or ignore the column with --source.columns {column}="
            )


def _note_dropped(name: str, rows: Iterable[RowLabels], note: Callable[[str], None], options: bool) -> None:
    """Report how many values of each column were dropped."""
    texts: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for dropped in row.dropped:
            texts[dropped.column].append(dropped.text)
    for column, values in texts.items():
        examples = _examples(list(dict.fromkeys(values)))
        has_codes = options and column in ("gender", "race")
        remedy = f"; --source.{column}_codes says what they mean" if has_codes else ""
        note(f"{name}: invalid values of {column}, dropped: {len(values):,} ({examples}){remedy}")


def _examples(values: Sequence[str], num: int = NUM_EXAMPLES) -> str:
    shown = ", ".join(repr(value) for value in values[:num])
    return f"{shown}, ..." if len(values) > num else shown

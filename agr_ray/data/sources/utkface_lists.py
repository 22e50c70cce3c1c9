"""CORAL's subset of UTKFace: ages 21 to 60, with the split of list files utk_train.csv and utk_test.csv.

W. Cao, V. Mirjalili, S. Raschka: Rank Consistent Ordinal Regression for Neural Networks with Application to Age
Estimation, Pattern Recognition Letters 140, 2020. The files are in github.com/Raschka-research-group/coral-cnn, in
datasets/train-test-csv. Their columns are an index without a name, `file` and `age`, which is the age in years less 21.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from agr_ray.data.manifest import ParsedLabel, SourceRow
from agr_ray.data.sources.label_table import LabelTableError
from agr_ray.data.sources.published_table import published_rows
from agr_ray.storage import Storage

LIST_FILES: Final = {"train": "utk_train.csv", "val": "utk_valid.csv", "test": "utk_test.csv"}
"""By split. Without utk_valid.csv, which is not published, val is drawn from train by `split.val`."""
COLUMNS: Final = ("file", "age")
FIRST_YEAR: Final = 21


def listed_rows(storage: Storage, lists_uri: str, rows: Iterable[SourceRow]) -> Iterator[SourceRow]:
    """Yield the rows of the images that a list names, with the list's split, and a row for each that does not exist.

    The labels stay those of the file name. An image whose list gives another age, or that is in two lists, gets the
    status bad_label. Images in no list are left out.

    Args:
        storage: where the lists are.
        lists_uri: folder or prefix of `LIST_FILES`.
        rows: of the source, whose file names are matched.

    Raises:
        LabelTableError: there is no list of test images or of training images, or a list lacks a column.
        StorageUnavailable: a list can't be read.
    """
    uris = {split: storage.join(lists_uri, name) for split, name in LIST_FILES.items()}
    uris = {split: uri for split, uri in uris.items() if storage.exists(uri)}
    if not {"train", "test"} <= uris.keys():
        raise LabelTableError(
            f"source.labels {lists_uri}: expected {LIST_FILES['train']} and {LIST_FILES['test']} in it"
        )
    labels: dict[str, ParsedLabel] = {}
    for split, uri in uris.items():
        given = None if split == "train" and "val" not in uris else split
        for line, row, error in published_rows(storage, uri, COLUMNS, ","):
            name, where = row["file"], f"line {line} of {LIST_FILES[split]}"
            if error is None and not row["age"].isdecimal():
                error = f"{where}: age {row['age']!r} is not a number"
            if name in labels:
                error = f"{where}: is listed twice"
            age = None if error else float(row["age"]) + FIRST_YEAR
            labels[name or f"{LIST_FILES[split]}:{line}"] = ParsedLabel(age=age, split=given, error=error)
    for each in rows:
        listed = labels.pop(each.key.rpartition("/")[2], None)
        if listed is not None:
            yield replace(each, label=_merged(each.label, listed))
    for name, listed in labels.items():
        yield SourceRow(storage.join(lists_uri, name), name, listed, missing=True)


def _merged(named: ParsedLabel, listed: ParsedLabel) -> ParsedLabel:
    """Return the labels of an image from its name, with its list's split."""
    if named.error or listed.error:
        return ParsedLabel(error=named.error or listed.error)
    if named.age != listed.age:
        return ParsedLabel(error=f"its list gives the age {listed.age:g}, its name {named.age}")
    return replace(named, split=listed.split)

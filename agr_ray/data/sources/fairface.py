"""FairFace: fairface_label_train.csv and fairface_label_val.csv beside train/ and val/.

K. Karkkainen, J. Joo: FairFace: Face Attribute Dataset for Balanced Race, Gender, and Age for Bias Measurement and
Mitigation, WACV 2021. CC BY 4.0. Ages are ranges, and all labels are perceived by annotators.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Final

from agr_ray.data.manifest import SourceRow
from agr_ray.data.sources.folder import labelled_images
from agr_ray.data.sources.label_table import LabelTableError
from agr_ray.data.sources.label_values import LabelParser, RowLabels, unreadable_row
from agr_ray.data.sources.published_table import published_rows
from agr_ray.labels import FAIRFACE
from agr_ray.storage import Storage

LABEL_FILES: Final = {"train": "fairface_label_train.csv", "val": "fairface_label_val.csv"}
COLUMNS: Final = ("file", "age", "gender", "race")
"""Columns that are read; `service_test`, which marks a subset of the published validation set, is not."""

RACE_WORDS: Final = {
    "Latino_Hispanic": "latino_hispanic",
    "East Asian": "east_asian",
    "Southeast Asian": "southeast_asian",
    "Middle Eastern": "middle_eastern",
}
"""Published names of races that differ from the label space's in more than case."""


def source_rows(
    storage: Storage, uri: str, *, published_splits: bool, note: Callable[[str], None]
) -> Iterator[SourceRow]:
    """Yield a row for each image below `uri`, and one for each labelled image that does not exist.

    An image whose row can't be read, or without a row, gets the status bad_label.

    Args:
        storage: where the data set is.
        uri: folder or prefix of the label files, train/ and val/.
        published_splits: whether the published validation set becomes the test split.
        note: called with a line for each kind of thing that is dropped or ignored.

    Raises:
        LabelTableError: there is no label file, it lacks a column, or no key matches an image.
        StorageUnavailable: the folder or bucket can't be listed.
    """
    files = {split: storage.join(uri, name) for split, name in LABEL_FILES.items()}
    files = {split: file for split, file in files.items() if storage.exists(file)}
    if not files:
        raise LabelTableError(f"source.uri {uri}: expected {' and '.join(LABEL_FILES.values())}, found neither")
    parser = LabelParser(FAIRFACE, race_codes=RACE_WORDS)
    by_key: dict[str, list[RowLabels]] = defaultdict(list)
    for split, file in files.items():
        for line, row, error in published_rows(storage, file, COLUMNS, ","):
            key = row["file"]
            given = "test" if published_splits and split == "val" else None
            labels = parser.parse({name: row[name] or None for name in COLUMNS[1:]} | {"split": given})
            if not key:
                error, key = f"line {line} names no file", f"{LABEL_FILES[split]}:{line}"
            by_key[key].append(labels if error is None else unreadable_row(key, error))
    yield from labelled_images(storage, uri, " and ".join(LABEL_FILES[split] for split in files), by_key, note)

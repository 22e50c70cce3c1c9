"""MORPH II (album 2 of MORPH, the non-commercial release of 2008): a CSV of labels beside Album2/.

K. Ricanek, T. Tesafaye: MORPH: A Longitudinal Image Database of Normal Adult Age-Progression, FG 2006. Booking
photographs of adults, 55,134 of 13,617 subjects, with date of birth; licensed by its authors. Age and gender are those
of the booking record; race is one letter of it. Records of one subject may contradict each other: B. Yip et al.,
"Preliminary Studies on a Large Face Database", 2018 (arXiv:1811.06446), list such errors.

The file's name, its columns, the letters and a path such as `Album2/009055_1M54.JPG` were checked against public
programs that read it, not against the release itself, which needs a licence. Not checked: the meaning of
`O`, and whether values are ever quoted.
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
from agr_ray.labels import MORPH2
from agr_ray.storage import Storage

LABEL_FILE: Final = "morph_2008_nonCommercial.csv"
COLUMNS: Final = ("id_num", "age", "gender", "race", "photo")
"""Columns that are read; the others are picture_num, dob, doa, facial_hair, age_diff and glasses. `photo` is the path
of the image below the folder of the file."""

RACE_LETTERS: Final = {"W": "white", "B": "black", "A": "asian", "H": "hispanic", "O": "others"}


def source_rows(storage: Storage, uri: str, labels_uri: str, *, note: Callable[[str], None]) -> Iterator[SourceRow]:
    """Yield a row for each image below `uri`, and one for each labelled image that does not exist.

    The subject is `id_num`, without leading zeros, which only some releases have. An image whose row can't be read, or
    without a row, gets the status bad_label.

    Args:
        storage: where the data set is.
        uri: folder or prefix of Album2/.
        labels_uri: of the CSV file; empty: `LABEL_FILE` below `uri`.
        note: called with a line for each kind of thing that is dropped or ignored.

    Raises:
        LabelTableError: there is no label file, it lacks a column, or no key matches an image.
        StorageUnavailable: the folder or bucket can't be listed.
    """
    if not labels_uri:
        labels_uri = storage.join(uri, LABEL_FILE)
        if not storage.exists(labels_uri):
            raise LabelTableError(
                f"source.uri {uri}: expected {LABEL_FILE}, found none; source.labels names a file of another name"
            )
    name = labels_uri.rpartition("/")[2]
    parser = LabelParser(MORPH2, race_codes=RACE_LETTERS)
    by_key: dict[str, list[RowLabels]] = defaultdict(list)
    for line, row, error in published_rows(storage, labels_uri, COLUMNS, ","):
        key = row["photo"]
        subject = row["id_num"].lstrip("0") or row["id_num"]
        labels = parser.parse({each: row[each] or None for each in COLUMNS[1:4]} | {"subject": subject or None})
        if not key:
            error, key = f"line {line} names no photo", f"{name}:{line}"
        elif error is None and not subject:
            error = f"line {line} names no subject"
        by_key[key].append(labels if error is None else unreadable_row(key, error))
    yield from labelled_images(storage, uri, name, by_key, note)

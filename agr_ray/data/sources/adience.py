"""Adience: fold_0_data.txt to fold_4_data.txt beside faces/ or aligned/.

E. Eidinger, R. Enbar, T. Hassner: Age and Gender Estimation of Unfiltered Faces, IEEE Transactions on Information
Forensics and Security 9(12), 2014. Ages are mostly ranges; there are no races.
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
from agr_ray.labels import ADIENCE
from agr_ray.storage import Storage

LABEL_FILES: Final = tuple(f"fold_{fold}_data.txt" for fold in range(5))
COLUMNS: Final = ("user_id", "original_image", "face_id", "age", "gender")
"""Columns that are read; the others describe the face in the original photograph, which is not published."""

IMAGE_NAMES: Final = {"faces": "coarse_tilt_aligned_face", "aligned": "landmark_aligned_face"}
"""Folders of images, and the prefix of their file names. If both exist, the first is read: it has more margin."""


def source_rows(storage: Storage, uri: str, *, note: Callable[[str], None]) -> Iterator[SourceRow]:
    """Yield a row for each image below `uri`, and one for each labelled image that does not exist.

    The subject is the user_id, so that all images of a user get one split. The fold is the number of the label file. An
    image whose row can't be read, or without a row, gets the status bad_label.

    Args:
        storage: where the data set is.
        uri: folder or prefix of the label files and of faces/ or aligned/.
        note: called with a line for each kind of thing that is dropped or ignored.

    Raises:
        LabelTableError: there is no label file or image folder, a file lacks a column, or no key matches an image.
        StorageUnavailable: the folder or bucket can't be listed.
    """
    files = [name for name in LABEL_FILES if storage.exists(storage.join(uri, name))]
    if not files:
        raise LabelTableError(f"source.uri {uri}: expected {LABEL_FILES[0]} to {LABEL_FILES[-1]}, found none")
    folder = next((name for name in IMAGE_NAMES if storage.exists(storage.join(uri, name))), None)
    if folder is None:
        raise LabelTableError(f"source.uri {uri}: expected a folder {' or '.join(IMAGE_NAMES)}, found neither")
    parser = LabelParser(ADIENCE)
    by_key: dict[str, list[RowLabels]] = defaultdict(list)
    for name in files:
        fold = str(LABEL_FILES.index(name))
        for line, row, error in published_rows(storage, storage.join(uri, name), COLUMNS, "\t"):
            key = f"{row['user_id']}/{IMAGE_NAMES[folder]}.{row['face_id']}.{row['original_image']}"
            labels = parser.parse(
                {
                    "age": row["age"] or None,
                    "gender": row["gender"] or None,
                    "subject": row["user_id"] or None,
                    "fold": fold,
                }
            )
            if not all(row[column] for column in COLUMNS[:3]):
                error, key = f"line {line} names no image", f"{name}:{line}"
            by_key[key].append(labels if error is None else unreadable_row(key, error))
    yield from labelled_images(
        storage, storage.join(uri, folder), " to ".join(dict.fromkeys((files[0], files[-1]))), by_key, note
    )

"""FG-NET: a folder of images with subject and age in their file names, such as 001A02.JPG and 001A43a.JPG.

A. Lanitis, C. J. Taylor, T. F. Cootes: Toward Automatic Simulation of Aging Effects on Face Images, IEEE Transactions
on Pattern Analysis and Machine Intelligence 24(4), 2002. 1,002 scanned photographs of 82 people from birth to 69 years;
ages are true. The names have no gender and no race. Images are evaluated by leaving one person out.

The form of the names was checked against public programs that read them; the data set is no longer at its first
address. Its points/ folder holds no images and is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from agr_ray.data.manifest import IMAGE_SUFFIXES, ParsedLabel, SourceRow, check_age
from agr_ray.storage import Storage

EXPECTED_NAME: Final = "[subject, 3 digits]A[age, 2 digits][letter].JPG"

# Copies on case-insensitive disks have names in lower case. The letter numbers images of the same person and age.
_NAME = re.compile(r"([0-9]{3})A([0-9]{2})([a-z]?)\.[a-z]+", re.ASCII | re.IGNORECASE)


def parse_name(name: str) -> ParsedLabel:
    """Return the subject and age in a file name, or the error in it."""
    match = _NAME.fullmatch(name)
    if match is None:
        return ParsedLabel(error=f"name does not parse: expected {EXPECTED_NAME}")
    age = float(match[2])
    if error := check_age(age):
        return ParsedLabel(error=error)
    return ParsedLabel(age=age, subject=match[1])


def source_rows(storage: Storage, uri: str) -> Iterator[SourceRow]:
    """Yield a row for each image (`IMAGE_SUFFIXES`) below `uri`, subfolders included.

    Raises:
        StorageUnavailable: the folder or bucket can't be listed.
    """
    for info in storage.list_readable(uri, IMAGE_SUFFIXES):
        yield SourceRow.listed(info, parse_name(info.key.rpartition("/")[2]))

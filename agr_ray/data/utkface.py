"""UTKFace: a folder of images that carry their labels in their names.

Z. Zhang, Y. Song, H. Qi: Age Progression/Regression by Conditional Adversarial Autoencoder, CVPR 2017. For
non-commercial research only, as its authors state. Its labels were estimated by a model and checked by one
annotator: they are perceived attributes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from agr_ray.data.manifest import IMAGE_SUFFIXES, ParsedLabel, SourceRow, check_age
from agr_ray.storage import Storage

UTKFACE_GENDERS: Final = ("male", "female")
"""By UTKFace's code, which is not the order of `schema.GENDERS`."""

UTKFACE_RACES: Final = ("white", "black", "asian", "indian", "others")
"""By UTKFace's code."""

EXPECTED_NAME: Final = "[age]_[gender]_[race]_[timestamp].jpg.chip.jpg"

# The timestamp is yyyymmddHHMMSS and a fraction of a second, in three digits or (rarely) more. ASCII, because \d
# would take the digits of every script.
_NAME = re.compile(r"([0-9]+)_([0-9]+)_([0-9]+)_([0-9]{17,})\.jpg(?:\.chip\.jpg)?", re.ASCII)


def parse_name(name: str) -> ParsedLabel:
    """Return the label that a file's name spells, or what is wrong with it.

    The parser is strict: a name with a label missing, a stray blank or dot, or a timestamp too short was damaged,
    and nothing says that the rest of it was not. Names of the uncropped images (`....jpg`) parse too.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return ParsedLabel(error=f"name does not parse: expected {EXPECTED_NAME}")
    age, gender, race = (int(match.group(index)) for index in (1, 2, 3))
    if error := check_age(age):
        return ParsedLabel(error=error)
    if gender >= len(UTKFACE_GENDERS):
        return ParsedLabel(error=f"gender {gender} is not understood: expected 0 (male) or 1 (female)")
    if race >= len(UTKFACE_RACES):
        codes = ", ".join(f"{code} ({word})" for code, word in enumerate(UTKFACE_RACES))
        return ParsedLabel(error=f"race {race} is not understood: expected one of {codes}")
    return ParsedLabel(age=float(age), gender=UTKFACE_GENDERS[gender], race=UTKFACE_RACES[race])


def source_rows(storage: Storage, uri: str) -> Iterator[SourceRow]:
    """Yield a row for each image (`IMAGE_SUFFIXES`) below `uri`, in folders or not.

    Raises:
        StorageUnavailable: the folder or bucket can't be listed.
    """
    for info in storage.list_readable(uri, IMAGE_SUFFIXES):
        yield SourceRow.listed(info, parse_name(info.key.rpartition("/")[2]))

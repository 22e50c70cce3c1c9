"""UTKFace: a folder of images with their labels in their file names.

Z. Zhang, Y. Song, H. Qi: Age Progression/Regression by Conditional Adversarial Autoencoder, CVPR 2017. For
non-commercial research only, as its authors state. Its labels were estimated by a model and checked by one
annotator: they are perceived attributes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from agr_ray.data.manifest import IMAGE_SUFFIXES, ParsedLabel, SourceRow, check_age
from agr_ray.labels import UTKFACE
from agr_ray.storage import Storage

UTKFACE_GENDERS: Final = ("male", "female")
"""By UTKFace's code, which is not the order of `labels.GENDERS`."""

EXPECTED_NAME: Final = "[age]_[gender]_[race]_[timestamp].jpg.chip.jpg"

# The timestamp is yyyymmddHHMMSS and a fraction of a second, in three digits or (rarely) more. ASCII only, because \d
# would match the digits of every script. The last label may be missing, and any may be empty or damaged.
_NAME = re.compile(r"([^_\s]*)_([^_\s]*)(?:_([^_\s]*))?_([0-9]{17,})\.jpg(?:\.chip\.jpg)?", re.ASCII)
_CODE = re.compile(r"[0-9]+", re.ASCII)


def parse_name(name: str) -> ParsedLabel:
    """Return the labels in a file name, or the error in it.

    If one label is missing or can't be read, only that label is dropped: many names lack the race. A name with a stray
    blank or dot, or with too short a timestamp, is rejected, because its labels may be damaged, too. Names of the
    uncropped images (`....jpg`) parse too.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return ParsedLabel(error=f"name does not parse: expected {EXPECTED_NAME}")
    texts = [match.group(index) or "" for index in (1, 2, 3)]
    errors = []
    age: float | None = None
    if not _CODE.fullmatch(texts[0]):
        errors.append(f"age {texts[0]!r} is not a number of years" if texts[0] else "the name lacks the age")
    elif error := check_age(float(texts[0])):
        errors.append(error)
    else:
        age = float(texts[0])
    gender = _word("gender", texts[1], UTKFACE_GENDERS, errors)
    race = _word("race", texts[2], UTKFACE.races, errors)
    dropped = "; ".join(errors) or None
    if age is None and gender is None and race is None:
        return ParsedLabel(error=dropped)
    return ParsedLabel(age=age, gender=gender, race=race, dropped=dropped)


def _word(label: str, code: str, words: Sequence[str], errors: list[str]) -> str | None:
    """Return the word that a code means; if it is invalid, append the error and return None."""
    if not code:
        errors.append(f"the name lacks the {label}")
    elif _CODE.fullmatch(code) and int(code) < len(words):
        return words[int(code)]
    else:
        codes = ", ".join(f"{number} ({word})" for number, word in enumerate(words))
        errors.append(f"{label} {code} is not understood: expected one of {codes}")
    return None


def source_rows(storage: Storage, uri: str) -> Iterator[SourceRow]:
    """Yield a row for each image (`IMAGE_SUFFIXES`) below `uri`, subfolders included.

    Raises:
        StorageUnavailable: the folder or bucket can't be listed.
    """
    for info in storage.list_readable(uri, IMAGE_SUFFIXES):
        yield SourceRow.listed(info, parse_name(info.key.rpartition("/")[2]))

"""Parse the values of a label table. A value that can't be read is dropped; the others are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agr_ray.config import MISSING_VALUES
from agr_ray.data.manifest import ParsedLabel, check_age
from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS, LabelSpace
from agr_ray.schema import SPLITS

Years = tuple[float, float]
"""First and last year of a range; an exact age is both."""

_NUMBER = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_DASH = "[-\u2010-\u2015\u2212~]"
_AGE = re.compile(rf"[+-]?{_NUMBER}(?:e[+-]?[0-9]+)?")
_UNIT = re.compile(r"(?<=[0-9]) ?(?:years?(?: old| of age)?|yrs?|y)$")
_RANGES = (
    re.compile(rf"[(\[] ?{_NUMBER} ?(?:[,;]|{_DASH}) ?{_NUMBER} ?[)\]]"),
    re.compile(rf"(?:(?:from|between) )?{_NUMBER} ?(?:{_DASH}|to|and) ?{_NUMBER}"),
)
_AT_LEAST = (
    re.compile(rf"(?:more than|over|above|older than|at least|from|>|>=|≥) ?{_NUMBER}"),
    re.compile(rf"{_NUMBER} ?(?:\+|plus|(?:or|and) (?:more|over|older|above|up))"),
)
_AT_MOST = (
    re.compile(rf"(?:less than|under|below|younger than|at most|up to|<|<=|≤) ?{_NUMBER}"),
    re.compile(rf"{_NUMBER} ?(?:or|and) (?:less|fewer|under|younger|below)"),
)
_FOLD = re.compile(r"[0-9]{1,4}", re.ASCII)
_GENDER_LETTERS: Final = {"m": "male", "f": "female"}
_WHOLE_FLOAT = re.compile(r"^([+-]?[0-9]+)\.0*$")


class LabelCodeError(ValueError):
    """A code stands for a class that does not exist, or for two classes. The message is one line."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A value that was given and could not be used."""

    column: str
    text: str
    error: str


@dataclass(frozen=True, slots=True)
class RowLabels:
    """The labels of one row of the table."""

    years: Years | None
    gender: str | None
    race: str | None
    subject: str | None
    split: str | None
    dropped: tuple[Dropped, ...]
    fold: int | None = None


def unreadable_row(text: str, error: str) -> RowLabels:
    """Return the labels of a row that can't be read at all: there are none, so its image gets the status bad_label."""
    return RowLabels(None, None, None, None, None, (Dropped("row", text, error),))


class LabelParser:
    """Reads the values of label rows.

    Words and codes are matched regardless of case and outer blanks, and a code written as a float (1.0) matches the
    whole number. The letters m and f mean male and female, unless they are configured otherwise. Other codes, such as 0
    for a gender, only have a meaning if they are configured.
    """

    def __init__(
        self,
        space: LabelSpace,
        gender_codes: Mapping[str, str] | None = None,
        race_codes: Mapping[str, str] | None = None,
        missing_values: Iterable[str] = MISSING_VALUES,
    ) -> None:
        """Raise LabelCodeError if a code is invalid."""
        self._words = {
            "gender": _meanings("gender", space.genders, gender_codes),
            "race": _meanings("race", space.races, race_codes),
            "split": _meanings("split", SPLITS, None),
        }
        for letter, word in _GENDER_LETTERS.items():
            if word in space.genders:
                self._words["gender"].setdefault(letter, word)
        self._missing = {_without_blanks(value) for value in missing_values} | {""}

    def parse(self, row: Mapping[str, str | None]) -> RowLabels:
        """Return the values of the row that can be read, and those that were dropped."""
        dropped: list[Dropped] = []
        years = self._years(row, dropped)
        gender, race, split = (self._word(name, row.get(name), dropped) for name in ("gender", "race", "split"))
        subject = self._given(row.get("subject"))
        # pandas may have written a subject's number as a float.
        subject = _WHOLE_FLOAT.sub(r"\1", subject.strip()) if subject else None
        fold = self._fold(row, dropped)
        return RowLabels(years, gender, race, subject, split, tuple(dropped), fold)

    def _fold(self, row: Mapping[str, str | None], dropped: list[Dropped]) -> int | None:
        text = self._given(row.get("fold"))
        if text is None:
            return None
        plain = _plain(text)
        if _FOLD.fullmatch(plain):
            return int(plain)
        dropped.append(Dropped("fold", text, f"fold {text!r} is not a number from 0 to 9999"))
        return None

    def _given(self, text: str | None) -> str | None:
        """Return the text of a value, or None for a missing one."""
        return None if text is None or _without_blanks(text) in self._missing else text

    def _word(self, column: str, text: str | None, dropped: list[Dropped]) -> str | None:
        meanings = self._words[column]
        if not meanings:  # a label space without races
            return None
        word = None if text is None else meanings.get(_plain(text))
        # A code takes precedence over a missing value, because some sources use -1 for a class.
        if word is None and (given := self._given(text)) is not None:
            error = f"{column} {given!r} is not understood: expected one of {', '.join(meanings)}"
            dropped.append(Dropped(column, given, error))
        return word

    def _years(self, row: Mapping[str, str | None], dropped: list[Dropped]) -> Years | None:
        text = self._given(row.get("age"))
        age = None if text is None else _parse_years("age", text)
        low, high = (self._given(row.get(name)) for name in ("age_low", "age_high"))
        limits = _parse_limits(low, high)
        for value in (age, limits):
            if isinstance(value, Dropped):
                dropped.append(value)
        exact, limits = (None if isinstance(value, Dropped) else value for value in (age, limits))
        if exact is None or limits is None:
            return exact or limits
        years = common_years(exact, limits)
        if years is None:
            error = f"age {show_years(exact)} contradicts age_low and age_high, {show_years(limits)}"
            dropped.append(Dropped("age", text or "", error))
        return years


def merge_labels(rows: Sequence[RowLabels]) -> ParsedLabel:
    """Return the labels of an image with one row or several.

    Identical rows count once, and rows may complement each other. The result is an error if rows contradict each other,
    or if values were dropped and no label is left or the split is among them.
    """
    dropped = list(dict.fromkeys(each.error for row in rows for each in row.dropped))
    years: Years | None = None
    contradictions = []
    for given in [row.years for row in rows if row.years is not None]:
        common = given if years is None else common_years(years, given)
        if common is None and years is not None:
            contradictions.append(f"age is {show_years(years)} and {show_years(given)}")
            break
        years = common
    words: dict[str, Any] = {}
    for column in ("gender", "race", "subject", "split", "fold"):
        values = list(dict.fromkeys(value for row in rows if (value := getattr(row, column)) is not None))
        words[column] = values[0] if values else None
        if len(values) > 1:
            contradictions.append(f"{column} is {values[0]!r} and {values[1]!r}")
    if contradictions:
        return ParsedLabel(error=f"{len(rows)} label rows disagree: {'; '.join((*contradictions, *dropped))}")
    has_label = years is not None or words["gender"] is not None or words["race"] is not None
    # An image whose split or fold can't be read must not be put into another one.
    if dropped and (not has_label or any(each.column in ("split", "fold") for row in rows for each in row.dropped)):
        return ParsedLabel(error="; ".join(dropped))
    is_exact = years is not None and years[0] == years[1]
    return ParsedLabel(
        age=years[0] if years and is_exact else None,
        gender=words["gender"],
        race=words["race"],
        subject=words["subject"],
        split=words["split"],
        fold=words["fold"],
        age_low=years[0] if years and not is_exact else None,
        age_high=years[1] if years and not is_exact else None,
        dropped="; ".join(dropped) or None,
    )


def common_years(one: Years, other: Years) -> Years | None:
    """Return the age that two values agree on: equal values, or the exact age within the other's range."""
    if one == other:
        return one
    for exact, years in ((one, other), (other, one)):
        if exact[0] == exact[1] and years[0] <= exact[0] <= years[1]:
            return exact
    return None


def show_years(years: Years) -> str:
    """Return the age or range as text."""
    return f"{years[0]:g}" if years[0] == years[1] else f"{years[0]:g} to {years[1]:g}"


def _parse_limits(low: str | None, high: str | None) -> Years | Dropped | None:
    """Return the range of age_low and age_high; a missing end is open."""
    if low is None and high is None:
        return None
    ends = []
    for column, text, open_end in (("age_low", low, AGE_MIN_YEARS), ("age_high", high, AGE_MAX_YEARS)):
        if text is None:
            ends.append(open_end)
        elif not _AGE.fullmatch(_plain(text)):
            return Dropped(column, text, f"{column} {text!r} is not a number of years")
        elif error := check_age(float(text)):
            return Dropped(column, text, f"{column}: {error}")
        else:
            ends.append(float(text))
    if ends[0] > ends[1]:
        return Dropped("age_low", low or "", f"age_low {ends[0]:g} is above age_high {ends[1]:g}")
    return ends[0], ends[1]


def _parse_years(column: str, text: str) -> Years | Dropped:
    """Return the age or range that a text such as 31, 25-32, (25, 32), 70+ or more than 70 means."""
    plain = _UNIT.sub("", " ".join(text.split()).casefold())
    ends: Years | None = None
    if _AGE.fullmatch(plain):
        ends = float(plain), float(plain)
    elif match := _first_match(_RANGES, plain):
        ends = float(match[1]), float(match[2])
    elif match := _first_match(_AT_LEAST, plain):
        ends = float(match[1]), AGE_MAX_YEARS
    elif match := _first_match(_AT_MOST, plain):
        ends = AGE_MIN_YEARS, float(match[1])
    if ends is None:
        return Dropped(column, text, f"{column} {text!r} is not a number or a range of years")
    if error := check_age(ends[0]) or check_age(ends[1]):
        return Dropped(column, text, error)
    if ends[0] > ends[1]:
        return Dropped(column, text, f"{column} {text!r} is a range that ends before it begins")
    return ends


def _first_match(patterns: Iterable[re.Pattern[str]], text: str) -> re.Match[str] | None:
    return next((match for pattern in patterns if (match := pattern.fullmatch(text))), None)


def _meanings(column: str, words: Sequence[str], codes: Mapping[str, str] | None) -> dict[str, str]:
    """Return the word for each spelling."""
    meanings = {word: word for word in words}
    for code, word in (codes or {}).items():
        if word not in words:
            raise LabelCodeError(f"{column} code {code!r} means {word!r}: expected one of {', '.join(words)}")
        if meanings.setdefault(_plain(code), word) != word:
            raise LabelCodeError(f"{column} code {code!r} means {word!r} and {meanings[_plain(code)]!r}: leave one out")
    return meanings


def _plain(text: str) -> str:
    """Return a word or code in lower case, without outer blanks and the .0 of a float."""
    plain = " ".join(text.split()).casefold()
    match = _WHOLE_FLOAT.fullmatch(plain)
    return match[1] if match else plain


def _without_blanks(text: str) -> str:
    return "".join(_plain(text).split())

"""Label spaces: the genders, races and age groups of a data set and of the checkpoints trained on it.

Tables hold labels as words; arrays and tensors hold their index in the label space. A missing label is null in a table,
and NaN (ages) or -1 (classes) in an array.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from agr_ray.schema import ABSTAINED

GENDERS: Final = ("female", "male")
"""In every label space, in this order: the sigmoid of the gender logit is the probability of the second."""

AGE_MIN_YEARS: Final = 0.0
AGE_MAX_YEARS: Final = 116.0
"""Ages below the minimum or above the maximum, which is UTKFace's, are rejected."""

AGE_MISSING: Final = float("nan")
CLASS_MISSING: Final = -1

IntArray = NDArray[np.int64]

_GROUP: Final = re.compile(r"(\d+)(?:-(\d+)|(\+))")


@dataclass(frozen=True)
class LabelSpace:
    """Classes in the order of their tensor codes. Spaces with the same classes in the same order are equal."""

    name: str = field(compare=False)
    """Name in messages: a built-in space, or `custom`."""
    races: tuple[str, ...]
    """Empty: the data set has no race labels."""
    age_groups: tuple[str, ...]
    """Names such as `3-9` (both years included) and `70+`, in ascending order. There may be gaps between groups."""
    genders: tuple[str, ...] = GENDERS

    def __post_init__(self) -> None:
        """Check the classes.

        Raises:
            ValueError: a class occurs twice, is empty or has the name `schema.ABSTAINED`, there are too few classes,
                or the age groups are malformed, overlap or are not ascending.
        """
        if self.genders != GENDERS:
            raise ValueError(f"genders must be {' and '.join(GENDERS)}, in this order, not {list(self.genders)}")
        for what, names in (("races", self.races), ("age_groups", self.age_groups)):
            repeated = sorted({each for each in names if names.count(each) > 1})
            if repeated or not all(each.strip() == each and each for each in names):
                raise ValueError(f"{what} must be distinct, non-empty names, not {list(names)}")
            if ABSTAINED in names:
                raise ValueError(
                    f"{what} must not have a class {ABSTAINED}: tables mark uncertain faces with that word"
                )
        if len(self.races) == 1:
            raise ValueError(f"races must have at least two classes, or none, not {list(self.races)}")
        if len(self.age_groups) < 2:
            raise ValueError(f"age_groups must have at least two groups, not {list(self.age_groups)}")
        for (before, (_, high)), (group, (low, _)) in zip(self._ranges[:-1], self._ranges[1:], strict=True):
            if low <= high:
                raise ValueError(f"age_groups must ascend without overlap: {group} follows {before}")

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Return the classes of each attribute: age_group, gender, race; race is left out if there are none."""
        classes = {"age_group": self.age_groups, "gender": self.genders, "race": self.races}
        return {attribute: names for attribute, names in classes.items() if names}

    @property
    def age_ranges_years(self) -> tuple[tuple[int, int], ...]:
        """Return the first and last year of each age group; an open group ends at `AGE_MAX_YEARS`."""
        return tuple(span for _, span in self._ranges)

    @property
    def _ranges(self) -> list[tuple[str, tuple[int, int]]]:
        return [(name, group_years(name)) for name in self.age_groups]

    def age_group(self, ages_years: NDArray[np.floating[Any]]) -> IntArray:
        """Return the index of each age's group, (n,) int64; -1 for NaN.

        An age between two groups is in the nearer one, or halfway between them, in the upper one: 10.5 years are in
        11-20, not in 0-10.
        """
        ranges = self.age_ranges_years
        edges = [(high + low) / 2 for (_, high), (low, _) in itertools.pairwise(ranges)]
        ages = np.asarray(ages_years, np.float64)
        groups = np.searchsorted(np.asarray(edges), ages, side="right").astype(np.int64)
        return np.where(np.isnan(ages), CLASS_MISSING, groups)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as meta.json and prepare.json hold them under `label_space`."""
        return {
            "name": self.name,
            "genders": list(self.genders),
            "races": list(self.races),
            "age_groups": list(self.age_groups),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from the result of `to_json`.

        Raises:
            ValueError: a key is missing or unknown, or the classes are invalid.
        """
        expected = ["age_groups", "genders", "name", "races"]
        if sorted(values) != expected:
            raise ValueError(f"expected the keys {expected}, found {sorted(values)}")
        for key in ("age_groups", "genders", "races"):
            if not isinstance(values[key], list) or not all(isinstance(each, str) for each in values[key]):
                raise ValueError(f"{key} must be a list of names, not {values[key]!r}")
        classes = {key: tuple(values[key]) for key in expected if key != "name"}
        return cls(name=str(values["name"]), **classes)


@dataclass(frozen=True, eq=False)
class Labels:
    """True labels of n images."""

    space: LabelSpace
    """Gives the codes below their meaning."""
    age: NDArray[np.float32]
    """(n,) years; NaN: missing, or known as a range only."""
    gender: IntArray
    """(n,) index in `space.genders`; -1: missing."""
    race: IntArray
    """(n,) index in `space.races`; -1: missing."""
    age_low: NDArray[np.float32] | None = None
    """(n,) first year of the age range; NaN: no range is given. None: no row has a range."""
    age_high: NDArray[np.float32] | None = None
    """(n,) last year of the range; NaN or None with `age_low`."""

    def __len__(self) -> int:
        return len(self.age)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return age, gender, race, age_low and age_high, (n,) each; without ranges, the last two are all NaN."""
        none = np.full(len(self), AGE_MISSING, np.float32)
        low, high = (none if ends is None else ends for ends in (self.age_low, self.age_high))
        return {"age": self.age, "gender": self.gender, "race": self.race, "age_low": low, "age_high": high}

    @classmethod
    def from_arrays(cls, space: LabelSpace, arrays: Mapping[str, NDArray[Any]]) -> Labels:
        """Rebuild from `arrays`, or from arrays without age_low and age_high; other keys are ignored."""
        age, low, high = (
            np.asarray(arrays[name], np.float32) if name in arrays else None for name in ("age", "age_low", "age_high")
        )
        assert age is not None
        gender, race = (np.asarray(arrays[name], np.int64) for name in ("gender", "race"))
        return cls(space, age, gender, race, low, high)

    def take(self, rows: NDArray[Any] | slice) -> Labels:
        """Return some of the rows, by a mask or by indices."""
        low, high = (None if ends is None else ends[rows] for ends in (self.age_low, self.age_high))
        return Labels(self.space, self.age[rows], self.gender[rows], self.race[rows], low, high)

    @property
    def age_range(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the first and last year of each age, (n,) float64; both are the age if it is exact. NaN: missing."""
        exact = self.age.astype(np.float64)
        if self.age_low is None or self.age_high is None:
            return exact, exact
        is_exact = np.isfinite(exact)
        return np.where(is_exact, exact, self.age_low), np.where(is_exact, exact, self.age_high)

    @property
    def age_group(self) -> IntArray:
        """Return the index of each row's age group, (n,) int64; -1: missing, or a range that spans several groups.

        A range has a group only if all its ages are in that group.
        """
        first, last = (self.space.age_group(ends) for ends in self.age_range)
        return np.where(first == last, first, CLASS_MISSING)


def group_years(name: str) -> tuple[int, int]:
    """Return the first and last year of an age group's name.

    Raises:
        ValueError: the name is neither `LOW-HIGH` nor `LOW+`, or the range is empty or beyond `AGE_MAX_YEARS`.
    """
    parts = _GROUP.fullmatch(name)
    if parts is None:
        raise ValueError(f"an age group is LOW-HIGH or LOW+ in whole years, such as 3-9 or 70+, not {name!r}")
    low = int(parts[1])
    high = int(AGE_MAX_YEARS) if parts[3] else int(parts[2])
    if not low <= high <= AGE_MAX_YEARS:
        raise ValueError(f"age group {name!r} must ascend and end at {AGE_MAX_YEARS:g} or below")
    return low, high


UTKFACE: Final = LabelSpace(
    name="utkface",
    races=("white", "black", "asian", "indian", "others"),
    age_groups=("0-10", "11-20", "21-30", "31-40", "41-50", "51-60", "61-70", "71-80", "81+"),
)
"""Races in the order of the paper (equation 9, table 4) and of UTKFace; age groups of the paper's table 5."""

FAIRFACE: Final = LabelSpace(
    name="fairface",
    races=("white", "black", "latino_hispanic", "east_asian", "southeast_asian", "indian", "middle_eastern"),
    age_groups=("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "70+"),
)
"""Karkkainen and Joo, "FairFace: Face Attribute Dataset for Balanced Race, Gender, and Age", WACV 2021."""

ADIENCE: Final = LabelSpace(
    name="adience",
    races=(),
    age_groups=("0-2", "4-6", "8-13", "15-20", "25-32", "38-43", "48-53", "60-100"),
)
"""Eidinger, Enbar and Hassner, "Age and Gender Estimation of Unfiltered Faces", IEEE TIFS 2014."""

MORPH2: Final = LabelSpace(
    name="morph2",
    races=("white", "black", "asian", "hispanic", "others"),
    age_groups=("0-19", "20-29", "30-39", "40-49", "50+"),
)
"""Ricanek and Tesafaye, "MORPH: A Longitudinal Image Database of Normal Adult Age-Progression", FG 2006. Age groups are
those of its tables; nobody is younger than 15."""

FGNET: Final = LabelSpace(
    name="fgnet",
    races=(),
    age_groups=("0-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60+"),
)
"""Lanitis, Taylor and Cootes, "Toward Automatic Simulation of Aging Effects on Face Images", IEEE TPAMI 2002. Decades,
by which errors on it are usually reported; it has no race labels."""

SPACES: Final[Mapping[str, LabelSpace]] = {space.name: space for space in (UTKFACE, FAIRFACE, ADIENCE, MORPH2, FGNET)}
"""The built-in label spaces by name."""

RACE_MAPPINGS: Final[Mapping[tuple[str, str], Mapping[str, str]]] = {
    ("fairface", "utkface"): {
        "white": "white",
        "black": "black",
        "latino_hispanic": "others",
        "east_asian": "asian",
        "southeast_asian": "asian",
        "indian": "indian",
        "middle_eastern": "others",
    },
    ("morph2", "utkface"): {
        "white": "white",
        "black": "black",
        "asian": "asian",
        "hispanic": "others",
    },
}
"""(from, to) -> the race of `to` for each race of `from`; a race that is left out becomes a missing label.
UTKFace's `others` includes Hispanic, Latino and Middle Eastern. MORPH II does not say who its `others` are: they may be
Indian, which is a class of UTKFace's."""


def race_mapping(source: LabelSpace, target: LabelSpace) -> dict[str, str]:
    """Return the target's race for each race of the source.

    Two spaces with the same names, in any order, map by name. Otherwise equal names may mean different people: the
    `others` of a space with two races are not those of UTKFace. If one of the spaces has no races, the mapping is
    empty, and all rows lose the label.

    Raises:
        ValueError: `RACE_MAPPINGS` has no table for these two spaces; one line.
    """
    if not source.races or not target.races:
        return {}
    names = set(source.races), set(target.races)
    if names[0] == names[1]:
        return {race: race for race in source.races}
    for (start, end), mapping in RACE_MAPPINGS.items():
        if names == (set(SPACES[start].races), set(SPACES[end].races)):
            return dict(mapping)
    known = ", ".join(f"{start} onto {end}" for start, end in RACE_MAPPINGS)
    raise ValueError(
        f"the races of {source.name} ({', '.join(source.races)}) do not map onto those of {target.name} "
        f"({', '.join(target.races)}); known mappings: {known}"
    )

"""Label spaces."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from agr_ray.labels import ADIENCE, FAIRFACE, RACE_MAPPINGS, SPACES, UTKFACE, LabelSpace


def test_ages_are_put_into_the_group_that_holds_their_whole_years() -> None:
    ages = np.array([0.0, 10.0, 10.4, 10.5, 20.49, 20.5, 80.0, 80.5, 116.0])
    assert UTKFACE.age_group(ages).tolist() == [0, 0, 0, 1, 1, 2, 7, 8, 8]
    assert FAIRFACE.age_group(np.array([2.4, 2.5, 9.0, 9.5, 69.5, 100.0])).tolist() == [0, 1, 1, 2, 8, 8]


def test_an_age_between_two_groups_is_in_the_nearer() -> None:
    assert ADIENCE.age_ranges_years[-1] == (60, 100)
    assert ADIENCE.age_group(np.array([2.9, 3.0, 7.0, 22.4, 22.5, 35.0, 56.4, 56.5, 110.0])).tolist() == [
        0, 1, 2, 3, 4, 5, 6, 7, 7,
    ]  # fmt: skip


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_a_space_survives_json(space: LabelSpace) -> None:
    assert LabelSpace.from_json(json.loads(json.dumps(space.to_json()))) == space


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"races": ("a", "b", "a")}, "races must be distinct"),
        ({"races": ("a", "")}, "races must be distinct, non-empty"),
        ({"races": ("a",)}, "two classes at least"),
        ({"genders": ("male", "female")}, "genders must be female and male, in this order"),
        ({"age_groups": ("0-10", "10-20")}, "10-20 follows 0-10"),
        ({"age_groups": ("11-20", "0-10")}, "0-10 follows 11-20"),
        ({"age_groups": ("0-10",)}, "two groups at least"),
        ({"age_groups": ("0-10", "eleven")}, "LOW-HIGH or LOW\\+.*'eleven'"),
        ({"age_groups": ("10-0", "11+")}, "'10-0' must ascend"),
        ({"age_groups": ("0-10", "11-200")}, "end at 116"),
    ],
)
def test_unusable_classes_are_rejected(change: dict[str, Any], message: str) -> None:
    values = {"name": "custom", "races": UTKFACE.races, "age_groups": UTKFACE.age_groups, **change}
    with pytest.raises(ValueError, match=message):
        LabelSpace(**values)


def test_each_mapping_covers_its_source_and_stays_in_its_target() -> None:
    for (source, target), mapping in RACE_MAPPINGS.items():
        assert tuple(mapping) == SPACES[source].races
        assert set(mapping.values()) <= set(SPACES[target].races)

"""Label spaces."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from agr_ray.config import LabelsConfig
from agr_ray.labels import ADIENCE, FAIRFACE, RACE_MAPPINGS, SPACES, UTKFACE, Labels, LabelSpace, race_mapping


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
    again = LabelSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert (again, again.name) == (space, space.name)


@pytest.mark.parametrize("races", ["white", {"white": 1, "black": 2}, ["white", 1], None])
def test_classes_that_are_not_a_list_of_names_are_rejected(races: object) -> None:
    with pytest.raises(ValueError, match="races must be a list of names, not "):
        LabelSpace.from_json(UTKFACE.to_json() | {"races": races})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"races": ("a", "b", "a")}, "races must be distinct"),
        ({"races": ("a", "")}, "races must be distinct, non-empty"),
        ({"races": ("a",)}, "at least two classes"),
        ({"races": ("a", "abstained")}, "races must not have a class abstained"),
        ({"genders": ("male", "female")}, "genders must be female and male, in this order"),
        ({"age_groups": ("0-10", "10-20")}, "10-20 follows 0-10"),
        ({"age_groups": ("11-20", "0-10")}, "0-10 follows 11-20"),
        ({"age_groups": ("0-10",)}, "at least two groups"),
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
        left_out = {"others"} if source == "morph2" else set()  # MORPH II does not say who they are
        assert [race for race in SPACES[source].races if race not in left_out] == [*mapping]
        assert set(mapping.values()) <= set(SPACES[target].races)


def ranged() -> Labels:
    """Return an exact age, a range within a group, one across groups, an open one, and a missing age."""
    age = np.array([30, np.nan, np.nan, np.nan, np.nan], np.float32)
    low, high = (np.array(ends, np.float32) for ends in ([25, 50, 38, 70, np.nan], [32, 59, 48, 116, np.nan]))
    return Labels(FAIRFACE, age, np.array([0, 1, 1, -1, 0]), np.array([6, 2, -1, 0, 0]), low, high)


def test_a_range_is_in_the_group_that_contains_it_or_in_none() -> None:
    groups = ranged().age_group.tolist()
    assert groups == [FAIRFACE.age_groups.index("30-39"), FAIRFACE.age_groups.index("50-59"), -1, 8, -1]


def test_labels_survive_conversion_to_arrays() -> None:
    again = Labels.from_arrays(FAIRFACE, ranged().take(slice(1, 4)).arrays)
    for name, values in ranged().arrays.items():
        np.testing.assert_array_equal(again.arrays[name], values[1:4])


def test_races_map_by_the_table_by_name_or_not_at_all() -> None:
    assert race_mapping(FAIRFACE, UTKFACE)["middle_eastern"] == "others"
    swapped = dataclasses.replace(UTKFACE, name="custom", races=UTKFACE.races[::-1])
    assert race_mapping(UTKFACE, swapped) == {race: race for race in UTKFACE.races}
    assert race_mapping(ADIENCE, UTKFACE) == race_mapping(UTKFACE, ADIENCE) == {}
    with pytest.raises(ValueError, match=r"the races of utkface .* do not map onto those of fairface .*fairface onto"):
        race_mapping(UTKFACE, FAIRFACE)


def test_a_mapping_applies_to_its_classes_in_any_order() -> None:
    turned = dataclasses.replace(FAIRFACE, name="custom", races=FAIRFACE.races[::-1])
    assert race_mapping(turned, UTKFACE) == RACE_MAPPINGS["fairface", "utkface"]


def test_one_name_among_other_races_is_not_the_same_race() -> None:
    two = dataclasses.replace(UTKFACE, name="custom", races=("white", "others"))  # whose others are black, too
    for source, target in ((two, UTKFACE), (UTKFACE, two)):
        with pytest.raises(ValueError, match="do not map"):
            race_mapping(source, target)


def test_spaces_with_the_same_classes_are_equal_whatever_their_names() -> None:
    assert LabelsConfig(races=UTKFACE.races).label_space == UTKFACE
    assert dataclasses.replace(UTKFACE, races=UTKFACE.races[::-1]) != UTKFACE


def test_classes_without_races_are_age_groups_and_genders() -> None:
    assert list(ADIENCE.classes) == ["age_group", "gender"]
    assert list(FAIRFACE.classes) == ["age_group", "gender", "race"]


def test_a_recipe_defines_its_own_classes() -> None:
    assert LabelsConfig().label_space is None
    assert LabelsConfig(space="adience").label_space == ADIENCE
    own = LabelsConfig(races=(), age_groups=("0-17", "18+")).label_space
    assert own is not None
    assert (own.name, own.races, own.age_groups) == ("custom", (), ("0-17", "18+"))
    with pytest.raises(ValueError, match="at least two classes, or none"):
        LabelsConfig(races=("a",))

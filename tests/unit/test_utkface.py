"""UTKFace's names, and the manifest of a folder of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from manifests import read_manifest

from agr_ray.data.manifest import content_hash, image_id
from agr_ray.data.sources.utkface import parse_name, source_rows
from agr_ray.schema import MANIFEST
from agr_ray.storage import Storage

STAMP = "20170116174525125"
END = f"_{STAMP}.jpg.chip.jpg"


def manifest_rows(folder: Path) -> dict[str, dict[str, object]]:
    storage = Storage()
    table = read_manifest(source_rows(storage, str(folder)), source="utkface", storage=storage)
    assert table.schema.equals(MANIFEST)
    return {row["key"]: row for row in table.to_pylist()}


@pytest.mark.parametrize(("code", "word"), enumerate(["male", "female"]))
def test_gender_codes_are_utkfaces(code: int, word: str) -> None:
    assert parse_name(f"30_{code}_0{END}").gender == word


@pytest.mark.parametrize(("code", "word"), enumerate(["white", "black", "asian", "indian", "others"]))
def test_race_codes_are_utkfaces(code: int, word: str) -> None:
    assert parse_name(f"30_0_{code}{END}").race == word


@pytest.mark.parametrize("age", [0, 1, 116])
def test_ages_at_the_ends_of_the_range_are_kept(age: int) -> None:
    assert parse_name(f"{age}_0_0{END}").age == age


def test_a_longer_fraction_of_a_second_parses() -> None:
    assert parse_name("28_1_2_201701161846515488.jpg.chip.jpg").error is None


@pytest.mark.parametrize(
    "name",
    [
        f"24_0_1_{STAMP} .jpg.chip.jpg",  # a stray blank
        f" 24_0_1{END}",
        f"24_0_1{END}\n",
        f"55_0_0_{STAMP}jpg.chip.jpg",  # a dot missing
        f"55_0_0_{STAMP}.jpg.chip.jpeg",
        "14_0_0_2017011022340900.jpg.chip.jpg",  # a digit of the timestamp missing
        f"39{END}",
        "photo.jpg",
        "",
    ],
)
def test_damaged_names_are_rejected_with_the_expected_form(name: str) -> None:
    label = parse_name(name)

    assert label.error == "name does not parse: expected [age]_[gender]_[race]_[timestamp].jpg.chip.jpg"
    assert (label.age, label.gender, label.race) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "kept", "dropped"),
    [
        (f"39_1{END}", (39.0, "female", None), "the name lacks the race"),
        (f"39_1_{END}", (39.0, "female", None), "the name lacks the race"),
        (f"39__1{END}", (39.0, None, "black"), "the name lacks the gender"),
        (f"_0_1{END}", (None, "male", "black"), "the name lacks the age"),
        (f"130_0_0{END}", (None, "male", "white"), "age 130 is outside 0 to 116 years"),
        (f"-5_0_0{END}", (None, "male", "white"), "age '-5' is not a number of years"),
        (f"5.5_0_0{END}", (None, "male", "white"), "age '5.5' is not a number of years"),
        (f"٣_0_0{END}", (None, "male", "white"), "age '٣' is not a number of years"),  # a digit, but not of ASCII
        (f"30_2_0{END}", (30.0, None, "white"), "gender 2 is not understood: expected one of 0 (male), 1 (female)"),
        (
            f"30_0_5{END}",
            (30.0, "male", None),
            "race 5 is not understood: expected one of 0 (white), 1 (black), 2 (asian), 3 (indian), 4 (others)",
        ),
    ],
)
def test_only_a_missing_or_unreadable_label_is_dropped(name: str, kept: tuple[object, ...], dropped: str) -> None:
    label = parse_name(name)

    assert (label.age, label.gender, label.race, label.dropped, label.error) == (*kept, dropped, None)


def test_a_name_without_a_readable_label_is_rejected() -> None:
    assert parse_name(f"130_2{END}").error == (
        "age 130 is outside 0 to 116 years; gender 2 is not understood: expected one of 0 (male), 1 (female); "
        "the name lacks the race"
    )


def test_every_image_is_a_row_and_other_files_are_not(tmp_path: Path) -> None:
    good, bad = f"30_0_0{END}", f"30{END}"
    (tmp_path / "part1").mkdir()
    (tmp_path / "part1" / good).write_bytes(b"one")
    (tmp_path / bad).write_bytes(b"two")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "README.txt").write_bytes(b"x")

    rows = manifest_rows(tmp_path)

    assert {key: row["status"] for key, row in rows.items()} == {f"part1/{good}": "ok", bad: "bad_label"}
    row = rows[f"part1/{good}"]
    assert row["group_id"] == f"sha256:{content_hash(b'one')}"
    assert row["image_id"] == image_id(str(tmp_path / "part1" / good))
    assert (row["age"], row["gender"], row["race"], row["source"]) == (30.0, "male", "white", "utkface")
    reject = rows[bad]
    assert [reject[name] for name in ("age", "gender", "race", "split", "group_id")] == [None] * 5
    assert "name does not parse" in str(reject["error"])


def test_equal_content_is_one_group(tmp_path: Path) -> None:
    for name, data in ((f"30_0_0{END}", b"same"), (f"31_0_0{END}", b"same"), (f"32_0_0{END}", b"other")):
        (tmp_path / name).write_bytes(data)

    groups = [row["group_id"] for row in manifest_rows(tmp_path).values()]

    assert groups[0] == groups[1] != groups[2]


def test_the_manifest_is_sorted_by_key_whatever_the_order_of_rows(tmp_path: Path) -> None:
    for age in (9, 10, 100):
        (tmp_path / f"{age}_0_0{END}").write_bytes(bytes([age]))
    storage = Storage()
    rows = list(source_rows(storage, str(tmp_path)))

    one = read_manifest(rows, source="utkface", storage=storage)
    two = read_manifest(rows[::-1], source="utkface", storage=storage)

    assert one.equals(two)
    assert one.column("key").to_pylist() == sorted(one.column("key").to_pylist())


def test_an_empty_folder_gives_an_empty_manifest(tmp_path: Path) -> None:
    assert manifest_rows(tmp_path) == {}

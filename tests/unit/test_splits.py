"""Splits: no leaks, the right fractions, and no influence but groups, labels and seed."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest

from agr_ray.data.splits import (
    SplitLeakError,
    assign_splits,
    check_no_leak,
    contradicting_subjects,
    split_digest,
    split_manifest_text,
)
from agr_ray.labels import GENDERS, UTKFACE
from agr_ray.schema import MANIFEST

FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}
Row = dict[str, object]


def make_row(key: str, group: str | None, age: float | None = 30.0, **labels: object) -> Row:
    row: Row = dict.fromkeys(MANIFEST.names)
    row |= {"image_id": key, "uri": f"/data/{key}", "key": key, "source": "made", "group_id": group, "age": age}
    row |= {"gender": "female", "race": "white", "status": "ok"}
    return row | labels


def make_manifest(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def random_rows(num_groups: int = 3000, seed: int = 0) -> list[Row]:
    """Return rows with twins, strata from common to single, missing labels and rejects."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num_groups):
        age = None if rng.random() < 0.02 else float(min(116, round(rng.gamma(3, 11))))
        labels = {
            "gender": GENDERS[rng.integers(2)],
            "race": UTKFACE.races[rng.choice(5, p=[0.5, 0.2, 0.15, 0.12, 0.03])],
        }
        for twin in range(rng.choice([1, 2, 3], p=[0.94, 0.04, 0.02])):
            conflict = twin > 0 and rng.random() < 0.5
            rows.append(
                make_row(
                    f"{number}-{twin}.jpg",
                    f"sha256:{number:x}",
                    age,
                    **labels | ({"race": "others"} if conflict else {}),
                )
            )
        if rng.random() < 0.01:
            rows.append(make_row(f"{number}-bad.jpg", None, None, status="bad_label", error="age 130"))
    return rows


def stratum(row: Row) -> tuple[object, object, object]:
    return (None if row["age"] is None else int(row["age"]) // 10, row["gender"], row["race"])  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return random_rows()


@pytest.fixture(scope="module")
def assigned(rows: list[Row]) -> list[Row]:
    return list(assign_splits(make_manifest(rows), FRACTIONS, seed=1).to_pylist())


def test_no_group_has_two_splits(assigned: list[Row]) -> None:
    splits = defaultdict(set)
    for row in assigned:
        if row["group_id"] is not None:
            splits[row["group_id"]].add(row["split"])

    assert all(len(found) == 1 for found in splits.values())


def test_every_ok_row_has_a_split_and_no_reject_has(assigned: list[Row]) -> None:
    assert {row["split"] for row in assigned if row["status"] != "ok"} == {None}
    assert {row["split"] for row in assigned if row["status"] == "ok"} == {"train", "val", "test"}


def test_the_fractions_hold_overall(assigned: list[Row]) -> None:
    counts = Counter(row["split"] for row in assigned if row["split"])

    for split, fraction in FRACTIONS.items():
        assert counts[split] / counts.total() == pytest.approx(fraction, abs=0.005)


def test_the_fractions_hold_in_each_stratum_to_within_a_few_images(assigned: list[Row]) -> None:
    counts: dict[object, Counter[object]] = defaultdict(Counter)
    for row in assigned:
        if row["split"]:
            counts[stratum(row)][row["split"]] += 1

    for each in counts.values():
        assert abs(each["test"] - 0.1 * each.total()) < 6
    large = [each for each in counts.values() if each.total() >= 100]
    assert len(large) >= 5
    for each in large:
        assert each["test"] / each.total() == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0], ids=lambda share: f"{share:g} contradict")
@pytest.mark.parametrize("fractions", [(0.65, 0.2, 0.15), (0.55, 0.3, 0.15), (0.8, 0.1, 0.1), (0.1, 0.1, 0.8)], ids=str)
def test_the_fractions_hold_for_subjects_even_if_their_labels_contradict(
    fractions: tuple[float, float, float], share: float, size: int
) -> None:
    rng = np.random.default_rng(size)
    rows = []
    for number in range(1400 // size):
        labels = {"gender": GENDERS[rng.integers(2)], "race": UTKFACE.races[rng.integers(4)]}
        contradicts = rng.random() < share
        for each in range(size):
            other = {"race": "others"} if contradicts and each else {}
            rows.append(make_row(f"{number}-{each}", f"subject:{number}", float(rng.integers(90)), **labels | other))

    wanted = dict(zip(("train", "val", "test"), fractions, strict=True))
    counts = Counter(assign_splits(make_manifest(rows), wanted, seed=1)["split"].to_pylist())

    for split, fraction in wanted.items():
        assert counts[split] == pytest.approx(fraction * len(rows), abs=max(size, 0.01 * len(rows)))


def test_a_few_subjects_with_contradicting_labels_go_to_train_and_are_named() -> None:
    rows = [make_row(f"{number}-{each}", f"subject:{number}") for number in range(40) for each in "ab"]
    rows[0]["race"] = rows[5]["gender"] = None
    rows[2]["race"], rows[7]["gender"] = "asian", "male"

    table = assign_splits(make_manifest(rows), FRACTIONS, seed=1)

    splits = dict(zip(table["key"].to_pylist(), table["split"].to_pylist(), strict=True))
    assert [splits[key] for key in ("1-a", "1-b", "3-a", "3-b")] == ["train"] * 4
    assert contradicting_subjects(table) == [("1", ["1-a", "1-b"]), ("3", ["3-a", "3-b"])]


def test_strata_of_one_image_each_still_give_the_right_total() -> None:
    rows = [
        make_row(f"{age}{gender}{race}", f"g{age}{gender}{race}", float(age), gender=gender, race=race)
        for age in range(0, 100, 10)
        for gender in GENDERS
        for race in UTKFACE.races
    ]

    counts = Counter(assign_splits(make_manifest(rows), FRACTIONS, seed=3).column("split").to_pylist())

    assert counts == {"train": 80, "val": 10, "test": 10}


def test_conflicting_twins_are_only_in_train(assigned: list[Row]) -> None:
    labels, splits = defaultdict(set), defaultdict(set)
    for row in assigned:
        if row["status"] == "ok":
            labels[row["group_id"]].add((row["age"], row["gender"], row["race"]))
            splits[row["group_id"]].add(row["split"])
    conflicting = [group for group, found in labels.items() if len(found) > 1]

    assert len(conflicting) > 50
    assert {split for group in conflicting for split in splits[group]} == {"train"}


def test_agreeing_twins_are_in_every_split(assigned: list[Row]) -> None:
    sizes = Counter(row["group_id"] for row in assigned if row["status"] == "ok")
    labels = defaultdict(set)
    for row in assigned:
        labels[row["group_id"]].add(stratum(row))

    found = {row["split"] for row in assigned if sizes[row["group_id"]] > 1 and len(labels[row["group_id"]]) == 1}

    assert found == {"train", "val", "test"}


def test_without_a_train_part_conflicting_twins_are_left_out() -> None:
    rows = [make_row("a", "g", 30.0), make_row("b", "g", 31.0), make_row("c", "h")]

    table = assign_splits(make_manifest(rows), {"test": 1.0}, seed=0)

    assert table.column("split").to_pylist() == [None, None, "test"]


@pytest.mark.parametrize(("group", "expected"), [("subject:bo", "test"), ("conflict:subject:bo", None)])
def test_a_subject_may_have_several_ages_but_a_conflict_is_left_out(group: str, expected: str | None) -> None:
    rows = [make_row("a", group, 30.0), make_row("b", group, 51.0)]

    table = assign_splits(make_manifest(rows), {"test": 1.0}, seed=0)

    assert set(table.column("split").to_pylist()) == {expected}


def test_a_missing_label_does_not_conflict() -> None:
    rows = [make_row("a", "g", 30.0), make_row("b", "g", None)]

    assert set(assign_splits(make_manifest(rows), {"test": 1.0}, seed=0).column("split").to_pylist()) == {"test"}


def test_order_and_paths_do_not_matter(rows: list[Row], assigned: list[Row]) -> None:
    moved = [row | {"key": f"x/{row['key']}", "uri": f"s3://b/{row['key']}"} for row in rows]
    order = np.random.default_rng(5).permutation(len(moved))

    shuffled = assign_splits(make_manifest([moved[index] for index in order]), FRACTIONS, seed=1).to_pylist()

    assert {row["key"][2:]: row["split"] for row in shuffled} == {row["key"]: row["split"] for row in assigned}


def test_another_seed_gives_another_split_within_a_single_stratum() -> None:
    manifest = make_manifest([make_row(f"{number}", f"g{number}") for number in range(100)])

    one, two = (assign_splits(manifest, FRACTIONS, seed=seed).column("split").to_pylist() for seed in (1, 2))

    assert Counter(one) == Counter(two)
    assert one != two


def test_another_seed_gives_another_split(rows: list[Row], assigned: list[Row]) -> None:
    other = assign_splits(make_manifest(rows), FRACTIONS, seed=2).to_pylist()

    test = {row["key"] for row in assigned if row["split"] == "test"}
    other_test = {row["key"] for row in other if row["split"] == "test"}
    assert len(test & other_test) < 0.3 * len(test)


def test_a_sample_has_the_size_and_the_strata_of_the_whole(rows: list[Row]) -> None:
    table = assign_splits(make_manifest(rows), FRACTIONS, seed=1, sample=1000).to_pylist()

    drawn = [row for row in table if row["split"]]
    assert len(drawn) == 1000
    assert Counter(row["split"] for row in drawn)["test"] == pytest.approx(100, abs=5)
    whole = Counter(stratum(row) for row in rows if row["status"] == "ok")
    part = Counter(stratum(row) for row in drawn)
    for each, count in whole.items():
        assert abs(part[each] - count * 1000 / whole.total()) < 6
    check_no_leak(make_manifest(table))


def test_a_growing_manifest_keeps_its_sample_and_adds_images_until_it_is_full() -> None:
    rows = random_rows(num_groups=400)
    before = assign_splits(make_manifest(rows), FRACTIONS, seed=1, sample=300).to_pylist()
    drawn = {str(row["group_id"]): row["split"] is not None for row in before if row["status"] == "ok"}
    lost = next(row for row in before if row["split"] == "train" and list(drawn).count(str(row["group_id"])) == 1)
    kept = [row for row in before if row["group_id"] != lost["group_id"]]
    new = [make_row(f"new {number}", f"new {number}") for number in range(20)]

    after = assign_splits(make_manifest([*kept, *new]), FRACTIONS, seed=1, sample=300, drawn=drawn).to_pylist()

    split = {row["key"]: row["split"] for row in after}
    assert all(split[str(row["key"])] == row["split"] for row in kept)
    assert sum(each is not None for each in split.values()) == 300


def test_a_sample_larger_than_the_whole_takes_all(rows: list[Row], assigned: list[Row]) -> None:
    table = assign_splits(make_manifest(rows), FRACTIONS, seed=1, sample=10**6).to_pylist()

    assert [row["split"] for row in table] == [row["split"] for row in assigned]


def test_given_splits_are_kept_and_count_towards_the_fractions() -> None:
    rows = [make_row(f"{number}", f"g{number}", split="test" if number < 10 else None) for number in range(100)]

    splits = assign_splits(make_manifest(rows), FRACTIONS, seed=1).column("split").to_pylist()

    assert splits[:10] == ["test"] * 10
    assert Counter(splits) == {"train": 80, "val": 10, "test": 10}


def test_the_rest_of_a_group_gets_its_given_split() -> None:
    rows = [make_row("a", "g", split="val"), make_row("b", "g")]

    assert assign_splits(make_manifest(rows), FRACTIONS, seed=1).column("split").to_pylist() == ["val", "val"]


def test_conflicting_twins_given_to_test_are_left_out() -> None:
    rows = [make_row("a", "g", 30.0, split="test"), make_row("b", "g", 31.0, split="test")]

    assert assign_splits(make_manifest(rows), FRACTIONS, seed=1).column("split").to_pylist() == [None, None]


def test_a_group_with_two_splits_is_an_error_that_names_it() -> None:
    rows = [make_row("a", "subject:bo", split="train"), make_row("b", "subject:bo", split="test")]

    with pytest.raises(SplitLeakError, match=r"^a in train and b in test show the subject 'bo', or"):
        assign_splits(make_manifest(rows), FRACTIONS, seed=1)


def test_a_leak_is_found_and_named(assigned: list[Row]) -> None:
    check_no_leak(make_manifest(assigned))
    rows = [make_row("a", "g1", split="train"), make_row("b", "g1", split="val")]

    with pytest.raises(SplitLeakError, match=r"^a in train and b in val are the same image, byte for byte$"):
        check_no_leak(make_manifest(rows))


@pytest.mark.parametrize(
    ("fractions", "said"),
    [
        ({"train": 0.8, "val": 0.3}, "sum is 1.1"),
        ({"train": 1.2, "val": -0.2}, "between 0 and 1"),
        ({"train": 0.5, "dev": 0.5}, "keys dev: expected train, val, test"),
        ({"train": float("nan")}, "between 0 and 1"),
    ],
)
def test_impossible_fractions_are_rejected(fractions: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        assign_splits(make_manifest([make_row("a", "g")]), fractions, seed=0)


def test_a_split_without_a_fraction_gets_nothing(rows: list[Row]) -> None:
    table = assign_splits(make_manifest(rows), {"train": 0.9, "val": 0.0, "test": 0.1}, seed=1)

    assert set(table.column("split").to_pylist()) == {"train", "test", None}


def test_the_split_manifest_is_sorted_and_its_digest_independent_of_order() -> None:
    rows = [
        make_row("b\t1", "g2", split="test"),
        make_row("a", "g1", split="train"),
        make_row("c", None, status="bad_label"),
    ]

    text = split_manifest_text(make_manifest(rows))

    assert text == "g1\ta\ttrain\ng2\tb\\t1\ttest\n"
    assert split_digest(text) == split_digest(split_manifest_text(make_manifest(rows[::-1])))
    assert len(split_digest(text)) == 64


def test_an_empty_manifest_stays_empty() -> None:
    assert assign_splits(make_manifest([]), FRACTIONS, seed=1).num_rows == 0

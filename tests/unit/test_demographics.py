"""Counts of faces become shares, raw and corrected, for each breakdown of each group."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from agr_ray.labels import ADIENCE, FAIRFACE, GENDERS, UTKFACE, LabelSpace
from agr_ray.schema import ABSTAINED, DEMOGRAPHICS
from agr_ray.tables.demographics import demographics
from agr_ray.tables.suppression import suppress

SIZES = tuple(len(names) for names in UTKFACE.classes.values())
ATTRIBUTES = tuple(UTKFACE.classes)


CLASSES_OF_GENDER = {"gender": UTKFACE.genders}


def group_row(num_faces: int, **keys: Any) -> dict[str, Any]:
    counts = {"num_images": num_faces + 2, "num_no_face": 1, "num_rejected": 1, "num_faces": num_faces}
    return keys | counts | {"num_flagged": 0, "num_abstained": 0}


def cell(age_group: str | None, gender: str | None, race: str | None, n: int, **keys: Any) -> dict[str, Any]:
    return keys | {"age_group": age_group, "gender": gender, "race": race, "n": n}


def rows_of(table: pa.Table, breakdown: str, **values: Any) -> list[dict[str, Any]]:
    chosen = ({"breakdown": breakdown} | values).items()
    return [row for row in table.to_pylist() if all(row[name] == value for name, value in chosen)]


def said_of(truth: tuple[np.ndarray, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return a classifier's predictions: races are confused more often for men, and it abstains on unsure ones."""
    age, gender, race = truth
    moved = np.clip(age + rng.choice([-1, 0, 1], len(age), p=[0.14, 0.74, 0.12]), 0, SIZES[0] - 1)
    wrong = rng.random(len(age)) < np.array([0.05, 0.08])[gender]
    confused = rng.random(len(age)) < np.array([0.12, 0.12, 0.10, 0.25, 0.45])[race] * np.array([0.8, 1.2])[gender]
    other = np.array([4, 3, 0, 1, 0])[race]
    abstains = rng.random(len(age)) < np.where(confused, 0.35, 0.05)
    return {
        "age_group_pred": moved,
        "gender_pred": np.where(wrong & (rng.random(len(age)) < 0.4), -1, np.where(wrong, 1 - gender, gender)),
        "race_pred": np.where(abstains, -1, np.where(confused, other, race)),
    }


def drawn_truth(shares: np.ndarray, num_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return np.unravel_index(rng.choice(shares.size, num_rows, p=shares.ravel()), SIZES)


def calibration_rows(num_rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    truth = drawn_truth(np.full(SIZES, 1.0 / np.prod(SIZES)), num_rows, rng)
    return dict(zip(ATTRIBUTES, truth, strict=True)) | said_of(truth, rng)


def counted(said: dict[str, np.ndarray], **keys: Any) -> list[dict[str, Any]]:
    """Return the cells of faces."""
    codes = np.stack([said[f"{name}_pred"] for name in ATTRIBUTES], axis=1)
    outcomes, numbers = np.unique(codes, axis=0, return_counts=True)
    names = [(*labels, ABSTAINED) for labels in UTKFACE.classes.values()]  # -1: the last
    return [
        cell(*(labels[code] for labels, code in zip(names, outcome, strict=True)), int(n), **keys)
        for outcome, n in zip(outcomes.tolist(), numbers, strict=True)
    ]


def test_faces_are_counted_by_each_attribute_and_by_all() -> None:
    cells = [
        cell("0-10", "female", "asian", 3),
        cell("0-10", ABSTAINED, "asian", 2),
        cell("21-30", "male", ABSTAINED, 4),
        cell("21-30", "male", "white", 1),
    ]

    table = demographics(pa.Table.from_pylist(cells), pa.Table.from_pylist([group_row(12)]), None, UTKFACE.classes)

    assert table.schema.equals(DEMOGRAPHICS)
    assert table.num_rows == sum(SIZES) + np.prod(SIZES)
    by_gender = [(row["gender"], row["n"], row["share"], row["num_abstained"]) for row in rows_of(table, "gender")]
    assert by_gender == [("female", 3, 0.375, 2), ("male", 5, 0.625, 2)]
    assert [(row["n"], row["share"]) for row in rows_of(table, "age_group", age_group="0-10")] == [(5, 0.5)]
    assert [row["n"] for row in rows_of(table, "race")] == [1, 0, 5, 0, 0]
    joint = {(row["age_group"], row["gender"], row["race"]): row for row in rows_of(table, ",".join(ATTRIBUTES))}
    assert list(joint) == list(product(UTKFACE.age_groups, GENDERS, UTKFACE.races))
    assert {key: (row["n"], row["share"]) for key, row in joint.items() if row["n"]} == {
        ("0-10", "female", "asian"): (3, 0.75),
        ("21-30", "male", "white"): (1, 0.25),
    }
    assert {(row["num_abstained"], row["num_images"], row["num_no_face"]) for row in joint.values()} == {(6, 14, 1)}
    assert set(table["correction"].to_pylist()) == {"no calibration"}
    assert table["share_corrected"].null_count == table.num_rows


def test_corrected_shares_are_closer_over_100_mixtures_and_intervals_cover() -> None:
    rng = np.random.default_rng(5)
    errors: dict[str, list[np.ndarray]] = {}
    for seed in range(4):  # new labelled images for every 25 mixtures
        shares = rng.dirichlet(np.full(np.prod(SIZES), 0.3), size=25).reshape(25, *SIZES)
        cells = []
        for mixture, joint in enumerate(shares):
            cells += counted(said_of(drawn_truth(joint, 1500, rng), rng), mixture=str(mixture))
        groups = pa.Table.from_pylist([group_row(1500, mixture=str(mixture)) for mixture in range(25)])
        table = demographics(pa.Table.from_pylist(cells), groups, calibration_rows(3000, rng), UTKFACE.classes, seed)
        for breakdown in (*ATTRIBUTES, ",".join(ATTRIBUTES)):
            rows = rows_of(table, breakdown, is_total=False)
            summed = tuple(1 + i for i, name in enumerate(ATTRIBUTES) if name not in breakdown.split(","))
            truth = shares.sum(axis=summed).ravel()
            raw, corrected, low, high = (
                np.array([row[name] for row in rows])
                for name in ("share", "share_corrected", "share_low", "share_high")
            )
            covered = (low <= truth) & (truth <= high)
            errors.setdefault(breakdown, []).append(np.stack([abs(raw - truth), abs(corrected - truth), covered]))

    for breakdown, parts in errors.items():
        raw_error, error, covered_share = np.concatenate(parts, axis=1).mean(axis=1)
        assert error < raw_error, breakdown
        assert covered_share >= 0.85, breakdown


def test_groups_are_separate_and_one_without_faces_says_so() -> None:
    rng = np.random.default_rng(6)
    cells = counted(said_of(drawn_truth(np.full(SIZES, 1 / np.prod(SIZES)), 200, rng), rng), day="mon")
    groups = pa.Table.from_pylist([group_row(0, day="tue"), group_row(200, day="mon"), group_row(0, day=None)])

    table = demographics(pa.Table.from_pylist(cells), groups, calibration_rows(3000, rng), UTKFACE.classes)

    firsts = [row for row in table.to_pylist() if (row["breakdown"], row["gender"]) == ("gender", "female")]
    assert [(row["day"], row["is_total"]) for row in firsts] == [
        ("tue", False),
        ("mon", False),
        (None, False),
        (None, True),
    ]
    for row in table.to_pylist():
        if row["day"] == "mon" or row["is_total"]:
            assert row["correction"] is None
            assert row["share_low"] <= row["share_corrected"] <= row["share_high"]
        else:
            assert (row["n"], row["share"], row["share_corrected"], row["correction"]) == (0, None, None, "no faces")


def test_a_class_with_few_labelled_images_is_named_only_where_it_matters() -> None:
    rng = np.random.default_rng(7)
    calibration = calibration_rows(3000, rng)
    few = np.flatnonzero(calibration["race"] == UTKFACE.races.index("indian"))[19:]
    calibration["race"][few] = -1
    cells = counted(said_of(drawn_truth(np.full(SIZES, 1 / np.prod(SIZES)), 200, rng), rng))

    table = demographics(
        pa.Table.from_pylist(cells), pa.Table.from_pylist([group_row(200)]), calibration, UTKFACE.classes
    )

    assert {row["correction"] for row in rows_of(table, "race")} == {
        "race: indian: 19 calibration images, 20 are needed"
    }
    (joint,) = {row["correction"] for row in rows_of(table, ",".join(ATTRIBUTES))}
    assert "indian" in joint
    assert {row["correction"] for name in ("age_group", "gender") for row in rows_of(table, name)} == {None}


def test_the_joint_breakdown_is_not_corrected_where_the_product_of_conditions_is_too_large() -> None:
    rng = np.random.default_rng(9)
    calibration = calibration_rows(6000, rng)
    for name in ("age_group", "race"):  # each alone is within the limit
        classes = np.arange(len(UTKFACE.classes[name]))
        rates = 0.6 ** np.abs(np.subtract.outer(classes, classes))
        rates /= rates.sum(axis=1, keepdims=True)
        calibration[f"{name}_pred"] = np.array([rng.choice(classes, p=rates[truth]) for truth in calibration[name]])
    calibration["gender_pred"] = calibration["gender"]
    cells = counted(said_of(drawn_truth(np.full(SIZES, 1 / np.prod(SIZES)), 500, rng), rng))

    table = demographics(
        pa.Table.from_pylist(cells), pa.Table.from_pylist([group_row(500)]), calibration, UTKFACE.classes
    )

    assert {row["correction"] for name in ATTRIBUTES for row in rows_of(table, name)} == {None}
    joint = rows_of(table, ",".join(ATTRIBUTES))
    assert {(row["share_corrected"], row["share_low"], row["share_high"]) for row in joint} == {(None, None, None)}
    (reason,) = {row["correction"] for row in joint}
    assert reason.startswith("age_group,gender,race: the model cannot tell the combinations of classes apart ")


def test_a_classifier_that_guesses_is_not_corrected() -> None:
    rng = np.random.default_rng(8)
    calibration = calibration_rows(3000, rng)
    calibration["gender_pred"] = rng.integers(0, 2, 3000)

    table = demographics(
        pa.Table.from_pylist([cell(None, "male", None, 5)]),
        pa.Table.from_pylist([group_row(5)]),
        calibration,
        CLASSES_OF_GENDER,
    )

    assert [row["share"] for row in table.to_pylist()] == [0.0, 1.0]
    assert [row["share_corrected"] for row in table.to_pylist()] == [None, None]
    assert all("cannot tell the classes apart" in row["correction"] for row in table.to_pylist())


def test_no_name_of_a_group_makes_it_the_total() -> None:
    days = ["all", "all (a group)", "total", "", "None", "null", None]
    cells = [cell(None, "male", None, 2**i, day=day) for i, day in enumerate(days)]
    groups = [group_row(2**i, day=day) for i, day in enumerate(days)]

    table = demographics(pa.Table.from_pylist(cells), pa.Table.from_pylist(groups), None, CLASSES_OF_GENDER)

    numbers = [
        (row["day"], row["is_total"], row["n"], row["num_faces"]) for row in rows_of(table, "gender", gender="male")
    ]
    assert numbers == [*((day, False, 2**i, 2**i) for i, day in enumerate(days)), (None, True, 127, 127)]


def test_without_groups_all_rows_are_the_total() -> None:
    table = demographics(
        pa.table({"gender": ["male"], "n": [5]}), pa.Table.from_pylist([group_row(5)]), None, CLASSES_OF_GENDER
    )

    assert [(row["is_total"], row["n"]) for row in table.to_pylist()] == [(True, 0), (True, 5)]


def test_a_run_without_images_has_a_total_of_zero() -> None:
    groups = pa.Table.from_pylist([group_row(1, day="mon")]).slice(0, 0)
    cells = pa.Table.from_pylist([cell(None, "male", None, 1, day="mon")]).slice(0, 0)

    table = demographics(cells, groups, None, CLASSES_OF_GENDER)

    assert [(row["day"], row["is_total"], row["n"], row["num_images"]) for row in table.to_pylist()] == [
        (None, True, 0, 0)
    ] * 2


@pytest.mark.parametrize(
    ("cells", "groups", "attributes", "said"),
    [
        ([cell(None, "man", None, 1, day="mon")], [group_row(1, day="mon")], ["gender"], "'man' is not one of"),
        ([cell(None, "male", None, 1, day="tue")], [group_row(1, day="mon")], ["gender"], "'tue'"),
        ([cell(None, "male", None, 1, day="mon")], [group_row(1, day="mon")], ["height"], "'height' is not one of"),
        ([cell(None, "male", None, 1, share="mon")], [group_row(1, share="mon")], ["gender"], "grouping column share"),
        ([cell(None, "male", None, 1, day="mon")], [group_row(1, day="mon")] * 2, ["gender"], "duplicates"),
    ],
)
def test_invalid_arguments_are_named(cells: list[Any], groups: list[Any], attributes: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        demographics(
            pa.Table.from_pylist(cells), pa.Table.from_pylist(groups), None, dict.fromkeys(attributes, UTKFACE.genders)
        )


@pytest.mark.parametrize("space", [FAIRFACE, ADIENCE], ids=lambda space: space.name)
def test_a_label_space_gives_tables_their_cells(space: LabelSpace) -> None:
    rng = np.random.default_rng(11)
    names, sizes = list(space.classes), [len(classes) for classes in space.classes.values()]
    truth = {name: rng.integers(0, size, 4000) for name, size in zip(names, sizes, strict=True)}
    calibration = truth | {f"{name}_pred": codes for name, codes in truth.items()}  # without an error
    faces = [{name: space.classes[name][codes[k]] for name, codes in truth.items()} | {"n": 1} for k in range(600)]

    table = demographics(
        pa.Table.from_pylist(faces), pa.Table.from_pylist([group_row(600)]), calibration, space.classes
    )

    assert table.num_rows == sum(sizes) + np.prod(sizes)
    for name, classes in space.classes.items():
        rows = rows_of(table, name)
        assert [row[name] for row in rows] == list(classes)
        assert [row["n"] for row in rows] == np.bincount(truth[name][:600], minlength=len(classes)).tolist()
        assert [row["share_corrected"] for row in rows] == pytest.approx([row["share"] for row in rows], abs=0.01)
    hidden = suppress(table, 5)
    assert [row["n"] for row in hidden.to_pylist() if 0 < (row["n"] or 0) < 5] == []

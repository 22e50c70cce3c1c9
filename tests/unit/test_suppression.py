"""Small cells are hidden, and an attacker who solves for the hidden counts finds none."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy.optimize import LinearConstraint, milp

from agr_ray.labels import UTKFACE
from agr_ray.schema import ABSTAINED
from agr_ray.tables.demographics import demographics
from agr_ray.tables.suppression import suppress

ATTRIBUTES = ("gender", "race")
GROUP_COUNTS = ("num_images", "num_no_face", "num_rejected", "num_faces", "num_flagged")
MAY_BE_SMALL = ("num_no_face", "num_rejected", "num_flagged", "num_abstained")
CORRECTED = ("share_corrected", "share_low", "share_high")
# Every face of a group is in one of these, which are all that tables are made of.
TOTAL = ("the total",)
INNER_CELLS = list(product(*((*UTKFACE.classes[name], ABSTAINED) for name in ATTRIBUTES)))


def made_table(
    cells: dict[tuple[str, ...], dict[tuple[str, str], int]], keys: tuple[str, ...], **others: int
) -> pa.Table:
    """Return the unsuppressed table of groups of faces, of which each has an image of its own."""
    counts, groups = [], []
    for group, numbers in cells.items():
        named = dict(zip(keys, group, strict=True))
        counts += [named | dict(zip(ATTRIBUTES, cell, strict=True)) | {"n": n} for cell, n in numbers.items()]
        said = dict.fromkeys((*GROUP_COUNTS, "num_abstained"), 0) | others
        said["num_faces"] = sum(numbers.values()) + said["num_flagged"]
        said["num_images"] = said["num_faces"] + said["num_no_face"] + said["num_rejected"] - said.pop("further", 0)
        groups.append(named | said)
    return demographics(
        pa.Table.from_pylist(counts),
        pa.Table.from_pylist(groups),
        None,
        {name: UTKFACE.classes[name] for name in ATTRIBUTES},
    )


def with_distinct(table: pa.Table, distinct: pa.Table, keys: tuple[str, ...]) -> pa.Table:
    """Add the distinct faces of a table's cells: those of a second table, of which each face is one."""
    num_unique = pc.subtract(distinct["num_faces"], distinct["num_flagged"])
    for name, values in (("n_unique", distinct["n"]), ("num_unique", num_unique)):
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def random_tables(seed: int) -> tuple[pa.Table, tuple[str, ...]]:
    """Return a table as `random_table`, with distinct faces: in some cells few, in others all."""
    rng = np.random.default_rng(seed)
    keys, cells, few = random_cells(seed)
    share = rng.choice([0.2, 0.7, 1.0], len(INNER_CELLS))
    distinct = {
        group: {cell: max(1, int(rng.binomial(n, share[INNER_CELLS.index(cell)]))) for cell, n in numbers.items()}
        for group, numbers in cells.items()
    }
    return with_distinct(made_table(cells, keys, **few), made_table(distinct, keys, **few), keys), keys


def random_table(seed: int) -> tuple[pa.Table, tuple[str, ...]]:
    """Return a table of one to six groups of few faces, some of which are abstained on."""
    keys, cells, few = random_cells(seed)
    return made_table(cells, keys, **few), keys


def random_cells(seed: int) -> tuple[tuple[str, ...], dict[Any, dict[tuple[str, str], int]], dict[str, int]]:
    """Return grouping columns, the faces of each cell of each group, and the other counts."""
    rng = np.random.default_rng(seed)
    keys = [(), ("day",), ("day",), ("day", "camera")][seed % 4]
    groups = list(product(*(["a", None, "all"][: rng.integers(1, 4)] for _ in keys)))
    mean = rng.choice([0.3, 1.5, 5.0]) * rng.gamma(0.5, 2.0, len(INNER_CELLS))
    cells = {}
    for group in groups:
        numbers = rng.poisson(mean * rng.gamma(1.0, 1.0))
        cells[group] = {cell: int(n) for cell, n in zip(INNER_CELLS, numbers, strict=True) if n} or {INNER_CELLS[0]: 1}
    return keys, cells, {name: int(rng.poisson(1.5)) for name in ("num_no_face", "num_rejected", "num_flagged")}


def found_out(table: pa.Table, keys: tuple[str, ...]) -> list[Any]:
    """Return the hidden counts for which only one value agrees with all that the table shows.

    Unknown whole numbers: each group's faces by everything that the model said of them, its flagged faces, and its
    images. A hidden count is not 0, as zeros are shown; a hidden cell may be, and is not counted if it is found to be.

    If the table has distinct faces, those of each inner cell are unknown, too: at most all of its faces, and at least
    one if it has any. The attacker assumes that no face has near-duplicates in two cells, so that they add up.
    """
    rows = table.to_pylist()
    named = [group_of(row, keys) for row in rows]
    groups = list(dict.fromkeys(group for group in named if group != TOTAL)) if keys else [TOTAL]
    distinct_cells = [("distinct", *cell) for cell in INNER_CELLS]
    counts_distinct = any(row["n_unique"] is not None for row in rows)
    own = [*INNER_CELLS, "flagged", "no face", "rejected", "with a face", *(distinct_cells if counts_distinct else [])]
    number = {(group, name): i for i, (group, name) in enumerate(product(groups, own))}

    def vector(group: tuple[str, ...], names: list[Any]) -> np.ndarray:
        chosen = groups if group == TOTAL else [group]
        made = np.zeros(len(number))
        made[[number[each, name] for each in chosen for name in names]] = 1.0
        return made

    sums: dict[Any, tuple[np.ndarray, int | None]] = {}
    with_class: dict[Any, np.ndarray] = defaultdict(lambda: np.zeros(len(number)))
    for row in rows:
        group = group_of(row, keys)
        asked = [row[name] for name in ATTRIBUTES]
        inner = [cell for cell in INNER_CELLS if all(a in (None, b) for a, b in zip(asked, cell, strict=True))]
        sums["n", group, row["breakdown"], *asked] = (vector(group, inner), row["n"])
        with_class[group, row["breakdown"]] += vector(group, inner)
        if counts_distinct:
            distinct = vector(group, [("distinct", *cell) for cell in inner])
            sums["n_unique", group, row["breakdown"], *asked] = (distinct, row["n_unique"])
            sums["num_unique", group] = (vector(group, distinct_cells), row["num_unique"])
    for row in rows:
        group, breakdown = group_of(row, keys), row["breakdown"]
        within = [i for i, name in enumerate(ATTRIBUTES) if name in breakdown.split(",")]
        for name, members in {
            "num_images": ["no face", "rejected", "with a face"],
            "num_no_face": ["no face"],
            "num_rejected": ["rejected"],
            "num_faces": [*INNER_CELLS, "flagged"],
            "num_flagged": ["flagged"],
        }.items():
            sums[name, group] = (vector(group, members), row[name])
        unsure = [cell for cell in INNER_CELLS if any(cell[i] == ABSTAINED for i in within)]
        sums["num_abstained", group, breakdown] = (vector(group, unsure), row["num_abstained"])
        if row["share"]:
            assert row["n"] is not None
            told = round(row["n"] / row["share"])
            sums["with class", group, breakdown] = (with_class[group, breakdown], told)
    for group in groups:
        faces = sums["num_faces", group][0]
        sums["further", group] = (faces - vector(group, ["with a face"]), None)
        for cell in INNER_CELLS if counts_distinct else ():
            n, distinct = vector(group, [cell]), vector(group, [("distinct", *cell)])
            sums["further duplicates", group, *cell] = (n - distinct, None)
            sums["further distinct", group, *cell] = (1000 * distinct - n, None)
    hidden = {name: made for name, (made, value) in sums.items() if value is None and not name[0].startswith("further")}
    matrix = np.array([made for made, _ in sums.values()])
    floor = {name: float(name[0] not in ("n", "n_unique")) for name in hidden}
    low = [value if value is not None else floor.get(name, 0.0) for name, (_, value) in sums.items()]
    most = {name: 1e6 if name[0] == "further distinct" else 1000.0 for name in sums}
    high = [value if value is not None else most[name] for name, (_, value) in sums.items()]
    constraint = LinearConstraint(matrix, np.array(low), np.array(high))

    def solve(direction: np.ndarray) -> dict[Any, int]:
        found = milp(direction, integrality=np.ones(len(number)), constraints=constraint)
        assert found.status == 0, found.message
        return {name: round(float(made @ found.x)) for name, made in hidden.items()}

    rng = np.random.default_rng(0)
    seen = defaultdict(set)
    for direction in rng.normal(size=(3, len(number))):
        for sign in (1.0, -1.0):
            for name, value in solve(sign * direction).items():
                seen[name].add(value)
    for name in [name for name, values in seen.items() if len(values) == 1]:
        seen[name] |= {solve(sign * hidden[name])[name] for sign in (1.0, -1.0)}
    return [name for name, values in seen.items() if len(values) == 1 and values != {0}]


def group_of(row: dict[str, Any], keys: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the values that identify a row's group."""
    return TOTAL if row["is_total"] else tuple(row[key] for key in keys)


def rows_of(table: pa.Table, breakdown: str) -> pa.Table:
    return table.filter(pc.equal(table["breakdown"], breakdown))


def only_small_hidden(table: pa.Table, min_cell: int) -> pa.Table:
    """Hide only small n and their shares, as a careless publisher would."""
    small = pc.and_(pc.greater(table["n"], 0), pc.less(table["n"], min_cell))
    for name in ("n", "share"):
        index = table.column_names.index(name)
        table = table.set_column(index, table.schema.field(name), pc.if_else(small, None, table[name]))
    return table


# In the last five, cells follow from several sums taken together.
@pytest.mark.parametrize("seed", [*range(4), 18, 51, 81, 147, 224])
def test_no_hidden_count_can_be_computed(seed: int) -> None:
    table, keys = random_table(seed)
    min_cell = (2, 3, 5, 11)[seed // 2 % 4]

    published = suppress(table, min_cell)

    assert found_out(published, keys) == []


@pytest.mark.parametrize("seed", [*range(4), 18, 147, 369])
def test_no_hidden_count_can_be_computed_from_distinct_faces(seed: int) -> None:
    table, keys = random_tables(seed)
    min_cell = (2, 3, 5, 11)[seed // 2 % 4]

    published = suppress(table, min_cell)

    found = found_out(published, keys)
    assert [name for name in found if name[0] != "num_unique"] == []
    # A large number of distinct faces may follow from the cells, and reveals nothing more.
    large = {group_of(row, keys) for row in table.to_pylist() if row["num_unique"] >= min_cell}
    assert [name for name in found if name[1] not in large] == []
    rows = published.to_pylist()
    incomplete = {group_of(row, keys) for row in rows if row["n"] is None}
    incomplete |= {TOTAL} if incomplete else set()
    assert [row["n_unique"] is None for row in rows] == [group_of(row, keys) in incomplete for row in rows]


def test_the_attack_finds_a_cell_if_only_small_numbers_of_distinct_faces_are_hidden() -> None:
    cells = dict.fromkeys(INNER_CELLS, 50)
    table = made_table({(): cells}, ())
    table = with_distinct(table, made_table({(): cells | {("female", "asian"): 2}}, ()), ())
    published = suppress(table, 5)

    few = pc.less(table["n_unique"], 5)
    place = published.column_names.index("n_unique")
    careless = published.set_column(place, "n_unique", pc.if_else(few, None, table["n_unique"]))

    assert found_out(published, ()) == []
    assert ("n_unique", TOTAL, "gender,race", "female", "asian") in found_out(careless, ())


def test_many_photographs_of_few_people_are_a_small_cell() -> None:
    cells = dict.fromkeys(INNER_CELLS, 50)
    table = made_table({(): cells}, ())
    distinct = made_table({(): cells | {("female", "asian"): 4, ("male", "black"): 5}}, ())

    published = suppress(with_distinct(table, distinct, ()), 5)

    rows = {(row["gender"], row["race"]): row for row in rows_of(published, "gender,race").to_pylist()}
    assert (rows["female", "asian"]["n"], rows["female", "asian"]["n_unique"]) == (None, None)
    assert (rows["male", "black"]["n"], rows["male", "black"]["n_unique"]) == (50, None)
    assert set(published["num_unique"].to_pylist()) == {table["num_faces"][0].as_py() - 46 - 45}
    assert suppress(table, 5).equals(table)


@pytest.mark.parametrize("min_cell", [2, 3, 5])
def test_copies_of_one_photograph_do_not_show_which_hidden_cells_have_faces(min_cell: int) -> None:
    women, men = ([(gender, race) for race in UTKFACE.classes["race"]] for gender in ("female", "male"))
    cells, distinct = (dict.fromkeys(women, each) | dict.fromkeys(men, 50) for each in (6, 1))

    published = suppress(with_distinct(made_table({(): cells}, ()), made_table({(): distinct}, ()), ()), min_cell)

    assert rows_of(published, "gender,race")["n"].null_count == 10
    assert found_out(published, ()) == []


def test_few_distinct_faces_of_a_group_hide_their_number_and_that_of_the_total() -> None:
    keys, cells = ("day",), dict.fromkeys(INNER_CELLS, 50)
    table = made_table({("a",): cells, ("b",): {(ABSTAINED, ABSTAINED): 9}}, keys)
    distinct = made_table({("a",): cells, ("b",): {(ABSTAINED, ABSTAINED): 3}}, keys)

    published = suppress(with_distinct(table, distinct, keys), 5)

    shown = {(row["day"], row["is_total"]): (row["num_faces"], row["num_unique"]) for row in published.to_pylist()}
    num_faces = 50 * len(INNER_CELLS)
    assert shown == {
        ("a", False): (num_faces, num_faces),
        ("b", False): (9, None),
        (None, True): (num_faces + 9, None),
    }


def test_a_group_of_few_distinct_faces_that_the_model_is_unsure_of_hides_their_number() -> None:
    table = made_table({(): {(ABSTAINED, ABSTAINED): 7}}, ())

    published = suppress(with_distinct(table, made_table({(): {(ABSTAINED, ABSTAINED): 3}}, ()), ()), 5)

    assert set(published["num_unique"].to_pylist()) == {None}
    assert set(published["num_faces"].to_pylist()) == {7}


def test_the_attack_finds_counts_if_only_small_cells_are_hidden() -> None:
    table, keys = random_table(1)

    assert found_out(only_small_hidden(table, 5), keys) != []


@pytest.mark.parametrize("seed", range(16))
def test_small_counts_and_everything_derived_from_them_are_hidden(seed: int) -> None:
    table, keys = random_table(seed)

    published = suppress(table, 5)

    assert published.schema.equals(table.schema)
    shown_everywhere: dict[Any, bool] = defaultdict(lambda: True)
    rows = list(zip(table.to_pylist(), published.to_pylist(), strict=True))
    for before, after in rows:
        for name in ("n", *GROUP_COUNTS, "num_abstained"):
            assert after[name] in (before[name], None)
            assert after[name] is None or not 0 < after[name] < 5 or name in MAY_BE_SMALL
            assert before[name] != 0 or after[name] == 0 or name == "n"
        assert after["suppressed"] == (after["n"] is None)
        assert after["n"] is not None or after["share"] is None
        assert not after["share"] or after["n"] / after["share"] > 4.5
        shown = after["n"] is not None and after["num_abstained"] is not None
        shown_everywhere[*group_of(after, keys), after["breakdown"]] &= shown
    for _, after in rows:
        if not shown_everywhere[*group_of(after, keys), after["breakdown"]]:
            assert [after[name] for name in CORRECTED] == [None] * 3
            assert after["correction"] == "suppressed"


def test_five_hidden_faces_cannot_be_inferred_from_their_sum() -> None:
    cells = {("female", race): 1 for race in UTKFACE.classes["race"]}

    published = suppress(made_table({(): cells}, ()), 5)

    assert found_out(published, ()) == []
    # Who knew where there is none would know them all.
    assert rows_of(published, "gender,race")["n"].null_count == 10
    assert rows_of(published, "gender")["n"].to_pylist() == [5, 0]


def test_zeros_are_published_if_no_cell_is_small() -> None:
    cells = {("female", "white"): 20, ("female", "asian"): 30, ("male", "white"): 20, ("male", "asian"): 2}

    published = suppress(made_table({(): cells}, ()), 3)

    assert rows_of(published, "race")["n"].to_pylist() == [40, 0, 32, 0, 0]
    assert rows_of(published, "gender,race")["n"].null_count == 10


@pytest.mark.parametrize("keys", [("day",), ("day", "camera")])
def test_a_hidden_cell_cannot_be_computed_from_the_total_of_all_groups(keys: tuple[str, ...]) -> None:
    large = dict.fromkeys(product(*(UTKFACE.classes[name] for name in ATTRIBUTES)), 50)
    small = large | {("female", "asian"): 2, ("male", "asian"): 30, ("female", "white"): 20, ("male", "white"): 40}
    groups = {(day, *["x"] * (len(keys) - 1)): large for day in ("a", "b")} | {("c", *["y"] * (len(keys) - 1)): small}

    published = suppress(made_table(groups, keys), 5)

    assert pc.sum(published["suppressed"]).as_py() >= 4
    assert found_out(published, keys) == []


def test_large_cells_are_published() -> None:
    table = made_table({("a",): dict.fromkeys(INNER_CELLS, 7), ("b",): dict.fromkeys(INNER_CELLS, 90)}, ("day",))

    told = {cell: 7 for cell in INNER_CELLS if ABSTAINED not in cell}

    assert suppress(table, 7).equals(table)
    assert suppress(made_table({(): told}, ()), 7).equals(made_table({(): told}, ()))


def test_a_few_images_without_a_face_or_a_sure_gender_do_not_bias_shares() -> None:
    cells = dict.fromkeys(INNER_CELLS, 0) | dict.fromkeys([cell for cell in INNER_CELLS if ABSTAINED not in cell], 9)
    cells[ABSTAINED, "white"] = 1

    table = made_table({(): cells}, (), num_no_face=1, num_rejected=1, num_flagged=1)

    assert suppress(table, 5).equals(table)


def test_a_small_cell_hides_few_others() -> None:
    large = {cell: 50 + i for i, cell in enumerate(INNER_CELLS)}
    table = made_table({(): large | {("female", "asian"): 2}}, ())

    published = suppress(table, 5)

    hidden = published.filter(published["suppressed"]).select(["breakdown", *ATTRIBUTES]).to_pylist()
    assert {row["breakdown"] for row in hidden} == {"gender,race"}
    # One more of its gender and one more of its race would do were there no sums over abstentions.
    assert 2 <= len(hidden) <= 4


@pytest.mark.parametrize("min_cell", [0, 1])
def test_without_a_limit_nothing_is_hidden(min_cell: int) -> None:
    table, _ = random_table(1)

    assert suppress(table, min_cell).equals(table)


def test_an_empty_table_stays_empty() -> None:
    table, _ = random_table(1)

    assert suppress(table.slice(0, 0), 5).equals(table.slice(0, 0))

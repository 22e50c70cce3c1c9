"""Suppress small cells, and enough other counts that the small ones cannot be computed.

Every count that is published, or follows from published ones, is a variable. Every sum that holds between variables is
a line: one total and its parts.

- the faces with a class in a breakdown = its cells (this total follows from any published share);
- faces found = flagged + abstained + faces with a class, for each breakdown;
- images = without a face + rejected + with a face; faces found = images with a face + further faces;
- a cell of one attribute = the joint breakdown's cells within it + its faces without a joint class;
- the abstentions on each attribute, added up = the joint breakdown's abstentions + further abstentions;
- a count of the total over all groups = the sum of that count over the groups.

Further faces, further abstentions and faces without a joint class are never published, and need no protection. Where
they are 0, an attacker is assumed to know it.

First, cells, images, images with a face, faces found and faces with a class are hidden if they are 1 to k - 1. Images
without a face, rejected images, flagged faces and abstentions are harmless: they reveal nobody's attributes. Then more
counts are hidden until, in every line, (1) no hidden count stands alone and (2) the hidden parts of a published total
add up to k or more, unless all of them are harmless. Last, (3) linear programming and algebra find the hidden counts
that all lines together still determine, and more counts are hidden for them.

If a cell of a breakdown is hidden, its cells of 0 are hidden, too. Otherwise hidden cells would be known to be at least
1, and five faces in five hidden cells would each be known from their sum. A hidden 0 may be found out, because nobody
is counted there. Hidden counts other than cells are known to be at least 1.

If distinct faces were counted, a cell is small if its distinct faces are few, however many near-duplicates it has: six
copies of a photograph are one face. If any cell of a group is hidden, every n_unique of the group is, and of the total
over all groups. Otherwise a total of 30 faces with an n_unique of 5 could show that each of its five hidden cells has
one distinct face. num_unique is then hidden, too, unless it is at least the number of the group's cells: then any of
the hidden cells may have faces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csc_array, eye_array, hstack
from scipy.sparse.linalg import splu

from agr_ray.schema import DEMOGRAPHIC_ATTRIBUTES, DEMOGRAPHIC_COUNTS, DEMOGRAPHICS

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

SUPPRESSED: Final = "suppressed"
"""The `correction` of breakdowns whose corrected shares would reveal hidden counts."""

_GROUP_COUNTS = tuple(name for name in DEMOGRAPHIC_COUNTS if name != "num_abstained")
_HARMLESS = ("num_no_face", "num_rejected", "num_flagged")
_DETERMINED = 1e-6
_RIDGE = 1e-9


class _Counts(NamedTuple):
    """The variables of a table of r rows: the value of each, and the indices of the variables of each kind."""

    values: IntArray
    """The n of each row, then the counts of groups and of breakdowns, then the counts that are never published."""
    sizes: IntArray
    """What is compared with the smallest count to publish: the values, but n_unique in place of n if it was counted."""
    num_published: int
    """Number of variables that are published or follow from published ones; they come first."""
    of_group: dict[str, IntArray]
    """(groups,) index of each group's `_GROUP_COUNTS`, with_face, further_faces, abstentions (the sum) and
    further_abstentions; the last two are unused without a joint breakdown."""
    of_row: IntArray
    """(r,) index of each row's faces without a joint class; unused for rows of the joint breakdown."""
    of_breakdown: dict[str, IntArray]
    """(breakdowns,) index of the num_abstained and with_class of each breakdown of each group."""
    group: IntArray
    """(r,) number of each row's group."""
    breakdown: IntArray
    """(r,) number of each row's breakdown, which is of one group."""


class _Lines(NamedTuple):
    """Sums: in each line, the parts minus the total are 0. In a line, the cheapest member to hide comes first."""

    line: IntArray
    """(members,) number of the line."""
    member: IntArray
    """(members,) index of the variable."""
    sign: IntArray
    """(members,) 1: part; -1: total."""
    num: int
    """Number of lines."""


def suppress(table: pa.Table, min_cell: int) -> pa.Table:
    """Hide cells and totals from 1 to min_cell - 1, and further counts from which these could be computed.

    Hidden counts are null. Where n is hidden, its share is null and `suppressed` is true. Corrected shares depend on
    all counts of their breakdown of a group: if one of them is hidden, all its corrected shares are null, and
    `correction` is "suppressed". If the number of faces with a class is hidden, all its shares are null.

    Args:
        table: grouping columns, then `schema.DEMOGRAPHICS`, with every cell of every group, as from `demographics`.
        min_cell: smallest count, other than 0, to publish; 0 or 1: nothing is hidden.
    """
    if min_cell <= 1 or table.num_rows == 0:
        return table
    # Only is_total tells the total from a group whose grouping columns are all null.
    keys = [*(name for name in table.column_names if name not in DEMOGRAPHICS.names), "is_total"]
    counts = _counts(table, keys)
    hidden = _hide(counts, _lines(table, keys, counts), min_cell)
    return _publish(table, counts, hidden, min_cell)


def _counts(table: pa.Table, keys: list[str]) -> _Counts:
    """Number the variables, and collect their values."""
    group, first_of_group = _numbered(table, keys)
    breakdown, first_of_breakdown = _numbered(table, [*keys, "breakdown"])
    n, abstained = (table.column(name).to_numpy() for name in ("n", "num_abstained"))
    by_group = {name: table.column(name).to_numpy()[first_of_group] for name in _GROUP_COUNTS}
    by_group["with_face"] = by_group["num_images"] - by_group["num_no_face"] - by_group["num_rejected"]
    with_class = np.zeros(len(first_of_breakdown), np.int64)
    np.add.at(with_class, breakdown, n)
    by_breakdown = {"num_abstained": abstained[first_of_breakdown], "with_class": with_class}
    without_joint_class = np.zeros(len(n), np.int64)
    for row, cells in _joint_sums(table, group):
        without_joint_class[row] = n[row] - n[cells].sum()
    is_joint = _is_joint(table)[first_of_breakdown]
    abstentions, joint_abstained = (
        np.bincount(group[first_of_breakdown], np.where(chosen, by_breakdown["num_abstained"], 0), len(first_of_group))
        for chosen in (~is_joint, is_joint)
    )
    unpublished = {
        "further_faces": by_group["num_faces"] - by_group["with_face"],
        "abstentions": abstentions.astype(np.int64),
        "further_abstentions": (abstentions - joint_abstained).astype(np.int64),
    }
    published = [n, *by_group.values(), *by_breakdown.values()]
    parts = [*published, *unpublished.values(), without_joint_class]
    starts = np.cumsum([len(part) for part in parts])
    variables = [start + np.arange(len(part)) for start, part in zip(starts[:-1], parts[1:], strict=True)]
    names = [*by_group, *by_breakdown, *unpublished, "of_row"]
    variable = dict(zip(names, variables, strict=True))
    values = np.concatenate(parts)
    sizes = values.copy()
    if not table.column("n_unique").null_count:
        sizes[: len(n)] = table.column("n_unique").to_numpy()
    return _Counts(
        values=values,
        sizes=sizes,
        num_published=sum(len(part) for part in published),
        of_group={name: variable[name] for name in (*by_group, *unpublished)},
        of_breakdown={name: variable[name] for name in by_breakdown},
        of_row=variable["of_row"],
        group=group,
        breakdown=breakdown,
    )


def _lines(table: pa.Table, keys: list[str], counts: _Counts) -> _Lines:
    """List every sum that holds."""
    of_group, of_breakdown = counts.of_group, counts.of_breakdown
    sums: dict[int, list[list[int]]] = defaultdict(list)  # total -> the ways in which it is a sum
    for names in (
        ("num_images", "num_no_face", "num_rejected", "with_face"),
        ("num_faces", "with_face", "further_faces"),
    ):
        for total, *parts in np.stack([of_group[name] for name in names], axis=1).tolist():
            sums[total].append(parts)
    cells_of: dict[int, list[int]] = defaultdict(list)
    for row, breakdown in enumerate(counts.breakdown):
        cells_of[breakdown].append(row)
    is_joint = _is_joint(table)
    abstained_of: dict[int, list[int]] = defaultdict(list)
    for breakdown, cells in cells_of.items():
        group = counts.group[cells[0]]
        abstained, with_class = of_breakdown["num_abstained"][breakdown], of_breakdown["with_class"][breakdown]
        sums[with_class].append(cells)
        sums[of_group["num_faces"][group]].append([of_group["num_flagged"][group], abstained, with_class])
        if is_joint[cells[0]]:
            sums[of_group["abstentions"][group]].append([abstained, of_group["further_abstentions"][group]])
        else:
            abstained_of[of_group["abstentions"][group]].append(abstained)
    for total, parts in abstained_of.items():
        if total in sums:  # there is a joint breakdown
            sums[total].append(parts)
    for row, cells in _joint_sums(table, counts.group):
        sums[row].append([*cells, int(counts.of_row[row])])
    for total, parts in _group_sums(table, keys, counts):
        sums[total].append(parts)
    listed = [(total, parts) for total, ways in sums.items() for parts in ways]
    line = np.repeat(np.arange(len(listed)), [1 + len(parts) for _, parts in listed])
    member = np.concatenate([[total, *parts] for total, parts in listed]).astype(np.int64)
    sign = np.concatenate([[-1, *[1] * len(parts)] for _, parts in listed])
    # Hiding a small count loses least. Hiding the faces with a class loses all shares of a breakdown. A 1 helps little,
    # because it is often known to be at least 1: it could only be larger.
    cost = counts.values.copy()
    cost[of_breakdown["with_class"]] += 2 * cost.max()
    cost[counts.values == 1] += cost.max()
    order = np.lexsort((member, cost[member], line))
    return _Lines(line[order], member[order], sign[order], len(listed))


def _is_joint(table: pa.Table) -> BoolArray:
    """Return a boolean for each row: whether it belongs to the joint breakdown."""
    return np.array(
        [breakdown not in DEMOGRAPHIC_ATTRIBUTES for breakdown in table.column("breakdown").to_pylist()], bool
    )


def _joint_sums(table: pa.Table, groups: IntArray) -> list[tuple[int, list[int]]]:
    """Return each cell of a single attribute and the joint cells within it, as numbers of rows."""
    cells: dict[tuple[int, str, str], list[int]] = defaultdict(list)
    single = []
    labels = {name: table.column(name).to_pylist() for name in DEMOGRAPHIC_ATTRIBUTES}
    for row, (group, breakdown) in enumerate(zip(groups.tolist(), table.column("breakdown").to_pylist(), strict=True)):
        if breakdown in labels:
            single.append((row, (group, breakdown, labels[breakdown][row])))
        else:
            for name in breakdown.split(","):
                cells[group, name, labels[name][row]].append(row)
    return [(row, cells[key]) for row, key in single if key in cells]


def _group_sums(table: pa.Table, keys: list[str], counts: _Counts) -> list[tuple[int, list[int]]]:
    """Return each count of the total over all groups and that count of each group, as indices of variables.

    `keys` are the grouping columns and, last, is_total.
    """
    group_keys = _first_rows(table.select(keys), counts.group)
    breakdown_keys = _first_rows(table.select([*keys, "breakdown"]), counts.breakdown)
    cell_keys = [tuple(row.values()) for row in table.select([*keys, "breakdown", *DEMOGRAPHIC_ATTRIBUTES]).to_pylist()]
    kinds = [
        (cell_keys, np.arange(table.num_rows)),
        *((group_keys, counts.of_group[name]) for name in (*_GROUP_COUNTS, "with_face")),
        *((breakdown_keys, variables) for variables in counts.of_breakdown.values()),
    ]
    sums = []
    for names, variables in kinds:
        totals: dict[tuple[str | bool | None, ...], int] = {}
        parts: dict[tuple[str | bool | None, ...], list[int]] = defaultdict(list)
        for name, variable in zip(names, variables.tolist(), strict=True):
            group, rest = name[: len(keys)], name[len(keys) :]
            if group[-1]:
                totals[rest] = variable
            else:
                parts[rest].append(variable)
        sums += [(variable, parts[rest]) for rest, variable in totals.items() if rest in parts]
    return sums


def _hide(counts: _Counts, lines: _Lines, min_cell: int) -> BoolArray:
    """Return a boolean for each variable: whether it is hidden. Those never published are, unless they are 0."""
    values = counts.values
    protected = np.arange(len(values)) < counts.num_published
    sensitive = protected.copy()
    for variables in (*(counts.of_group[name] for name in _HARMLESS), counts.of_breakdown["num_abstained"]):
        sensitive[variables] = False
    hidden = (values > 0) & ((sensitive & (counts.sizes < min_cell)) | ~protected)
    while True:
        _hide_zeros(counts, hidden)
        chosen = _exposed_in_a_line(counts.sizes, lines, hidden, protected, sensitive, min_cell)
        more = _next_to_hide(values, lines, hidden, chosen)
        if not more.size:
            exposed = _exposed_by_all_lines(counts, lines, hidden)
            if not exposed.any():
                return hidden
            more = _nearest_to_hide(values, lines, hidden, exposed)
        hidden[more] = True


def _hide_zeros(counts: _Counts, hidden: BoolArray) -> None:
    """Hide the cells of 0 of each breakdown that has a hidden cell."""
    num_rows = len(counts.breakdown)
    any_hidden = np.bincount(counts.breakdown, hidden[:num_rows])[counts.breakdown] > 0
    hidden[:num_rows] |= any_hidden & (counts.values[:num_rows] == 0)


def _exposed_in_a_line(
    sizes: IntArray, lines: _Lines, hidden: BoolArray, protected: BoolArray, sensitive: BoolArray, min_cell: int
) -> BoolArray:
    """Return a boolean for each line: whether it breaks rule (1) or (2), so that more of it must be hidden."""
    member_hidden = hidden[lines.member]
    part_hidden = member_hidden & (lines.sign > 0)
    num_hidden = np.bincount(lines.line, member_hidden, lines.num)
    sum_hidden = np.bincount(lines.line, part_hidden * sizes[lines.member], lines.num)
    total_hidden = np.bincount(lines.line, member_hidden & (lines.sign < 0), lines.num) > 0
    of_protected, of_sensitive = (
        np.bincount(lines.line, member_hidden & kind[lines.member], lines.num) > 0 for kind in (protected, sensitive)
    )
    too_little = of_sensitive & ~total_hidden & (sum_hidden < min_cell)
    return np.asarray((of_protected & (num_hidden == 1)) | too_little, np.bool_)


def _exposed_by_all_lines(counts: _Counts, lines: _Lines, hidden: BoolArray) -> BoolArray:
    """Return a boolean for each variable: whether rule (3) finds it, because all solutions have the same value there.

    Another solution differs from the true one by a vector that adds up to zero in every line, and that is not negative
    where the true count is at its minimum. First, the counts at their minimum that no such vector raises are found by
    linear programming, and fixed. Then a random vector is projected onto the vectors that add up to zero and leave
    those fixed: it is zero only where all of them are.
    """
    values = counts.values
    variables = np.flatnonzero(hidden)
    member_hidden = hidden[lines.member]
    column = (np.cumsum(hidden) - 1)[lines.member[member_hidden]]
    entries = (lines.sign[member_hidden].astype(np.float64), (lines.line[member_hidden], column))
    sums = csc_array(entries, shape=(lines.num, len(variables)))
    moves = np.ones(len(variables), bool)
    is_cell, is_published = variables < len(counts.breakdown), variables < counts.num_published
    least = np.flatnonzero(is_published & (values[variables] == np.where(is_cell, 0, 1)))
    moves[least] = _can_rise(sums, least)
    vector = np.random.default_rng(0).normal(size=len(variables)) * moves
    moving = sums[:, np.flatnonzero(moves)]
    normal = splu((moving @ moving.T + _RIDGE * eye_array(lines.num)).tocsc(), permc_spec="MMD_AT_PLUS_A")
    projected = vector[moves]
    for _ in range(3):  # the ridge, which lines that depend on each other need, leaves a residual
        projected = projected - moving.T @ normal.solve(moving @ projected)
    vector[moves] = projected
    exposed = np.zeros(len(values), bool)
    exposed[variables[(np.abs(vector) < _DETERMINED) & is_published]] = True
    return exposed & (values > 0)


def _can_rise(sums: csc_array, least: IntArray) -> BoolArray:
    """Return for each of `least` whether some solution of sums @ x = 0 with no negative x[least] has it above 0."""
    rise, rest = sums[:, least], sums[:, np.setdiff1d(np.arange(sums.shape[1]), least)]
    num = len(least)
    if not num:
        return np.zeros(0, bool)
    # Solutions can be scaled and added, so all variables that can rise at all can rise by 1 together.
    found = linprog(
        np.repeat([-1.0, 0.0], [num, num + rest.shape[1]]),
        A_eq=hstack([rise, rise, rest], format="csc"),
        b_eq=np.zeros(sums.shape[0]),
        bounds=[(0, 1)] * num + [(0, None)] * num + [(None, None)] * rest.shape[1],
        method="highs",
    )
    assert found.status == 0, found.message
    return np.asarray(found.x[:num] > 0.5, np.bool_)


def _next_to_hide(values: IntArray, lines: _Lines, hidden: BoolArray, chosen: BoolArray) -> IntArray:
    """Return the cheapest member of each chosen line that is published and not 0; none if a line has no such member."""
    usable = ~hidden & (values > 0)
    candidates = np.flatnonzero(usable[lines.member] & chosen[lines.line])
    first = np.unique(lines.line[candidates], return_index=True)[1]
    return np.unique(lines.member[candidates[first]])


def _nearest_to_hide(values: IntArray, lines: _Lines, hidden: BoolArray, exposed: BoolArray) -> IntArray:
    """Return counts to hide in the lines of exposed counts, or else in the nearest lines that share a hidden count."""
    while True:
        chosen = np.bincount(lines.line, exposed[lines.member], lines.num) > 0
        more = _next_to_hide(values, lines, hidden, chosen)
        if more.size:
            return more
        # If all connected lines were hidden as a whole, their solution could be scaled, and nothing would be exposed.
        # So there are more lines to reach.
        reached = exposed.copy()
        reached[lines.member[chosen[lines.line] & hidden[lines.member]]] = True
        assert (reached != exposed).any()
        exposed = reached


def _publish(table: pa.Table, counts: _Counts, hidden: BoolArray, min_cell: int) -> pa.Table:
    """Return the table with nulls for what is hidden."""
    n_hidden = hidden[: table.num_rows]
    by_breakdown = {name: hidden[variables][counts.breakdown] for name, variables in counts.of_breakdown.items()}
    any_cell = np.bincount(counts.breakdown, n_hidden)[counts.breakdown] > 0
    uncorrected = any_cell | by_breakdown["num_abstained"] | by_breakdown["with_class"]
    masks = {
        "n": n_hidden,
        "share": n_hidden | by_breakdown["with_class"],
        **dict.fromkeys(("share_corrected", "share_low", "share_high"), uncorrected),
        **{name: hidden[counts.of_group[name]][counts.group] for name in _GROUP_COUNTS},
        "num_abstained": by_breakdown["num_abstained"],
        "n_unique": _with_total(table, np.bincount(counts.group, n_hidden)[counts.group] > 0),
    }
    num_cells = np.where(masks["n_unique"], np.bincount(counts.group)[counts.group], 0)
    masks["num_unique"] = _num_unique_hidden(table, masks, np.maximum(num_cells, min_cell))
    columns = {name: table.column(name) for name in table.column_names}
    for name, mask in masks.items():
        columns[name] = pc.if_else(pa.array(mask), pa.scalar(None, table.schema.field(name).type), columns[name])
    columns["correction"] = pc.if_else(pa.array(uncorrected), pa.scalar(SUPPRESSED), columns["correction"])
    columns["suppressed"] = pa.array(n_hidden)
    return pa.table(columns, schema=table.schema)


def _num_unique_hidden(table: pa.Table, masks: Mapping[str, BoolArray], smallest: IntArray) -> BoolArray:
    """Return a boolean for each row: whether its group has few distinct faces, or the number they are of is hidden.

    `smallest` is the smallest number to publish, of each row.
    """
    num_unique = pc.fill_null(table.column("num_unique"), 0).to_numpy()
    is_small = (num_unique > 0) & (num_unique < smallest)
    return _with_total(table, is_small | masks["num_faces"] | masks["num_flagged"])


def _with_total(table: pa.Table, hidden: BoolArray) -> BoolArray:
    """Hide the total if any group is hidden: the distinct faces of the groups mostly add up to it."""
    return np.asarray(hidden | (table.column("is_total").to_numpy() & hidden.any()), np.bool_)


def _numbered(table: pa.Table, names: list[str]) -> tuple[IntArray, IntArray]:
    """Number the distinct values of some columns in order of appearance; return (rows,) numbers and each first row."""
    number_of: dict[tuple[str | bool | None, ...], int] = {}
    columns = [table.column(name).to_pylist() for name in names]
    values = zip(*columns, strict=True) if columns else [()] * table.num_rows
    numbers = np.array([number_of.setdefault(value, len(number_of)) for value in values], np.int64)
    return numbers, np.unique(numbers, return_index=True)[1]


def _first_rows(columns: pa.Table, numbers: IntArray) -> list[tuple[str | bool | None, ...]]:
    """Return the values of the first row of each number."""
    first = np.unique(numbers, return_index=True)[1]
    return [tuple(row.values()) for row in columns.take(pa.array(first)).to_pylist()]

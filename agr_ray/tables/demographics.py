"""Turn counts of faces into demographic tables: raw shares, and shares corrected for the classifier's confusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.schema import ABSTAINED, DEMOGRAPHIC_ATTRIBUTES, DEMOGRAPHIC_COUNTS, DEMOGRAPHICS
from agr_ray.tables.duplicates import DistinctFaces
from agr_ray.tables.prevalence import IntArray, Shares, confusion_counts, true_shares, why_not, why_not_together

Classes = Mapping[str, Sequence[str]]
"""Attribute -> the names of its classes."""


class _Breakdown(NamedTuple):
    """Attributes by which the faces are broken down, and the classes of each."""

    attributes: tuple[str, ...]
    classes: Classes

    @property
    def factors(self) -> list[tuple[str, ...]]:
        """The attributes that share a confusion matrix: errors in age are taken as independent of the others."""
        rest = tuple(name for name in self.attributes if name != "age_group")
        return [part for part in ((("age_group",) if "age_group" in self.attributes else ()), rest) if part]

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The classes of every cell, in the label space's order."""
        return list(product(*(self.classes[name] for name in self.attributes)))


def demographics(
    counts: pa.Table,
    groups: pa.Table,
    calibration: Mapping[str, IntArray] | None,
    classes: Classes,
    seed: int = 0,
    distinct: DistinctFaces | None = None,
) -> pa.Table:
    """Break down the faces of each group, and of all groups together, by each attribute and by all of them jointly.

    `share` refers to the faces that got a class in all of the breakdown's attributes. `share_corrected` refers to all
    faces that passed the gates, abstentions included; `share_low` and `share_high` are its 90 % interval
    (`tables/prevalence.py`). In the joint table, errors in age are taken to be independent of errors in gender and
    race, given the true classes; errors in gender and race are measured together. So the joint table needs enough
    calibration images of every age group and of every pair of gender and race. A class with too few leaves its
    breakdowns uncorrected, and `correction` names it.

    Args:
        counts: grouping columns, age_group, gender, race and n: faces that passed the gates. An attribute may be
            `ABSTAINED`; attributes that were not predicted are not read.
        groups: a row for each group: the same grouping columns, num_images, num_no_face, num_rejected, num_faces and
            num_flagged. num_abstained is counted here, for each breakdown.
        calibration: (n,) arrays age_group, gender, race (-1: missing) and age_group_pred, gender_pred, race_pred (-1:
            abstained) of labelled images that training never saw; None: nothing is corrected.
        classes: of each attribute that was predicted, as `LabelSpace.classes`.
        seed: of the bootstrap.
        distinct: the faces of `counts`, with their groups in the order of `groups`; None: n_unique and num_unique are
            null.

    Returns:
        The grouping columns as strings, then `schema.DEMOGRAPHICS`: every cell of every group, zeros included, in the
        order of `groups` and of the schema. Last comes the total over all groups, marked by `is_total`. Without
        grouping columns, the only group is the total. Nothing is suppressed yet.

    Raises:
        ValueError: a group of `counts` is not among `groups` or is there twice, a class or attribute is unknown, or a
            grouping column has the name of a result column.
    """
    unknown = sorted(set(classes) - set(DEMOGRAPHIC_ATTRIBUTES))
    if unknown:
        raise ValueError(f"classes: {unknown[0]!r} is not one of {', '.join(DEMOGRAPHIC_ATTRIBUTES)}")
    predicted = tuple(name for name in DEMOGRAPHIC_ATTRIBUTES if name in classes)
    keys = [name for name in groups.column_names if name not in DEMOGRAPHIC_COUNTS]
    taken = [key for key in keys if key in DEMOGRAPHICS.names]
    if taken:
        raise ValueError(f"grouping column {taken[0]}: demographic tables already have a column of that name")
    faces = _faces(counts, groups, keys, predicted, classes)
    if keys:
        faces = np.concatenate([faces, faces.sum(axis=0, keepdims=True)])
        groups = _with_total(groups, keys)
    chosen = [(name,) for name in predicted] + ([predicted] if len(predicted) > 1 else [])
    breakdowns = [_Breakdown(attributes, classes) for attributes in chosen]
    parts = [_broken_down(faces, breakdown, predicted, calibration, seed, distinct) for breakdown in breakdowns]
    table = pa.concat_tables(parts) if parts else pa.table({"group": pa.array([], pa.int64()), **_empty()})
    group = table.column("group").to_numpy()
    order = pa.array(np.argsort(group, kind="stable"))
    table, group = table.take(order), pa.array(np.sort(group))
    columns = {key: groups.column(key).cast(pa.string()).take(group) for key in keys}
    table = table.append_column("is_total", pc.equal(group, groups.num_rows - 1))
    for field in DEMOGRAPHICS:
        from_groups = field.name in DEMOGRAPHIC_COUNTS and field.name != "num_abstained"
        columns[field.name] = groups.column(field.name).take(group) if from_groups else table.column(field.name)
    return pa.table(columns, schema=pa.schema([*(pa.field(key, pa.string()) for key in keys), *DEMOGRAPHICS]))


def _with_total(groups: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Return the groups and, as the last row, the sums over all of them; its `keys` are null."""
    counts = [name for name in groups.column_names if name not in keys]
    total = dict.fromkeys(keys) | {name: pc.sum(groups.column(name), min_count=0).as_py() for name in counts}
    return pa.concat_tables([groups, pa.Table.from_pylist([total], schema=groups.schema)])


def _faces(
    counts: pa.Table, groups: pa.Table, keys: Sequence[str], attributes: Sequence[str], classes: Classes
) -> IntArray:
    """Return the numbers of faces, (groups, classes + 1 for each attribute); the last index is "abstained"."""
    row_of = {tuple(row.values()): i for i, row in enumerate(groups.select(keys).to_pylist())} if keys else {(): 0}
    if len(row_of) != groups.num_rows:
        raise ValueError(f"groups: {groups.num_rows - len(row_of)} rows are duplicates")
    shape = [groups.num_rows, *(len(classes[name]) + 1 for name in attributes)]
    faces = np.zeros(shape, np.int64)
    rows = zip(*(counts.column(key).to_pylist() for key in keys), strict=True) if keys else [()] * counts.num_rows
    try:
        index = [np.array([row_of[row] for row in rows], np.int64)]
    except KeyError as error:
        raise ValueError(f"counts: group {error.args[0]} is not among the groups") from None
    for name in attributes:
        code_of = {label: code for code, label in enumerate((*classes[name], ABSTAINED))}
        try:
            index.append(np.array([code_of[label] for label in counts.column(name).to_pylist()], np.int64))
        except KeyError as error:
            raise ValueError(f"counts: {name} {error.args[0]!r} is not one of {', '.join(code_of)}") from None
    np.add.at(faces, tuple(index), counts.column("n").to_numpy())
    return faces


def _broken_down(
    faces: IntArray,
    breakdown: _Breakdown,
    attributes: Sequence[str],
    calibration: Mapping[str, IntArray] | None,
    seed: int,
    distinct: DistinctFaces | None,
) -> pa.Table:
    """Return a row for each cell of each group: `group` and the columns of DEMOGRAPHICS except the groups' counts."""
    others = tuple(1 + i for i, name in enumerate(attributes) if name not in breakdown.attributes)
    outcomes = faces.sum(axis=others)
    n = outcomes[(slice(None), *(slice(-1) for _ in breakdown.attributes))].reshape(len(faces), -1)
    accepted = n.sum(axis=1)
    shares, reasons = _corrected(outcomes, breakdown, calibration, seed)
    num_groups, num_cells = n.shape
    cells = list(zip(*breakdown.cells, strict=True))
    labels = dict(zip(breakdown.attributes, cells, strict=True))
    with np.errstate(invalid="ignore"):
        share = n / accepted[:, None]
    n_unique = num_unique = pa.nulls(n.size, pa.int64())
    if distinct is not None:  # its last row is the total, which is the only group if there are no grouping columns
        classes = {name: breakdown.classes[name] for name in breakdown.attributes}
        n_unique = pa.array(distinct.per_cell(classes)[:num_groups].ravel())
        num_unique = pa.array(np.repeat(distinct.per_group()[:num_groups], num_cells))
    return pa.table(
        {
            "group": np.repeat(np.arange(num_groups), num_cells),
            "breakdown": [",".join(breakdown.attributes)] * n.size,
            **{
                name: pa.array(list(labels.get(name, [None] * num_cells)) * num_groups, pa.string())
                for name in DEMOGRAPHIC_ATTRIBUTES
            },
            "n": n.ravel(),
            "share": _nullable(share),
            "share_corrected": _nullable(shares.share),
            "share_low": _nullable(shares.low),
            "share_high": _nullable(shares.high),
            "correction": pa.array([reason for reason in reasons for _ in range(num_cells)], pa.string()),
            "suppressed": np.zeros(n.size, bool),
            "num_abstained": np.repeat(outcomes.reshape(num_groups, -1).sum(axis=1) - accepted, num_cells),
            "n_unique": n_unique,
            "num_unique": num_unique,
        }
    )


def _corrected(
    outcomes: IntArray, breakdown: _Breakdown, calibration: Mapping[str, IntArray] | None, seed: int
) -> tuple[Shares, list[str | None]]:
    """Return the corrected shares of each group, and the reason if there are none; None if there are."""
    num_groups = len(outcomes)
    if calibration is None:
        return _no_shares(num_groups, len(breakdown.cells)), ["no calibration"] * num_groups
    confusions = []
    for factor in breakdown.factors:
        sizes = [len(breakdown.classes[name]) for name in factor]
        truth = [calibration[name] for name in factor]
        outcome = [calibration[f"{name}_pred"] for name in factor]
        confusions.append(confusion_counts(truth, outcome, sizes))
        reason = why_not(confusions[-1], [" ".join(cell) for cell in _Breakdown(factor, breakdown.classes).cells])
        if reason is not None:
            return _no_shares(num_groups, len(breakdown.cells)), [f"{','.join(factor)}: {reason}"] * num_groups
    reason = why_not_together(confusions)
    if reason is not None:
        reason = f"{','.join(breakdown.attributes)}: {reason}"
        return _no_shares(num_groups, len(breakdown.cells)), [reason] * num_groups
    counts = outcomes.reshape(num_groups, -1)
    return true_shares(counts, confusions, seed), [None if total else "no faces" for total in counts.sum(axis=1)]


def _no_shares(num_groups: int, num_cells: int) -> Shares:
    return Shares(*(np.full((num_groups, num_cells), np.nan) for _ in Shares._fields))


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values.ravel(), pa.float64(), from_pandas=True)


def _empty() -> dict[str, pa.Array]:
    return {field.name: pa.array([], field.type) for field in DEMOGRAPHICS if field.name != "is_total"}

"""Shares of a scored bucket: the headline, and a chart and a table for each attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.labels import LabelSpace
from agr_ray.models.card_tables import words
from agr_ray.report.charts import Dot, Scale, dot_drawing
from agr_ray.report.page import Block, Drawing, Drawings, Paragraph, Table
from agr_ray.schema import DEMOGRAPHIC_ATTRIBUTES
from agr_ray.tables.suppression import SUPPRESSED

SHARE: Final = Scale("share, %", 100.0, 1, from_zero=True, interval_title="90 % interval")
UNDECIDED: Final = "undecided (the model abstained)"
_MOSTLY: Final = 0.5
"""Share of undecided faces above which the headline names no class."""

Row = Mapping[str, Any]
"""A row of schema.DEMOGRAPHICS."""


def headline(demographics: pa.Table) -> str:
    """Return how many faces were counted, and for each attribute the most frequent class, if the data show one."""
    totals = totals_of(demographics)
    if totals is None:
        return "No face was counted."
    faces = num_counted(totals)
    if faces is None:
        sentence = "The number of faces is hidden."
    else:
        images = "" if totals["num_images"] is None else f" of {totals['num_images']:,} photographs"
        sentence = f"{faces:,} faces{images} were counted."
    parts = (_most_frequent(attribute, total_rows(demographics, attribute)) for attribute in attributes(demographics))
    return " ".join([sentence, *(part for part in parts if part)])


def _most_frequent(attribute: str, rows: Sequence[Row]) -> str:
    """Return a sentence about the most frequent class of an attribute; empty if all counts are 0 or hidden."""
    faces, undecided = num_counted(rows[0]), rows[0]["num_abstained"]
    title = words(attribute).capitalize()
    if faces and undecided and undecided > _MOSTLY * faces:
        return f"{title}: undecided for {100 * undecided / faces:.0f} % ({undecided:,} of {faces:,} faces)."
    rest = f"; {undecided:,} undecided" if undecided else ""
    if rows[0]["share_corrected"] is not None:
        ranked = sorted(rows, key=lambda row: -row["share_corrected"])
        of = "" if faces is None else f" of {faces:,} faces"
        texts = [
            f"{row[attribute]} {100 * row['share_corrected']:.0f} % ({100 * row['share_low']:.0f} to "
            f"{100 * row['share_high']:.0f} %)"
            for row in ranked[:2]
        ]
        others_high = max((row["share_high"] for row in ranked[1:]), default=-1.0)
        if ranked[0]["share_low"] <= others_high:
            shown = f"no class is clearly the most frequent; {', '.join(texts)}"
        else:
            shown = texts[0]
        return f"{title}: {shown}{of}, corrected for the model's errors, with 90 % intervals{rest}."
    known = [row for row in rows if row["n"]]
    if not known:
        return ""
    most = max(known, key=lambda row: int(row["n"]))
    of = "" if faces is None else f" of {faces:,}"
    share = "" if not faces else f" ({100 * most['n'] / faces:.0f} %)"
    return (
        f"{title}: {most[attribute]} is predicted most often, for {most['n']:,}{of} faces{share}, not corrected for "
        f"the model's errors{rest}."
    )


def shares(demographics: pa.Table, space: LabelSpace) -> list[Block]:
    """Return, for each attribute, a chart and a table of the shares of all groups together."""
    drawings: list[Drawing] = []
    tables: list[Block] = []
    for attribute in attributes(demographics):
        rows = _in_order(total_rows(demographics, attribute), attribute, space)
        drawings.append(_share_chart(attribute, rows))
        tables.append(_share_table(attribute, rows))
        tables += [Paragraph(text, "note") for text in _uncorrected(attribute, rows)]
    return [*([Drawings(drawings)] if drawings else []), *tables]


def _share_chart(attribute: str, rows: Sequence[Row]) -> Drawing:
    """Return a chart of the corrected shares, or of the shares of all counted faces, and of the undecided ones."""
    is_corrected = any(row["share_corrected"] is not None for row in rows)
    dots = [
        Dot(
            row[attribute],
            row["share_corrected"] if is_corrected else part_of_counted(row["n"], row),
            interval(row),
            "(hidden)" if row["suppressed"] else f"n={row['n']:,}",
        )
        for row in rows
    ]
    undecided = rows[0]["num_abstained"]
    caption = f"{words(attribute).capitalize()}: " + (
        "shares of all counted faces, corrected for the model's errors, with 90 % intervals."
        if is_corrected
        else "shares of all counted faces. They include the model's errors."
    )
    if undecided:
        dots.append(Dot("undecided", part_of_counted(undecided, rows[0]), None, f"n={undecided:,}"))
        caption += " Undecided: faces on which the model abstained"
        caption += ", to which the corrected shares refer, too." if is_corrected else "."
    caption += " n: faces for which the model predicted the class."
    return dot_drawing(f"share-{attribute.replace('_', '-')}", caption, dots, SHARE)


def _share_table(attribute: str, rows: Sequence[Row]) -> Table:
    has_unique = any(row["n_unique"] is not None for row in rows)
    columns = ["faces", *(["distinct faces"] if has_unique else []), "% of counted faces", "corrected share, %"]
    columns.append("90 % interval")
    cells = [
        [
            str(row[attribute]),
            count(row["n"], hidden=row["suppressed"]),
            *([count(row["n_unique"], hidden=row["suppressed"])] if has_unique else []),
            SHARE.text(part_of_counted(row["n"], row)),
            SHARE.text(row["share_corrected"]),
            SHARE.interval_text(interval(row)),
        ]
        for row in rows
    ]
    undecided = rows[0]["num_abstained"]
    if undecided != 0:
        share = SHARE.text(part_of_counted(undecided, rows[0]))
        cells.append([UNDECIDED, count(undecided), *([""] if has_unique else []), share, "", ""])
    return Table((f"perceived {words(attribute)}", *columns), cells, caption=f"By {words(attribute)}")


def _uncorrected(attribute: str, rows: Sequence[Row]) -> list[str]:
    """Return why shares are not corrected, in sentences."""
    title = f"Corrected shares by {words(attribute)} are not shown"
    reasons = dict.fromkeys(row["correction"] for row in rows if row["correction"])
    return [
        f"{title}, because they would reveal hidden counts."
        if reason == SUPPRESSED
        else f"{title}: {words(reason.removeprefix(f'{attribute}: '))}."
        for reason in reasons
    ]


def part_of_counted(number: int | None, row: Row) -> float | None:
    """Return a number of faces as a fraction of the counted ones of the row's group; None if one of them is hidden."""
    faces = num_counted(row)
    return None if number is None or not faces else number / faces


def num_counted(row: Row) -> int | None:
    """Return the number of counted faces of a row's group, undecided ones included; None if it is hidden."""
    if row["num_faces"] is None or row["num_flagged"] is None:
        return None
    return int(row["num_faces"] - row["num_flagged"])


def best_share(row: Row) -> float | None:
    """Return the corrected share, or that of the faces with a predicted class where there is none."""
    share = row["share_corrected"] if row["share_corrected"] is not None else row["share"]
    return None if share is None else float(share)


def interval(row: Row) -> list[float] | None:
    """Return the interval of the corrected share; None if there is none."""
    low, high = row["share_low"], row["share_high"]
    return None if low is None or high is None else [low, high]


def attributes(demographics: pa.Table) -> list[str]:
    """Return the attributes that the model predicts."""
    present = set(pc.unique(demographics["breakdown"]).to_pylist())
    return [name for name in DEMOGRAPHIC_ATTRIBUTES if name in present]


def total_rows(demographics: pa.Table, attribute: str) -> list[dict[str, Any]]:
    """Return the rows of an attribute's classes, of all groups together."""
    rows = demographics.filter(pc.and_(demographics["is_total"], pc.equal(demographics["breakdown"], attribute)))
    return list(rows.to_pylist())


def totals_of(demographics: pa.Table) -> dict[str, Any] | None:
    """Return a row with the counts of all groups together; None if there are no faces to count."""
    rows = demographics.filter(demographics["is_total"]).slice(0, 1).to_pylist()
    return rows[0] if rows else None


def _in_order(rows: Sequence[dict[str, Any]], attribute: str, space: LabelSpace) -> list[dict[str, Any]]:
    places = {name: place for place, name in enumerate(space.classes[attribute])}
    return sorted(rows, key=lambda row: places.get(row[attribute], len(places)))


def count(number: int | None, *, hidden: bool = True) -> str:
    """Return a count; a missing one is hidden."""
    if number is None:
        return "hidden" if hidden else ""
    return f"{number:,}"

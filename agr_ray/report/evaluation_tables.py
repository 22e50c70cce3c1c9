"""Tables of an evaluation's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from agr_ray.evaluation.cells import BREAKDOWNS
from agr_ray.models.card_tables import Rows, between, number, threshold_rows, words
from agr_ray.report.page import Block, Cell, Fold, Table

_BREAKDOWN_WORDS: Final = {
    "gender_race": "gender and race",
    "gender_age_group": "gender and age group",
    "race_age_group": "race and age group",
}
_GROUP_COLUMNS: Final = (
    ("age", "mae_years", "age MAE, years", 1.0, ".2f"),
    ("age", "bias_years", "age bias, years", 1.0, "+.2f"),
    ("age", "exact_group", "in the right age group, %", 100.0, ".1f"),
    ("gender", "accuracy", "gender, %", 100.0, ".1f"),
    ("race", "accuracy", "race, %", 100.0, ".1f"),
    ("detector", "fallback_share", "no face found, %", 100.0, ".1f"),
)


def rows_table(rows: Rows, *, num_text_columns: int = 1, is_headline: bool = False, caption: str = "") -> Table:
    """Return the table of a model card as a table of a page."""
    return Table(rows.header, rows.rows, num_text_columns=num_text_columns, is_headline=is_headline, caption=caption)


def confusion(what: str, names: Sequence[str], counts: Sequence[Sequence[int]] | None) -> list[Block]:
    """Return a confusion matrix: rows are the truth; a cell is shaded by its share of the row."""
    if counts is None or not any(map(sum, counts)):
        return []
    rows: list[list[str | Cell]] = []
    for name, line, place in zip(names, counts, range(len(names)), strict=True):
        total = sum(line)
        if total:
            cells = [
                Cell(f"{count:,}" if count else "", shade=0.6 * count / total, is_strong=column == place)
                for column, count in enumerate(line)
            ]
            rows.append([name, *cells, f"{total:,}", f"{100 * line[place] / total:.1f} %"])
    return [
        Table(
            ("true \\ predicted", *names, "images", "accuracy"),
            rows,
            caption=f"Confusion of {what}",
            note="A row is a true class. The stronger a cell's colour, the larger its share of the row.",
        )
    ]


def group_tables(metrics: Mapping[str, Any]) -> list[Block]:
    """Return a table for each breakdown, with an interval after each value."""
    blocks: list[Block] = []
    for breakdown in BREAKDOWNS:
        groups = {name: of for name, of in metrics["groups"][breakdown].items() if of["n"]}
        columns = [
            column
            for column in _GROUP_COLUMNS
            if any(of[column[0]].get(column[1]) is not None for of in groups.values())
        ]
        rows: list[list[str | Cell]] = []
        for name, of in groups.items():
            row: list[str | Cell] = [words(name), Cell(f"{of['n']:,}", key=of["n"])]
            for task, key, _, factor, form in columns:
                value = of[task].get(key)
                shown = number(value, factor, "", form)
                interval = between(of["intervals"][task].get(key), factor, " ")
                row.append(Cell(f"{shown} ({interval})" if interval else shown, key="" if value is None else value))
            rows.append(row)
        if rows:
            header = (f"true {words(breakdown)}", "images", *(column[2] for column in columns))
            blocks.append(
                Fold(f"By {_BREAKDOWN_WORDS.get(breakdown, words(breakdown))}", [Table(header, rows, is_sortable=True)])
            )
    return blocks


def threshold_table(thresholds: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Return the rates at each age limit, with and without a buffer."""
    rows = threshold_rows(thresholds)
    return [rows_table(rows)] if rows.rows else []

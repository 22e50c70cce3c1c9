"""The page of a scored bucket: who is in the photographs, how sure that is, and what could not be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.evaluation.shift import QUANTITIES, not_compared_lines
from agr_ray.labels import LabelSpace
from agr_ray.models.card_tables import listed, words
from agr_ray.report.charts import Line, Scale, line_drawing
from agr_ray.report.page import Block, Cell, Drawings, Page, Paragraph, Section, Table, Values, flat
from agr_ray.report.pyramid import population_pyramid
from agr_ray.report.scores_model import model_blocks, model_warnings
from agr_ray.report.scores_shares import (
    SHARE,
    attributes,
    best_share,
    count,
    headline,
    interval,
    part_of_counted,
    shares,
    totals_of,
)
from agr_ray.report.terms import COUNTED

MAX_GROUPS: Final = 1000
"""Groups in a table."""
_MAX_PLACES: Final = 400
"""Groups in a chart."""
_RUNS_NOTE: Final = (
    "Bold: the run of this page. Settings: digest of the settings and the calibration. Do not add up runs of different "
    "models or settings: they have scored the same photographs."
)
_NAMES: Final = {"age_group": "age", "gender": "gender", "race": "race"}
_Group = tuple[str | None, ...]
"""Values of the grouping columns."""


@dataclass(frozen=True)
class ScoredBucket:
    """A results folder, of which one run is shown in detail."""

    uri: str
    record: Mapping[str, Any]
    """`_SUCCESS/run=ID.json` of the run."""
    demographics: pa.Table
    """schema.DEMOGRAPHICS of the run, with its grouping columns."""
    runs: Sequence[Mapping[str, Any]]
    """Records of all published runs, oldest first."""
    over_time: pa.Table
    """Shares over all groups of the runs of the same model and settings, with the column `run`."""
    mean_width_years: float | None = None
    """Mean width of the age intervals of the run's faces; None: they have none, or it published no rows."""
    quality: Sequence[Mapping[str, Any]] = ()
    """`name`, `low`, `median` and `high` of the faces of the run; empty: it published no rows."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """An error for some statuses of rejected images."""


def scores_page(bucket: ScoredBucket) -> Page:
    """Return the page."""
    record = bucket.record
    space = LabelSpace.from_json(record["label_space"])
    sections = [
        Section("faces", "Perceived demographics", _faces(bucket, space)),
        Section("shares", "Shares", shares(bucket.demographics, space)),
        Section(
            "model",
            "How good is the model?",
            model_blocks(record, bucket.demographics, bucket.mean_width_years),
        ),
        Section("groups", "By group", _groups(bucket, space)),
        Section("time", "Over time", _over_time(bucket, space)),
        Section("shift", "Are these faces like the calibration images?", _shift(record)),
        Section("quality", "Quality of the faces", _quality(bucket)),
        Section("images", "Images by status", _rejects(bucket)),
        Section("runs", "All runs", [_runs(bucket)]),
        Section("about", "About this page", [Values(_about(bucket))]),
    ]
    return Page(
        _title(bucket),
        [Paragraph(headline(bucket.demographics), "verdict"), *_warnings(record), *_scope(bucket)],
        [section for section in sections if section.blocks],
        COUNTED,
    )


def _title(bucket: ScoredBucket) -> str:
    names = [_NAMES[name] for name in attributes(bucket.demographics)]
    return (
        f"Perceived {listed(names)} in {bucket.record.get('input', bucket.uri)}" if names else f"Faces in {bucket.uri}"
    )


def _warnings(record: Mapping[str, Any]) -> list[Block]:
    texts = model_warnings(record)
    if not record["calibrated"]:
        because = record.get("uncalibrated_because") or "the model has no calibration"
        texts.append(f"Not calibrated ({because}): ages have no intervals, and shares are not corrected.")
    if record.get("calibration_warning"):
        texts.append(f"Calibration: {record['calibration_warning']}.")
    shift = record["shift"]
    if shift["verdict"] in ("photographs_differ", "predictions_differ"):
        texts.append(f"Shift: {shift['sentence']}.")
    return [Paragraph(text, "warning") for text in texts]


def _scope(bucket: ScoredBucket) -> list[Block]:
    record = bucket.record
    text = (
        "All attributes are perceived: what the model reads from a picture. They say nothing certain about one person. "
        f"This page shows run {record['run_id']}"
    )
    if len(bucket.runs) > 1:
        text += f", one of {len(bucket.runs):,} runs. A run scores only images that are new or changed"
        if any(_scored_by(each) != _scored_by(record) for each in bucket.runs):
            text += ". Runs with another model, calibration or setting may have scored the same photographs again"
    return [Paragraph(f"{text}.")]


def _scored_by(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return what determines the predictions of a run: the model, and its settings with its calibration."""
    return record["model_digest"], record["config_digest"]


def _faces(bucket: ScoredBucket, space: LabelSpace) -> list[Block]:
    totals = totals_of(bucket.demographics)
    if not totals:
        return [Paragraph("No face was counted.", "note")]
    names = {
        "num_images": "images",
        "num_no_face": "without a face",
        "num_rejected": "rejected",
        "num_faces": "faces",
        "num_flagged": "flagged: too small, blurred, turned away or uncertain, and not counted",
        "num_unique": "distinct faces among those counted: near-duplicates count once",
    }
    rows = [
        (title, count(totals[key])) for key, title in names.items() if key != "num_unique" or totals[key] is not None
    ]
    blocks: list[Block] = [Table(("", "number"), rows)]
    if {"age", "gender"} <= {"age" if name == "age_group" else name for name in attributes(bucket.demographics)}:
        pyramid = population_pyramid(bucket.demographics, space)
        blocks.append(
            Paragraph("There is no population pyramid, because it would show no face.", "note")
            if pyramid is None
            else pyramid
        )
    return blocks


def _groups(bucket: ScoredBucket, space: LabelSpace) -> list[Block]:
    """Return a table for each attribute: a row for each group, a column for each class."""
    names = list(bucket.record["group_by"])
    if not names:
        return []
    blocks: list[Block] = []
    table = bucket.demographics.filter(pc.invert(bucket.demographics["is_total"]))
    for attribute in attributes(bucket.demographics):
        own = table.filter(pc.equal(table["breakdown"], attribute))
        classes = space.classes[attribute]
        by_group: dict[_Group, dict[str, Mapping[str, Any]]] = {}
        for row in own.to_pylist():
            by_group.setdefault(tuple(row[name] for name in names), {})[row[attribute]] = row
        note = (
            "Corrected shares where there are any, otherwise shares of the faces with a predicted class. Undecided: "
            "share of the counted faces on which the model abstained."
        )
        if len(by_group) > MAX_GROUPS:
            most = sorted(by_group, key=lambda group: -(next(iter(by_group[group].values()))["num_faces"] or 0))
            note += f" The {MAX_GROUPS:,} groups of {len(by_group):,} with the most faces; demographics/ has all."
            by_group = {group: by_group[group] for group in most[:MAX_GROUPS]}
        groups = sorted(by_group, key=_group_order)
        rows = [[*map(_group_name, group), *_group_cells(by_group[group], classes)] for group in groups]
        columns = (*names, "images", "faces", *(f"{name}, %" for name in classes), "undecided, %")
        caption = f"Shares by {', '.join(names)} and {words(attribute)}"
        blocks.append(Table(columns, rows, num_text_columns=len(names), caption=caption, note=note, is_sortable=True))
        if len(names) == 1:
            blocks += _group_chart(attribute, names[0], {group: by_group[group] for group in groups}, classes)
    return blocks


def _group_order(group: _Group) -> list[tuple[bool, str]]:
    """Sort groups by their values, null last."""
    return [(value is None, value or "") for value in group]


def _group_name(value: str | None) -> str:
    return "(none)" if value is None else value


def _group_cells(cells: Mapping[str, Mapping[str, Any]], classes: Sequence[str]) -> list[str | Cell]:
    first = next(iter(cells.values()))
    row: list[str | Cell] = [
        Cell(count(first[name], hidden=first[name] is None), key=first[name] or 0)
        for name in ("num_images", "num_faces")
    ]
    for name in classes:
        share = best_share(cells[name]) if name in cells else None
        row.append(_share_cell(share))
    return [*row, _share_cell(part_of_counted(first["num_abstained"], first))]


def _share_cell(share: float | None) -> Cell:
    return Cell(SHARE.text(share), key="" if share is None else share)


def _group_chart(
    attribute: str,
    name: str,
    by_group: Mapping[_Group, Mapping[str, Mapping[str, Any]]],
    classes: Sequence[str],
) -> list[Block]:
    """Return a chart of the shares over the groups, which are the values of one column, such as days."""
    if not 2 <= len(by_group) <= _MAX_PLACES:
        return []
    places = list(range(len(by_group)))
    lines = [_share_line(each, [cells.get(each) for cells in by_group.values()], places) for each in classes]
    x = Scale(name, names=tuple(_group_name(group[0]) for group in by_group))
    caption = f"{words(attribute).capitalize()} by {name}.{_bands(lines)}"
    return [line_drawing(f"groups-{attribute.replace('_', '-')}", caption, lines, x, SHARE, width_inches=6.5)]


def _over_time(bucket: ScoredBucket, space: LabelSpace) -> list[Block]:
    """Return a chart for each attribute: shares of each run's own images."""
    table = bucket.over_time
    runs = list(dict.fromkeys(table["run"].to_pylist()))
    if len(runs) < 2:
        return []
    others = sum(_scored_by(record) != _scored_by(bucket.record) for record in bucket.runs)
    note = f" Runs with another model, calibration or setting are left out ({others:,})." if others else ""
    drawings = []
    for attribute in attributes(table):
        rows = table.filter(pc.equal(table["breakdown"], attribute)).to_pylist()
        found = {(row["run"], row[attribute]): row for row in rows}
        lines = [
            _share_line(name, [found.get((run, name)) for run in runs], list(range(len(runs))))
            for name in space.classes[attribute]
        ]
        x = Scale("run", names=tuple(f"{run[:4]}-{run[4:6]}-{run[6:8]} {run[9:11]}:{run[11:13]}" for run in runs))
        caption = f"{words(attribute).capitalize()} in the images of each run.{_bands(lines)}{note}"
        drawings.append(line_drawing(f"time-{attribute.replace('_', '-')}", caption, lines, x, SHARE))
    return [Drawings(drawings)] if drawings else []


def _bands(lines: Sequence[Line]) -> str:
    """Return what the bands are, or, without bands, what the shares are."""
    if any(line.low for line in lines):
        return " Bands: 90 % intervals of corrected shares."
    return " Shares of the faces with a predicted class, not corrected for the model's errors."


def _share_line(name: str, rows: Sequence[Mapping[str, Any] | None], x: Sequence[float]) -> Line:
    values = [None if row is None else best_share(row) for row in rows]
    intervals = [None if row is None else interval(row) for row in rows]
    if not any(intervals):
        return Line(name, x, values)
    low, high = ([None if interval is None else interval[end] for interval in intervals] for end in (0, 1))
    return Line(name, x, values, low, high)


def _shift(record: Mapping[str, Any]) -> list[Block]:
    shift = record["shift"]
    blocks: list[Block] = [Paragraph(f"{shift['sentence'][0].upper()}{shift['sentence'][1:]}.")]
    titles = {quantity.name: quantity.words for quantity in QUANTITIES}
    quantities = shift["quantities"]
    blocks += [Paragraph(f"{line[0].upper()}{line[1:]}.", "note") for line in not_compared_lines(quantities)]
    rows, drawings = [], []
    for each in quantities:
        if each["verdict"] == "not_compared":
            continue
        index, limit = each.get("statistic"), each.get("threshold")
        verdict = Cell(words(each["verdict"]), is_strong=each["verdict"] == "shifted")
        numbers = ("" if value is None else f"{value:.3f}" for value in (index, limit))
        rows.append([titles[each["quantity"]], verdict, *numbers, each["sentence"]])
        bins = each.get("bins") or []
        if each["verdict"] == "shifted" and bins:
            places = list(range(len(bins)))
            lines = [Line("these faces", places, each["shares"]), Line("calibration", places, each["reference_shares"])]
            caption = f"{titles[each['quantity']].capitalize()}: these faces and the calibration images."
            x = Scale(titles[each["quantity"]], names=tuple(bins))
            drawings.append(line_drawing(f"shift-{each['quantity'].replace('_', '-')}", caption, lines, x, SHARE))
    if rows:
        columns = ("quantity", "verdict", "stability index", "alarm above", "largest difference")
        blocks.append(Table(columns, rows, num_text_columns=2, last_is_text=True))
    return [*blocks, *([Drawings(drawings)] if drawings else [])]


def _quality(bucket: ScoredBucket) -> list[Block]:
    if not bucket.quality:
        return []
    rows = [(each["name"], *(f"{each[key]:.4g}" for key in ("low", "median", "high"))) for each in bucket.quality]
    return [Table(("of the faces of this run", "10th percentile", "median", "90th percentile"), rows)]


def _rejects(bucket: ScoredBucket) -> list[Block]:
    counts = bucket.record.get("counts")
    if counts is None:
        return [Paragraph("Counts are hidden, because the run was scored with score.min_cell.", "note")]
    total = sum(counts.values()) or 1
    rows = [
        (words(status), f"{number:,}", f"{100 * number / total:.1f} %", bucket.examples.get(status, ""))
        for status, number in counts.items()
    ]
    return [Table(("status", "images", "% of images", "an example"), rows, last_is_text=True)]


def _runs(bucket: ScoredBucket) -> Table:
    rows = []
    for record in bucket.runs:
        is_shown = record["run_id"] == bucket.record["run_id"]
        rows.append(
            [
                Cell(record["run_id"], is_strong=is_shown),
                record["published_at"][:16].replace("T", " "),
                record["model_digest"][:8],
                record["config_digest"][:8],
                *(Cell(count(record.get(name)), key=record.get(name) or 0) for name in ("num_images", "num_faces")),
                words(record["shift"]["verdict"]),
            ]
        )
    columns = ("run", "published", "model", "settings", "images", "faces", "shift")
    return Table(columns, rows, num_text_columns=4, is_sortable=True, last_is_text=True, note=_RUNS_NOTE)


def _about(bucket: ScoredBucket) -> dict[str, str]:
    record = bucket.record
    return {
        "results": bucket.uri,
        "run": record["run_id"],
        "digest of the model": record["model_digest"],
        "digest of the settings": record["config_digest"],
        "precision": ", ".join(record["precisions"]),
        "score.min_cell": str(record["min_cell"] or "not set"),
        **flat({section: record.get(section) or {} for section in ("vision", "predict")}),
    }

"""The page of a scored bucket: who is in the photographs, how sure that is, and what could not be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.evaluation.shift import QUANTITIES
from agr_ray.labels import LabelSpace
from agr_ray.models.card_tables import listed, words
from agr_ray.report.charts import Dot, Line, Scale, dot_drawing, line_drawing
from agr_ray.report.page import Block, Cell, Drawing, Drawings, Page, Paragraph, Section, Table, Values, flat
from agr_ray.report.pyramid import population_pyramid
from agr_ray.report.terms import COUNTED
from agr_ray.schema import DEMOGRAPHIC_ATTRIBUTES
from agr_ray.tables.suppression import SUPPRESSED

_SHARE: Final = Scale("share, %", 100.0, 1, from_zero=True, interval_title="90 % interval")
MAX_GROUPS: Final = 1000
"""Groups in a table."""
_MAX_PLACES: Final = 400
"""Groups in a chart."""
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
    """Shares over all groups of the runs of the same model, with the column `run`."""
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
        Section("shares", "Shares", _shares(bucket, space)),
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
        [Paragraph(_verdict(bucket), "verdict"), *_warnings(record), *_scope(bucket)],
        [section for section in sections if section.blocks],
        COUNTED,
    )


def _title(bucket: ScoredBucket) -> str:
    names = [_NAMES[name] for name in _attributes(bucket.demographics)]
    return (
        f"Perceived {listed(names)} in {bucket.record.get('input', bucket.uri)}" if names else f"Faces in {bucket.uri}"
    )


def _verdict(bucket: ScoredBucket) -> str:
    totals = _totals(bucket.demographics)
    if not totals:
        return "No face was counted."
    parts, corrected = [], []
    for attribute in _attributes(bucket.demographics):
        rows = [row for row in _total_rows(bucket.demographics, attribute) if _best(row) is not None]
        if rows:
            most = max(rows, key=lambda row: _best(row) or 0.0)
            years = " years" if attribute == "age_group" else ""
            parts.append(f"{most[attribute]}{years} ({100 * (_best(most) or 0.0):.0f} %)")
            if most["share_corrected"] is not None:
                corrected.append(_NAMES[attribute])
    if totals["num_faces"] is None:
        sentence = "The number of faces is hidden"
    else:
        counted = totals["num_faces"] - (totals["num_flagged"] or 0)
        images = "" if totals["num_images"] is None else f" of {totals['num_images']:,} photographs"
        sentence = f"{counted:,} faces{images} were counted"
    if not parts:
        return f"{sentence}."
    kind = "shares include the model's errors"
    if len(corrected) == len(parts):
        kind = "shares are corrected for the model's error rates"
    elif corrected:
        kind = f"shares by {' and '.join(corrected)} are corrected for the model's error rates, the others include them"
    return f"{sentence}. Most frequent: {', '.join(parts)}; {kind}."


def _best(row: Mapping[str, Any]) -> float | None:
    """Return the corrected share, or the plain one where there is none."""
    share = row["share_corrected"] if row["share_corrected"] is not None else row["share"]
    return None if share is None else float(share)


def _warnings(record: Mapping[str, Any]) -> list[Block]:
    texts = []
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
        numbers = [each["num_images"] for each in bucket.runs if "num_images" in each]
        are_known = len(numbers) == len(bucket.runs)
        total = f", which scored {sum(numbers):,} images in total" if are_known else ""
        text += f", one of {len(bucket.runs):,} runs{total}. A run scores only images that are new or changed"
    return [Paragraph(f"{text}.")]


def _faces(bucket: ScoredBucket, space: LabelSpace) -> list[Block]:
    totals = _totals(bucket.demographics)
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
        (title, _count(totals[key])) for key, title in names.items() if key != "num_unique" or totals[key] is not None
    ]
    blocks: list[Block] = [Table(("", "number"), rows)]
    if {"age", "gender"} <= {"age" if name == "age_group" else name for name in _attributes(bucket.demographics)}:
        blocks.append(population_pyramid(bucket.demographics, space))
    return blocks


def _shares(bucket: ScoredBucket, space: LabelSpace) -> list[Block]:
    """Return, for each attribute, a chart and a table of the shares of all groups together."""
    drawings: list[Drawing] = []
    tables: list[Block] = []
    for attribute in _attributes(bucket.demographics):
        rows = _in_order(_total_rows(bucket.demographics, attribute), attribute, space)
        if not rows:
            continue
        is_corrected = any(row["share_corrected"] is not None for row in rows)
        dots = [
            Dot(row[attribute], _best(row), _interval(row), "(hidden)" if row["suppressed"] else "") for row in rows
        ]
        caption = f"{words(attribute).capitalize()}: " + (
            "corrected shares of all counted faces, with 90 % intervals."
            if is_corrected
            else "shares of the faces with a predicted class. They include the model's errors."
        )
        drawings.append(dot_drawing(f"share-{attribute.replace('_', '-')}", caption, dots, _SHARE))
        tables.append(_share_table(attribute, rows))
        tables += [Paragraph(text, "note") for text in _uncorrected(attribute, rows)]
    return [*([Drawings(drawings)] if drawings else []), *tables]


def _uncorrected(attribute: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return why shares are not corrected, in sentences."""
    shares = f"Corrected shares by {words(attribute)} are not shown"
    reasons = dict.fromkeys(row["correction"] for row in rows if row["correction"])
    return [
        f"{shares}, because they would reveal hidden counts." if reason == SUPPRESSED else f"{shares}: {words(reason)}."
        for reason in reasons
    ]


def _share_table(attribute: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    has_unique = any(row["n_unique"] is not None for row in rows)
    columns = ["faces", *(["distinct faces"] if has_unique else []), "share of faces, %", "corrected share, %"]
    columns.append("90 % interval")
    cells = [
        [
            str(row[attribute]),
            _count(row["n"], hidden=row["suppressed"]),
            *([_count(row["n_unique"], hidden=row["suppressed"])] if has_unique else []),
            _SHARE.text(row["share"]),
            _SHARE.text(row["share_corrected"]),
            _SHARE.interval_text(_interval(row)),
        ]
        for row in rows
    ]
    return Table((f"perceived {words(attribute)}", *columns), cells, caption=f"By {words(attribute)}")


def _groups(bucket: ScoredBucket, space: LabelSpace) -> list[Block]:
    """Return a table for each attribute: a row for each group, a column for each class."""
    names = list(bucket.record["group_by"])
    if not names:
        return []
    blocks: list[Block] = []
    table = bucket.demographics.filter(pc.invert(bucket.demographics["is_total"]))
    for attribute in _attributes(bucket.demographics):
        own = table.filter(pc.equal(table["breakdown"], attribute))
        classes = space.classes[attribute]
        by_group: dict[_Group, dict[str, Mapping[str, Any]]] = {}
        for row in own.to_pylist():
            by_group.setdefault(tuple(row[name] for name in names), {})[row[attribute]] = row
        note = "Corrected shares where there are any, otherwise shares of faces."
        if len(by_group) > MAX_GROUPS:
            most = sorted(by_group, key=lambda group: -(next(iter(by_group[group].values()))["num_faces"] or 0))
            note += f" The {MAX_GROUPS:,} groups of {len(by_group):,} with the most faces; demographics/ has all."
            by_group = {group: by_group[group] for group in most[:MAX_GROUPS]}
        groups = sorted(by_group, key=_group_order)
        rows = [[*map(_group_name, group), *_group_cells(by_group[group], classes)] for group in groups]
        columns = (*names, "images", "faces", *(f"{name}, %" for name in classes))
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
        Cell(_count(first[name], hidden=first[name] is None), key=first[name] or 0)
        for name in ("num_images", "num_faces")
    ]
    for name in classes:
        share = _best(cells[name]) if name in cells else None
        row.append(Cell(_SHARE.text(share), key="" if share is None else share))
    return row


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
    return [line_drawing(f"groups-{attribute.replace('_', '-')}", caption, lines, x, _SHARE, width_inches=6.5)]


def _over_time(bucket: ScoredBucket, space: LabelSpace) -> list[Block]:
    """Return a chart for each attribute: shares of each run's own images."""
    table = bucket.over_time
    runs = list(dict.fromkeys(table["run"].to_pylist()))
    if len(runs) < 2:
        return []
    others = sum(record["model_digest"] != bucket.record["model_digest"] for record in bucket.runs)
    note = f" {others:,} runs of other models are left out." if others else ""
    drawings = []
    for attribute in _attributes(table):
        rows = table.filter(pc.equal(table["breakdown"], attribute)).to_pylist()
        found = {(row["run"], row[attribute]): row for row in rows}
        lines = [
            _share_line(name, [found.get((run, name)) for run in runs], list(range(len(runs))))
            for name in space.classes[attribute]
        ]
        x = Scale("run", names=tuple(f"{run[:4]}-{run[4:6]}-{run[6:8]} {run[9:11]}:{run[11:13]}" for run in runs))
        caption = f"{words(attribute).capitalize()} in the images of each run.{_bands(lines)}{note}"
        drawings.append(line_drawing(f"time-{attribute.replace('_', '-')}", caption, lines, x, _SHARE))
    return [Drawings(drawings)] if drawings else []


def _bands(lines: Sequence[Line]) -> str:
    """Return what the bands are, if there are any."""
    return " Bands: 90 % intervals of corrected shares." if any(line.low for line in lines) else ""


def _share_line(name: str, rows: Sequence[Mapping[str, Any] | None], x: Sequence[float]) -> Line:
    values = [None if row is None else _best(row) for row in rows]
    intervals = [None if row is None else _interval(row) for row in rows]
    if not any(intervals):
        return Line(name, x, values)
    low, high = ([None if interval is None else interval[end] for interval in intervals] for end in (0, 1))
    return Line(name, x, values, low, high)


def _shift(record: Mapping[str, Any]) -> list[Block]:
    shift = record["shift"]
    blocks: list[Block] = [Paragraph(f"{shift['sentence'][0].upper()}{shift['sentence'][1:]}.")]
    titles = {quantity.name: quantity.words for quantity in QUANTITIES}
    quantities = shift.get("quantities") or []
    rows, drawings = [], []
    for each in quantities:
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
            drawings.append(line_drawing(f"shift-{each['quantity'].replace('_', '-')}", caption, lines, x, _SHARE))
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
                *(Cell(_count(record.get(name)), key=record.get(name) or 0) for name in ("num_images", "num_faces")),
                words(record["shift"]["verdict"]),
            ]
        )
    columns = ("run", "published", "model", "images", "faces", "shift")
    return Table(
        columns, rows, num_text_columns=3, is_sortable=True, last_is_text=True, note="Bold: the run of this page."
    )


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


def _attributes(demographics: pa.Table) -> list[str]:
    present = set(pc.unique(demographics["breakdown"]).to_pylist())
    return [name for name in DEMOGRAPHIC_ATTRIBUTES if name in present]


def _total_rows(demographics: pa.Table, attribute: str) -> list[dict[str, Any]]:
    rows = demographics.filter(pc.and_(demographics["is_total"], pc.equal(demographics["breakdown"], attribute)))
    return list(rows.to_pylist())


def _totals(demographics: pa.Table) -> dict[str, Any] | None:
    rows = demographics.filter(demographics["is_total"]).slice(0, 1).to_pylist()
    return rows[0] if rows else None


def _in_order(rows: Sequence[dict[str, Any]], attribute: str, space: LabelSpace) -> list[dict[str, Any]]:
    places = {name: place for place, name in enumerate(space.classes[attribute])}
    return sorted(rows, key=lambda row: places.get(row[attribute], len(places)))


def _interval(row: Mapping[str, Any]) -> list[float] | None:
    low, high = row["share_low"], row["share_high"]
    return None if low is None or high is None else [low, high]


def _count(number: int | None, *, hidden: bool = True) -> str:
    """Return a count; a missing one is hidden."""
    if number is None:
        return "hidden" if hidden else ""
    return f"{number:,}"

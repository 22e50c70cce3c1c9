"""The result of a stress test: curves of every metric against severity, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from agr_ray.console import make_table
from agr_ray.data.rendered import render_chip
from agr_ray.evaluation.robustness import Condition, Measured, Metrics, Robustness
from agr_ray.evaluation.terms import FloatArray
from agr_ray.models.card_tables import stress_note, stress_rows
from agr_ray.predict.stress_predictor import level_text
from agr_ray.report.charts import INTERVAL, Dot, Line, Scale, dot_drawing, line_drawing
from agr_ray.report.evaluation_tables import rows_table
from agr_ray.report.figure import COLOURS, SERIES
from agr_ray.report.page import Block, Drawing, Drawings, Fold, Paragraph
from agr_ray.schema import CLEAN, STRESSED_METRICS, YAW
from agr_ray.vision.align import align_chip
from agr_ray.vision.corruptions import CORRUPTIONS, SEVERITIES, corrupt, image_rng

TITLES: Final[Mapping[str, tuple[str, float, str]]] = {
    "age_mae_years": ("age MAE", 1.0, "years"),
    "age_bias_years": ("age bias", 1.0, "years"),
    "age_within_5": ("age within 5 years", 100.0, "%"),
    "gender_accuracy": ("gender accuracy", 100.0, "%"),
    "race_accuracy": ("race accuracy", 100.0, "%"),
}
"""Of each metric: its title, factor and unit."""

_EXAMPLE: Final = 3
"""Index of the rendered face that shows what corruptions do."""
_EXAMPLE_PX: Final = 96
_PANEL_INCHES: Final = (3.1, 2.1)


def stress_figure(rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, float | None], title: str) -> Figure:
    """Draw each metric against severity, with bands of 95 % intervals.

    There is a row of panels for each metric that was measured and a column for each family of corruptions; a last
    column has the bins of yaw. All panels of a row have one scale. A dotted line marks the constant baseline.

    Args:
        rows: of schema.STRESS.
        baseline: the constant baseline's value of each metric.
        title: of the picture.
    """
    clean = next(row for row in rows if row["corruption"] == CLEAN)
    metrics = [metric for metric in STRESSED_METRICS if clean[metric] is not None]
    families = _families(rows)
    of_yaw = [row for row in rows if row["corruption"] == YAW]
    num_columns, num_rows = len(families) + bool(of_yaw), max(len(metrics), 1)
    size = (_PANEL_INCHES[0] * max(num_columns, 1), _PANEL_INCHES[1] * num_rows + 1.4)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    note = "corrupted images, with 95 % intervals; dotted: constant baseline"
    figure.suptitle(f"{title}: {note}", parse_math=False)
    grid = figure.subplots(num_rows, max(num_columns, 1), squeeze=False, sharey="row")
    for metric, line in zip(metrics, grid, strict=False):
        name, factor, unit = TITLES[metric]
        line[0].set_ylabel(f"{name}, {unit}")
        for members, axes in zip(families.values(), line, strict=False):
            for number, corruption in enumerate(members):
                curve = [clean, *(row for row in rows if row["corruption"] == corruption)]
                _draw(axes, curve, metric, factor, number, corruption)
            axes.set_xticks([0, *SEVERITIES], [CLEAN, *map(str, SEVERITIES)])
            axes.set_xlim(-0.3, SEVERITIES[-1] + 0.3)
        if of_yaw:
            _draw_bins(line[-1], of_yaw, metric, factor)
        value = baseline.get(metric)
        for axes in line:
            if value is not None:
                axes.axhline(value * factor, color="0.4", linestyle=":", linewidth=1)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    for family, axes in zip(families, grid[0], strict=False):
        axes.set_title(family, fontsize=11)
        axes.legend(fontsize=7, frameon=False, loc="best")
    for axes in grid[-1][: len(families)]:
        axes.set_xlabel("severity")
    if of_yaw:
        grid[0][-1].set_title("head pose (clean images)", fontsize=11)
        grid[-1][-1].set_xlabel("|yaw|, degrees; number of images")
    return figure


def stress_summary(stress: Mapping[str, Any]) -> list[Block]:
    """Return the section `stress` of metrics.json as a table."""
    return [Paragraph(stress_note(stress)), rows_table(stress_rows(stress), is_headline=True)]


def stress_drawings(rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any]) -> list[Block]:
    """Return, for each metric, a chart of every family of corruptions, and one of the bins of yaw.

    Args:
        rows: of schema.STRESS.
        baseline: the section `baseline` of metrics.json.
    """
    clean = next(row for row in rows if row["corruption"] == CLEAN)
    families = _families(rows)
    blocks: list[Block] = []
    for metric in (name for name in STRESSED_METRICS if clean[name] is not None):
        title, factor, unit = TITLES[metric]
        scale = Scale(f"{title}, {unit}", factor, 2, interval_title=INTERVAL)
        task, _, key = metric.partition("_")
        guess = baseline[task].get(key)
        drawings: list[Drawing] = []
        for family, members in families.items():
            lines = [
                _line(name, [clean, *(row for row in rows if row["corruption"] == name)], metric) for name in members
            ]
            if guess is not None:
                lines.append(Line("baseline", [0, SEVERITIES[-1]], [guess, guess], is_reference=True))
            name = f"stress-{metric}-{family}".replace("_", "-").replace(" ", "-")
            caption = f"{title[0].upper()}{title[1:]} under corruptions of {family}, by severity (0: clean)."
            x = Scale("severity", digits=0, is_integer=True)
            drawings.append(line_drawing(name, caption, lines, x, scale))
        bins = [
            Dot(row["level"], row[metric], _interval(row, metric), f"n = {row['n']:,}")
            for row in rows
            if row["corruption"] == YAW and row[metric] is not None
        ]
        if bins:
            caption = f"{title[0].upper()}{title[1:]} by how far the head is turned (yaw), without corruption."
            drawings.append(
                dot_drawing(f"yaw-{metric.replace('_', '-')}", caption, bins, scale, reference=clean[metric])
            )
        blocks.append(Fold(f"{title[0].upper()}{title[1:]} under each corruption", [Drawings(drawings)]))
    return blocks


def _families(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the corruptions in the rows by family, both in their order."""
    families: dict[str, list[str]] = {}
    for name in dict.fromkeys(row["corruption"] for row in rows if row["corruption"] in CORRUPTIONS):
        families.setdefault(CORRUPTIONS[name].family, []).append(name)
    return families


def _line(name: str, curve: Sequence[Mapping[str, Any]], metric: str) -> Line:
    values, low, high = ([row[f"{metric}{part}"] for row in curve] for part in ("", "_low", "_high"))
    return Line(name, [row["severity"] for row in curve], values, low, high)


def _interval(row: Mapping[str, Any], metric: str) -> list[float] | None:
    low, high = (row[f"{metric}_{end}"] for end in ("low", "high"))
    return None if low is None or high is None else [low, high]


def examples_figure() -> Figure:
    """Draw a rendered face under every condition: what the severities mean, without a photograph of anyone."""
    rgb = align_chip(render_chip(0, _EXAMPLE).image_rgb, _EXAMPLE_PX)
    columns = (CLEAN, *map(str, SEVERITIES))
    figure = Figure(figsize=(1.1 * len(columns) + 1.3, 1.1 * len(CORRUPTIONS)), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(CORRUPTIONS), len(columns), squeeze=False)
    for name, line in zip(CORRUPTIONS, grid, strict=True):
        copies = [corrupt(rgb, name, severity, image_rng(0, name, CLEAN)) for severity in SEVERITIES]
        for axes, image in zip(line, [rgb, *copies], strict=True):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, fontsize=9)
    return figure


def print_stress(console: Console, robustness: Robustness, out: str) -> None:
    """Print every metric: clean, mean over the severities of each corruption, and mean of all corruptions."""
    metrics = [metric for metric in STRESSED_METRICS if metric in robustness.clean]
    table = make_table("images", *(f"{TITLES[metric][0]}, {TITLES[metric][2]}" for metric in metrics))
    table.add_row(CLEAN, *_cells(robustness.clean, metrics))
    for name, each in robustness.by_corruption.items():
        table.add_row(name, *_cells(each, metrics))
    table.add_row("mean of all", *_cells(robustness.mean, metrics))
    console.print(f"corrupted images: means over {len(SEVERITIES)} severities, with 95 % intervals")
    console.print(table)
    for metric in metrics:
        name, factor, unit = TITLES[metric]
        condition, value = _worst(robustness, metric)
        console.print(f"worst {name}: {value * factor:.2f} {unit} ({condition.corruption}, {level_text(condition)})")
    console.print("not measured: whether the detector would still find these faces")
    console.print(f"{out}/stress.parquet, {out}/stress.png, {out}/stress.svg, {out}/stress_examples.png")


def _worst(robustness: Robustness, metric: str) -> tuple[Condition, float]:
    """Return the condition with the largest error or bias, or the lowest share, and its value."""
    values = {condition: metrics[metric].value for condition, metrics in robustness.conditions.items()}
    if metric in ("age_mae_years", "age_bias_years"):
        return max(values.items(), key=lambda item: abs(item[1]))
    return min(values.items(), key=lambda item: item[1])


def _cells(metrics: Metrics, names: Sequence[str]) -> list[str]:
    return [_cell(metrics[name], TITLES[name][1]) for name in names]


def _cell(measured: Measured, factor: float) -> str:
    text = f"{measured.value * factor:.2f}"
    if measured.interval is None:
        return text
    low, high = (end * factor for end in measured.interval)
    return f"{text} ({low:.2f} to {high:.2f})"


def _draw(axes: Axes, curve: Sequence[Mapping[str, Any]], metric: str, factor: float, number: int, label: str) -> None:
    """Draw one curve and its band."""
    x = [row["severity"] for row in curve]
    values, low, high = _values(curve, metric, factor)
    name, marker = SERIES[number % len(SERIES)]
    colour = COLOURS[name]
    axes.plot(x, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _draw_bins(axes: Axes, bins: Sequence[Mapping[str, Any]], metric: str, factor: float) -> None:
    """Draw the bins of yaw as points with error bars."""
    values, low, high = _values(bins, metric, factor)
    x = np.arange(len(bins))
    axes.vlines(x, low, high, color="0.2", linewidth=1.4)
    axes.plot(x, values, "o", color="0.2", markersize=4)
    degrees = [row["level"].removesuffix(" degrees").replace(" to ", "-") for row in bins]
    axes.set_xticks(x, [f"{each}\n{row['n']:,}" for each, row in zip(degrees, bins, strict=True)], fontsize=7)
    axes.set_xlim(-0.5, len(bins) - 0.5)


def _values(rows: Sequence[Mapping[str, Any]], metric: str, factor: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return values and both ends of their intervals; NaN where there is none."""
    columns = (np.array([row.get(f"{metric}{part}") for row in rows], np.float64) for part in ("", "_low", "_high"))
    values, low, high = (factor * column for column in columns)
    return values, low, high

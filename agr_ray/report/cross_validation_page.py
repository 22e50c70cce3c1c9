"""The page of a cross-validation: its folds, and what they have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow.compute as pc

from agr_ray.errors import ConfigError
from agr_ray.report.charts import Line, Scale, line_drawing
from agr_ray.report.comparison_rows import LABELS as COMPARED
from agr_ray.report.page import Block, Cell, Drawing, Drawings, Fold, Page, Paragraph, Section, Table, Values, flat
from agr_ray.report.terms import MEASURED
from agr_ray.schema import FOLD_METRICS, SPLITS
from agr_ray.storage import MissingObject, Storage

RECORD: Final = "cross-validation.json"
"""The settings that all folds share, by section, and the folds' names."""
FOLDS_FILE: Final = "folds.parquet"
SUMMARY_FILE: Final = "summary.parquet"
PREDICTIONS_FILE: Final = "predictions.parquet"

_LABELS: Final = COMPARED | {"age_exact_group": "age group"}
_SUMMARY: Final = {
    "mean": "mean",
    "std": "standard deviation",
    "standard_error": "standard error",
    "pooled": "pooled",
}
_PROTOCOLS: Final = {
    "random_folds": "The folds have equal size, were drawn at random, and are stratified by age, gender and race; all "
    "images of a person are in one.",
    "published_folds": "The folds are those of the data set's authors.",
    "leave_one_person_out": "Each fold has the images of one person.",
    "balanced_halves": "Each network was trained on one half, with as many white as black faces and three males for "
    "each female, and tested on all other images; those in neither half were tested by both networks.",
}


def cross_validation_report(storage: Storage, uri: str) -> Page:
    """Return the page of the cross-validation in a folder.

    Raises:
        ConfigError: it is not finished.
    """
    try:
        settings = json.loads(storage.read(storage.join(uri, RECORD)))
        folds, summary = (
            storage.read_table(storage.join(uri, name)).to_pylist() for name in (FOLDS_FILE, SUMMARY_FILE)
        )
        images = storage.read_table(storage.join(uri, PREDICTIONS_FILE), ["image_id"])["image_id"]
    except MissingObject as error:
        raise ConfigError(f"{uri}: no finished cross-validation ({error}); the same command resumes it") from None
    return cross_validation_page(uri, settings, folds, summary, pc.count_distinct(images).as_py())


def cross_validation_page(
    uri: str,
    settings: Mapping[str, Any],
    folds: Sequence[Mapping[str, Any]],
    summary: Sequence[Mapping[str, Any]],
    num_images: int,
) -> Page:
    """Return the page.

    Args:
        uri: of the cross-validation.
        settings: content of `RECORD`.
        folds: rows of schema.FOLDS.
        summary: rows of schema.FOLD_SUMMARY.
        num_images: number of different images that were tested.
    """
    by_metric = {row["metric"]: row for row in summary}
    metrics = [metric for metric in FOLD_METRICS if metric in by_metric]
    own = settings["cross_validate"]
    shared = {name: content for name, content in settings.items() if name not in ("data", "runs")}
    results: list[Block] = [_table(folds, by_metric, metrics), Drawings(_charts(folds, by_metric, metrics))]
    terms = {name: MEASURED[name] for name in ("MAE", "within 5 years")}
    return Page(
        f"Cross-validation of {len(folds)} folds",
        [Paragraph(_verdict(by_metric, metrics), "verdict"), Paragraph(_protocol(own, folds, num_images))],
        [
            Section("folds", "Folds", results),
            Section(
                "settings",
                "Settings of all folds",
                [
                    Fold("All settings", [Values(flat(shared))]),
                    Paragraph(f"The errors of one fold in detail: agr-ray report {uri}/evaluations/FOLD", "note"),
                ],
            ),
        ],
        terms | {"one-off": MEASURED["age group or the next"]},
    )


def _verdict(by_metric: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Return the mean over folds of the first metric, which is the age MAE if there are exact ages."""
    if not metrics:
        return "No test image has a label that the networks predict."
    metric = metrics[0]
    row, scale = by_metric[metric], _scale(metric)
    unit = "years" if metric == "age_mae_years" else "%"
    name = _LABELS[metric].partition(",")[0]
    spread = "" if row["std"] is None else f" ± {scale.text(row['std'])}"
    return (
        f"Mean {name} over {row['num_folds']} folds{' ± standard deviation' if spread else ''}: "
        f"{scale.text(row['mean'])}{spread} {unit}. Over all images at once: {scale.text(row['pooled'])} {unit}."
    )


def _protocol(own: Mapping[str, Any], folds: Sequence[Mapping[str, Any]], num_images: int) -> str:
    """Return what was done."""
    num_left_out = sum(row["num_left_out"] for row in folds)
    left_out = (
        "Near-duplicates and copies of a fold's test images, and other images of the same people, were left out of its "
        f"training ({num_left_out:,} in all folds together)."
        if own["near_duplicates"] == "exclude"
        else "Near-duplicates of a fold's test images, if there are any, stayed in its training."
    )
    return (
        f"Protocol {own['protocol']}, {len(folds)} folds, {num_images:,} images. Each fold has a network of its own, "
        "with the same settings; it predicted the fold's test images, and saw neither these nor their people in "
        "training. "
        f"{_PROTOCOLS[own['protocol']]} Of a fold's training images, {100 * own['val']:g} % were for validation, which "
        f"chose the best epoch. {left_out}"
    )


def _table(
    folds: Sequence[Mapping[str, Any]], by_metric: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]
) -> Table:
    columns = ["fold", *SPLITS, "left out", *(_scale(metric).label for metric in metrics)]
    rows: list[list[str | Cell]] = []
    for row in folds:
        counts = [f"{row[f'num_{name}']:,}" for name in (*SPLITS, "left_out")]
        rows.append([row["fold"], *counts, *(_scale(metric).text(row[metric]) for metric in metrics)])
    for column, label in _SUMMARY.items():
        values = [_scale(metric).text(by_metric[metric][column]) for metric in metrics]
        rows.append([Cell(label, is_strong=True), *[""] * 4, *(Cell(value, is_strong=True) for value in values)])
    note = (
        "Mean, standard deviation (with n - 1) and standard error are of the folds' values; pooled: over the images of "
        "all folds at once. Age group: the predicted age is in the true age group; one-off: or in one next to it."
    )
    return Table(columns, rows, note=note)


def _charts(
    folds: Sequence[Mapping[str, Any]], by_metric: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]
) -> list[Drawing]:
    """Return a chart of each metric."""
    fold = Scale("fold", names=[row["fold"] for row in folds])
    places = range(len(folds))
    drawings = []
    for metric in metrics:
        scale, values = _scale(metric), [row[metric] for row in folds]
        mean = [by_metric[metric]["mean"]] * len(folds)
        lines = [Line("fold", places, values, is_points=True), Line("mean", places, mean, is_reference=True)]
        caption = f"{scale.label[:1].upper()}{scale.label[1:]}: a point for each fold. Dotted: the mean."
        drawings.append(line_drawing(metric.replace("_", "-"), caption, lines, fold, scale))
    return drawings


def _scale(metric: str) -> Scale:
    label = _LABELS[metric]
    return Scale(label) if metric == "age_mae_years" else Scale(f"{label}, %", 100.0, 1)

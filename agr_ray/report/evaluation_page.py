"""The page of an evaluation: how wrong a model is, for whom, and on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from agr_ray.evaluation.age_bands import AgeBand
from agr_ray.models.card import correction_note, mapping_note, ranges_note
from agr_ray.models.card_tables import (
    DISPARITY_NOTE,
    NO_DISPARITY,
    TOO_SMALL,
    disparity_rows,
    headline_rows,
    listed,
    no_differences,
    num_measured,
    small_groups,
    words,
)
from agr_ray.report.evaluation_charts import (
    age_by_truth,
    age_errors,
    by_group,
    coverage_by_group,
    reliability,
    selective,
    thresholds,
)
from agr_ray.report.evaluation_summary import calibration_gain
from agr_ray.report.evaluation_tables import confusion, group_tables, rows_table, threshold_table
from agr_ray.report.model_description import architecture, settings_of, split_of_data
from agr_ray.report.page import Block, Drawings, Fold, Page, Paragraph, Photograph, Section, Table, Values
from agr_ray.report.paper import data_sets, paper_index, paper_methods
from agr_ray.report.stress import stress_drawings, stress_summary
from agr_ray.report.terms import MEASURED

_ALMOST: Final = 0.95
"""If the tasks' numbers of images are within this factor, the verdict gives only the smallest and the largest."""


@dataclass(frozen=True)
class MeasuredModel:
    """An evaluation, and what is known of the model."""

    uri: str
    """Folder of the evaluation."""
    metrics: Mapping[str, Any]
    """Content of metrics.json."""
    age_bands: Sequence[AgeBand]
    """Predicted ages by true age; empty: the model predicts none."""
    stress: Sequence[Mapping[str, Any]] = ()
    """Rows of schema.STRESS; empty: no stress test."""
    sheets: Mapping[str, bytes] = field(default_factory=dict)
    """Pictures of faces by name, PNG."""
    calibrated_since: bool = False
    """Whether the checkpoint was calibrated, or calibrated again, since the evaluation."""
    others: Sequence[Mapping[str, Any]] = ()
    """Content of metrics.json of the same model's evaluations on other data."""


def evaluation_page(measured: MeasuredModel) -> Page:
    """Return the page."""
    metrics = measured.metrics
    record = metrics["evaluation"]
    sections = [
        Section("results", "Results", _results(metrics)),
        *_age(measured),
        *_classes(metrics),
        Section("groups", "Errors by group", _groups(metrics)),
        *_thresholds(metrics),
        *_uncertainty(metrics),
        *_stress(measured),
        *_sheets(measured),
        Section("data", "Data", _data(measured)),
        Section("model", "Model and training", _model(measured)),
    ]
    sections = [section for section in sections if section.blocks]
    titles = [section.title for section in sections]
    sections += [
        Section("paper", "The paper's tables and figures", _paper(measured, titles)),
        Section("about", "About this page", [Values(_about(measured))]),
    ]
    return Page(
        f"Evaluation of {_short(record['checkpoint'])} on {record['source']}",
        [Paragraph(verdict(metrics), "verdict"), *_warnings(measured), *_scope(metrics)],
        sections,
        MEASURED,
    )


def verdict(metrics: Mapping[str, Any]) -> str:
    """Return the result in two sentences."""
    parts = []
    for task, key, what, factor, unit in (
        ("age", "mae_years", "the age MAE", 1.0, " years"),
        ("age", "exact_group", "the age group accuracy", 100.0, " %"),
        ("gender", "accuracy", "the gender accuracy", 100.0, " %"),
        ("race", "accuracy", "the race accuracy", 100.0, " %"),
    ):
        value = metrics[task][key]
        if value is not None and not (key == "exact_group" and metrics["age"]["mae_years"] is not None):
            parts.append((f"{what} is {value * factor:.1f}{unit}", num_measured(metrics, task, key)))
    numbers = [number for _, number in parts]
    if numbers and min(numbers) >= _ALMOST * max(numbers):
        fewest = "" if min(numbers) == max(numbers) else f"{min(numbers):,} to "
        images = "image" if max(numbers) == 1 else "images"
        sentence = f"On {fewest}{max(numbers):,} {images}, {listed([text for text, _ in parts])}."
    else:
        texts = [f"{text} (on {number:,} images)" for text, number in parts]
        sentence = (listed(texts) or "nothing was measured") + "."
        sentence = sentence[0].upper() + sentence[1:]
    worst = _worst_group(metrics)
    return f"{sentence} {worst}" if worst else sentence


def _worst_group(metrics: Mapping[str, Any]) -> str:
    """Return a sentence about the breakdown with the largest gap in age error that the images show."""
    gaps = {
        breakdown: tasks["age"]["mae_years"]
        for breakdown, tasks in metrics["disparities"].items()
        if breakdown in ("gender", "race", "gender_race") and tasks["age"]["mae_years"]
    }
    shown = {name: gap for name, gap in gaps.items() if gap["differs"]}
    if not shown:
        return ""
    breakdown, gap = max(shown.items(), key=lambda item: item[1]["gap"])
    worst, best = gap["worst"], gap["best"]
    left_out = small_groups(gap, 1.0, " years")
    return (
        f"By {words(breakdown).replace('gender race', 'gender and race')}, the age error is worst for {worst['name']} "
        f"({worst['value']:.1f} years) and best for {best['name']} ({best['value']:.1f} years)"
        + (f"; left out: {left_out}." if left_out else ".")
    )


def _warnings(measured: MeasuredModel) -> list[Block]:
    metrics, record = measured.metrics, measured.metrics["evaluation"]
    texts = []
    if measured.calibrated_since:
        texts.append(
            "The checkpoint was calibrated after this evaluation, so the figures of uncertainty here are not those of "
            "its present calibration. Run agr-ray evaluate again."
        )
    if record["num_seen_in_training"]:
        texts.append(
            f"{record['num_seen_in_training']:,} of these images are training images, so all metrics are optimistic."
        )
    elif record["num_seen_in_training"] is None:
        texts.append(
            "The checkpoint does not record its training images. If some of these images are among them, the metrics "
            "are optimistic."
        )
    elif record["split"] == "val" and record["trained_on_split_manifest_sha256"] == record["split_manifest_sha256"]:
        texts.append("Training chose its best epoch on these images, so the metrics are slightly optimistic.")
    calibration = metrics.get("calibration") or {}
    if calibration.get("num_seen_in_calibration"):
        texts.append(
            f"{calibration['num_seen_in_calibration']:,} of these images were used to calibrate, so the metrics of "
            "uncertainty are optimistic."
        )
    if calibration.get("warning"):
        texts.append(f"Calibration: {calibration['warning']}.")
    return [Paragraph(text, "warning") for text in texts]


def _scope(metrics: Mapping[str, Any]) -> list[Block]:
    record = metrics["evaluation"]
    num_units = f"{metrics['uncertainty']['num_units']:,}"
    intervals = {
        "person": f"95 % intervals are clustered by person, or by content where persons are unknown ({num_units} "
        "groups)",
        "image": f"95 % intervals treat the {num_units} distinct images as independent",
    }
    sampled = intervals.get(
        metrics["uncertainty"]["unit"], f"95 % intervals are clustered by {num_units} random groups of people or images"
    )
    correction = correction_note(metrics)
    return [
        *([Paragraph(correction, "note")] if correction else []),
        Paragraph(
            f"{record['source']}, split {record['split']}: {metrics['n']:,} labelled images, of them "
            f"{metrics['n_fallback']:,} in which no face was found. "
            + ("None of them is a training image. " if record["num_seen_in_training"] == 0 else "")
            + ranges_note(metrics["age"]).lstrip()
            + mapping_note(record)
            + f" {sampled}. Both labels and predictions are perceived attributes, judged from a picture.",
        ),
    ]


def _results(metrics: Mapping[str, Any]) -> list[Block]:
    on_these = metrics["baseline"]["guess"]["fitted_on"] == "evaluated"
    labels = "these images" if on_these else "the training images"
    note = f"The baseline predicts the median age and the most frequent classes of the labels of {labels} for everyone."
    return [rows_table(headline_rows(metrics), is_headline=True), Paragraph(note, "note")]


def _age(measured: MeasuredModel) -> list[Section]:
    metrics = measured.metrics
    if "age" not in metrics["evaluation"]["tasks"]:
        return []
    drawings = [*age_by_truth(measured.age_bands), *age_errors(metrics)]
    blocks: list[Block] = [Drawings(drawings)] if drawings else []
    blocks += confusion("age groups", metrics["labels"]["age_group"], metrics["age"].get("confusion"))
    return [Section("age", "Age", blocks)]


def _classes(metrics: Mapping[str, Any]) -> list[Section]:
    sections = []
    for task in ("gender", "race"):
        if task in metrics["evaluation"]["tasks"] and metrics[task]["n"]:
            blocks = [
                *confusion(f"{task} classes", metrics["labels"][task], metrics[task]["confusion"]),
                Drawings(reliability(task, metrics["reliability"][task])),
            ]
            sections.append(Section(task, task.capitalize(), blocks))
    return sections


def _groups(metrics: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    found = disparity_rows(metrics["disparities"])
    if found is None:
        blocks.append(Paragraph(TOO_SMALL))
    elif not found.rows:
        blocks.append(Paragraph(NO_DISPARITY))
    else:
        blocks += [Paragraph(DISPARITY_NOTE), rows_table(found, num_text_columns=6)]
        blocks += [Paragraph(line, "note") for line in no_differences(metrics["disparities"])]
    drawings = by_group(metrics)
    if drawings:
        blocks.append(Drawings(drawings))
    blocks.append(Fold("All groups, with intervals", group_tables(metrics)))
    return blocks


def _thresholds(metrics: Mapping[str, Any]) -> list[Section]:
    if not metrics["age_thresholds"]:
        return []
    blocks: list[Block] = [
        Paragraph(
            "What would happen if the predicted age decided who is old enough. The model must not be used so; these "
            "figures show why."
        ),
        *threshold_table(metrics["age_thresholds"]),
        Drawings(thresholds(metrics["age_thresholds"])),
    ]
    return [Section("thresholds", "Age thresholds", blocks)]


def _uncertainty(metrics: Mapping[str, Any]) -> list[Section]:
    blocks: list[Block] = []
    calibration = metrics.get("calibration")
    if calibration is None:
        blocks.append(
            Paragraph(
                "The model is not calibrated: it gives no age intervals and never abstains. To calibrate it: agr-ray "
                f"evaluate --checkpoint {metrics['evaluation']['checkpoint']} --data DATA --split val --calibrate",
                "note",
            )
        )
    else:
        rows = []
        age = calibration["age"]
        if age is not None:
            interval = f"{100 * age['interval'][0]:.1f} to {100 * age['interval'][1]:.1f} %"
            promised, found = (f"{100 * age[key]:.1f} %" for key in ("nominal", "coverage"))
            rows.append(("true age in its interval", promised, found, interval, f"{age['n']:,}"))
        for task in ("gender", "race"):
            part = calibration[task]
            if part is not None and part["error"] is not None:
                ends = f"{100 * part['interval'][0]:.1f} to {100 * part['interval'][1]:.1f} %"
                risk, error = f"at most {100 * part['risk']:.1f} %", f"{100 * part['error']:.1f} %"
                rows.append(
                    (f"{task} error rate, where it does not abstain", risk, error, ends, f"{part['accepted']:,}")
                )
        columns = ("calibrated", "target", "measured", "95 % interval", "images")
        blocks.append(Table(columns, rows, is_headline=True))
        blocks += _uncertainty_remarks(calibration)
        if age is not None:
            blocks.append(Drawings(coverage_by_group(age)))
    curves = selective(metrics["selective"])
    if curves:
        blocks.append(Drawings(curves))
    return [Section("uncertainty", "Uncertainty and calibration", blocks)]


def _uncertainty_remarks(calibration: Mapping[str, Any]) -> list[Block]:
    remarks = []
    if calibration["age"] is not None:
        remarks.append(f"Age intervals are {calibration['age']['mean_width_years']:.1f} years wide on average.")
    for task in ("gender", "race"):
        part = calibration[task]
        if part is not None:
            remarks.append(
                f"The model abstains on {task} for {100 * part['abstained']:.1f} % of the images. Its calibration "
                f"error is {100 * part['ece']:.1f} %, and {100 * part['ece_before']:.1f} % without calibration"
                f"{calibration_gain(part)}."
            )
    return [Paragraph(remark) for remark in remarks]


def _stress(measured: MeasuredModel) -> list[Section]:
    stress = measured.metrics.get("stress")
    if not stress or not measured.stress:
        return []
    blocks = [*stress_summary(stress), *stress_drawings(measured.stress, measured.metrics["baseline"])]
    return [Section("robustness", "Robustness to corruptions", blocks)]


def _sheets(measured: MeasuredModel) -> list[Section]:
    if not measured.sheets:
        return []
    blocks: list[Block] = [
        Paragraph("These are faces of people. Do not publish this page without their consent.", "warning")
    ]
    blocks += [
        Photograph(f"faces-{name.replace('_', '-')}", words(name).capitalize(), png)
        for name, png in measured.sheets.items()
    ]
    return [Section("faces", "Faces", blocks)]


def _data(measured: MeasuredModel) -> list[Block]:
    metrics = measured.metrics
    record = metrics["evaluation"]
    statuses = [(words(name), f"{number:,}") for name, number in record["statuses"].items()]
    blocks: list[Block] = [Table(("status", "images"), statuses)]
    for attribute, names in metrics["labels"].items():
        groups = metrics["groups"][attribute]
        rows = [
            (name, f"{groups[name]['n']:,}", f"{100 * groups[name]['n'] / metrics['n']:.1f} %")
            for name in names
            if name in groups and groups[name]["n"]
        ]
        if rows:
            blocks.append(Table((f"true {words(attribute)}", "images", "share"), rows))
    return [*blocks, *split_of_data(record["model"])]


def _model(measured: MeasuredModel) -> list[Block]:
    meta = measured.metrics["evaluation"]["model"]
    return [*architecture(meta), *settings_of(meta)]


def _paper(measured: MeasuredModel, sections: Sequence[str]) -> list[Block]:
    every = [measured.metrics, *measured.others]
    return [*data_sets(every), *paper_methods(measured.metrics), *paper_index(sections)]


def _about(measured: MeasuredModel) -> dict[str, str]:
    metrics = measured.metrics
    record = metrics["evaluation"]
    uncertainty = metrics["uncertainty"]
    return {
        "evaluation": measured.uri,
        "checkpoint": record["checkpoint"],
        "digest of the model": record["model_digest"],
        "data": record["data"],
        "split": record["split"],
        "split manifest, SHA-256": record["split_manifest_sha256"],
        "training split manifest, SHA-256": record["trained_on_split_manifest_sha256"] or "unknown",
        "precision": ", ".join(record["precisions"]),
        "commit of the training": record["model"].get("git_commit") or "unknown",
        "intervals": f"{uncertainty['method']}, over {uncertainty['num_units']:,} units: {uncertainty['unit']}",
        "metrics": "defined in docs/evaluation.md",
    }


def _short(uri: str) -> str:
    return "/".join(uri.rstrip("/").split("/")[-2:])

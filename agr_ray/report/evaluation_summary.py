"""The terminal output of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_table, print_next
from agr_ray.evaluation.age_calibration import AgeCalibration
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.selection import NEVER_SURE
from agr_ray.models.card_tables import HEADLINES, between, figure
from agr_ray.schema import CROP_STATUSES


def vision_differences(
    measured: Pipeline, checkpoint: Pipeline, *, calibrates: bool, calibration: Calibration | None
) -> list[str]:
    """Return a line if crops made with settings other than the checkpoint's affect its calibration; else none.

    Args:
        measured: settings with which the crops were made.
        checkpoint: settings of the checkpoint.
        calibrates: whether this evaluation calibrates the checkpoint.
        calibration: the checkpoint's calibration, if it has one.
    """
    before, after = checkpoint.decisive(), measured.decisive()
    different = ", ".join(f"{key} = {after[key]}, not {before[key]}" for key in before if before[key] != after[key])
    if not different:
        return []
    if calibrates:
        return [
            f"note: the crops were made with {different}. A calibrated checkpoint scores with the settings of its "
            "calibration, so it will score with those of the crops"
        ]
    if calibration is not None:
        return [
            f"warning: the crops were made with {different}. The checkpoint was calibrated with the latter, so the "
            "coverage measured here says little about scoring"
        ]
    return []


def print_summary(console: Console, metrics: dict[str, Any], out: str) -> None:
    """Print the headline metrics beside the constant baseline's, and the images on which they were measured."""
    evaluation = metrics["evaluation"]
    console.print(f"{evaluation['source']}, split {evaluation['split']}")
    table = make_table("metric", "model", "95 % interval", "baseline")
    for task, name, label, scale, unit in HEADLINES:
        value, baseline = metrics[task][name], metrics["baseline"][task].get(name)
        interval = metrics["intervals"][task].get(name)
        if value is not None:
            table.add_row(
                label, figure(value, scale, unit), between(interval, scale, unit), figure(baseline, scale, unit)
            )
    console.print(table)
    for line in _differences(metrics["disparities"]):
        console.print(line)
    num_seen = evaluation["num_seen_in_training"]
    overlap = "unknown" if num_seen is None else f"{num_seen:,}"
    console.print(
        f"{metrics['n']:,} labelled images, {metrics['n_fallback']:,} of them without a detected face; "
        f"seen in training: {overlap}",
    )
    without_crop = {name: count for name, count in evaluation["statuses"].items() if name not in CROP_STATUSES}
    if without_crop:
        reasons = ", ".join(f"{name} {count:,}" for name, count in without_crop.items())
        console.print(f"not measured, because they have no crop: {reasons}")
    console.print(f"split manifest SHA-256 {evaluation['split_manifest_sha256']}")
    console.print(f"{out}/metrics.json, {out}/predictions.parquet")
    print_next(console, "see the errors by group", "report", out)


def _differences(disparities: Mapping[str, Any]) -> list[str]:
    """Return a line for each breakdown by one attribute and each metric in which the images show a difference."""
    lines = []
    for breakdown in ("gender", "race", "age_group"):
        for task, name, label, scale, unit in (
            ("age", "mae_years", "age MAE", 1.0, " years"),
            ("gender", "accuracy", "gender accuracy", 100.0, " %"),
            ("race", "accuracy", "race accuracy", 100.0, " %"),
        ):
            found = disparities[breakdown][task][name]
            if found is not None and found["differs"]:
                worst, best = (
                    f"{figure(found[side]['value'], scale, unit)} for {found[side]['name']}"
                    for side in ("worst", "best")
                )
                lines.append(f"{label} by {breakdown.replace('_', ' ')}: {worst}, {best}")
    return lines


def print_fitted(console: Console, calibration: Calibration, uri: str) -> None:
    """Print the fitted calibration and its notes."""
    parts = []
    if calibration.age is not None:
        parts.append(_age_intervals(calibration.age))
        if calibration.age.slope != 1.0:
            sign = "+" if calibration.age.offset_years >= 0.0 else "-"
            corrected = f"{calibration.age.slope:.3f} x predicted {sign} {abs(calibration.age.offset_years):.2f} years"
            parts.append(f"corrected age {corrected}")
    for task, part in (("gender", calibration.gender), ("race", calibration.race)):
        if part is not None:
            parts.append(f"{task} temperature {part.temperature:.2f}, abstains {_below(part.abstain_below)}")
    console.print(f"calibrated on {calibration.n:,} images: {'; '.join(parts) or 'nothing could be fitted'}")
    for note in calibration.notes:
        console.print(f"note: {note}")
    console.print(uri)


def _age_intervals(age: AgeCalibration) -> str:
    if age.by_spread is not None:
        widths = age.by_spread.half_widths_years()
        return (
            f"age +-{min(widths):.1f} to {max(widths):.1f} years by true age at the mean spread of "
            f"{age.by_spread.mean_spread_years:.1f} years (weight of the spread {age.by_spread.weight:g})"
        )
    assert age.by_group is not None
    half_widths = age.by_group.half_widths_years
    return f"age +-{min(half_widths):.1f} to {max(half_widths):.1f} years by predicted age group"


def _below(abstain_below: float) -> str:
    if abstain_below in (0.0, NEVER_SURE):
        return "never" if abstain_below == 0.0 else "always"
    return f"below {100 * abstain_below:.1f} %"


def print_calibration(console: Console, measured: dict[str, Any]) -> None:
    """Print the measured coverage and errors beside those that the calibration promises."""
    if measured["warning"]:
        console.print(f"warning: {measured['warning']}")
    num_seen = measured["num_seen_in_calibration"]
    if num_seen:
        console.print(
            f"warning: {num_seen:,} of these images were used to calibrate, so the metrics below are optimistic; "
            "evaluate on others"
        )
    table = make_table("calibrated", "target", "measured", "95 % interval", "images")
    remarks = []
    age = measured["age"]
    if age is not None:
        share, between = _per_cent(age["coverage"]), _between(age["interval"])
        table.add_row("true age in its interval", _per_cent(age["nominal"]), share, between, f"{age['n']:,}")
        remarks.append(f"age: intervals are {age['mean_width_years']:.1f} years wide on average")
        if age["mae_years"] != age["mae_years_before"]:
            remarks.append(
                f"age: MAE {age['mae_years_before']:.2f} years, corrected {age['mae_years']:.2f}; "
                f"bias {age['bias_years_before']:+.2f}, corrected {age['bias_years']:+.2f}"
            )
    for task in ("gender", "race"):
        part = measured[task]
        if part is not None:
            error, between = _per_cent(part["error"]), _between(part["interval"])
            table.add_row(
                f"{task} error, where it does not abstain",
                f"<= {_per_cent(part['risk'])}",
                error,
                between,
                f"{part['accepted']:,}",
            )
            remarks.append(
                f"{task}: abstains on {_per_cent(part['abstained'])} of {part['n']:,}; "
                f"calibration error {_per_cent(part['ece_before'])} uncalibrated, {_per_cent(part['ece'])} calibrated"
            )
    console.print(table)
    for remark in remarks:
        console.print(remark)
    if age is not None:
        members = (item for group in age["groups"].values() for item in group.items())
        failed = [
            f"{name} {_per_cent(part['coverage'])} of {part['n']:,}"
            for name, part in members
            if part["interval"][1] < age["nominal"]
        ]
        if failed:
            console.print(f"age intervals cover significantly less than the target for: {', '.join(failed)}")


def _per_cent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _between(interval: list[float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"

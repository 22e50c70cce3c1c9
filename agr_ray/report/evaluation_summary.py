"""The terminal output of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from agr_ray.config import EvaluateConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_table, print_next
from agr_ray.evaluation.age_calibration import AgeCalibration
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.disparities import MIN_ROWS
from agr_ray.evaluation.selection import NEVER_SURE
from agr_ray.models.card_tables import HEADLINES, between, figure, small_groups, words
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
    for line in _differences(metrics):
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


def print_following(console: Console, config: EvaluateConfig, checkpoint: str, data: str, out: str) -> None:
    """Print the command that usually follows: after a calibration, the measurement on test images, else the report."""
    if config.calibrate and config.split != "test":
        print_next(console, "measure on test images", "evaluate", "--checkpoint", checkpoint, "--data", data)
    else:
        print_next(console, "see the errors by group", "report", out)


def _differences(metrics: Mapping[str, Any]) -> list[str]:
    """Return a line for each breakdown by one attribute and each metric that differ, and one for those that do not."""
    lines, same, too_few = [], [], []
    for breakdown in ("gender", "race", "age_group"):
        for task, name, label, scale, unit in (
            ("age", "mae_years", "age MAE", 1.0, " years"),
            ("gender", "accuracy", "gender accuracy", 100.0, " %"),
            ("race", "accuracy", "race accuracy", 100.0, " %"),
        ):
            if metrics[task][name] is None:
                continue
            found = metrics["disparities"][breakdown][task][name]
            title = f"{label} by {words(breakdown)}"
            if found is None:
                too_few.append(title)
                continue
            left_out = small_groups(found, scale, unit)
            if not found["differs"]:
                same.append(f"{title} (left out: {left_out})" if left_out else title)
                continue
            worst, best = (
                f"{side} {figure(found[side]['value'], scale, unit)} for {found[side]['name']}"
                for side in ("worst", "best")
            )
            compared = f"of {found['num_groups']} groups" if found["num_groups"] > 2 else "of two groups"
            lines.append(f"{title}: {worst}, {best}, {compared}" + (f"; left out: {left_out}" if left_out else ""))
    if same:
        lines.append(f"no significant difference: {', '.join(same)}")
    if too_few:
        lines.append(f"not compared, because fewer than two groups have 30 images: {', '.join(too_few)}")
    return lines


def print_fitted(console: Console, calibration: Calibration, uri: str) -> None:
    """Print the fitted calibration and its notes."""
    console.print(f"calibrated on {calibration.n:,} images:")
    if calibration.age is not None:
        console.print(f"  age: {_age_intervals(calibration.age, calibration.coverage)}")
        if calibration.age.slope != 1.0:
            sign = "+" if calibration.age.offset_years >= 0.0 else "-"
            offset = f"{sign} {abs(calibration.age.offset_years):.2f} years"
            console.print(f"  age: corrected to {calibration.age.slope:.3f} x predicted {offset}")
    for task, part in (("gender", calibration.gender), ("race", calibration.race)):
        if part is not None:
            console.print(f"  {task}: {_temperature(part.temperature)}; {_abstention(part.abstain_below)}")
    for note in calibration.notes:
        console.print(f"note: {note}")
    console.print(uri)


def _age_intervals(age: AgeCalibration, coverage: float) -> str:
    if age.by_spread is not None:
        half_widths = list(age.by_spread.half_widths_years())
        depends = "the true age and on how sure the model is"
    else:
        assert age.by_group is not None
        half_widths, depends = list(age.by_group.half_widths_years), "the predicted age group"
    ends = f"{min(half_widths):.1f} to {max(half_widths):.1f}"
    return f"{100 * coverage:g} % of true ages are within {ends} years of the predicted age, depending on {depends}"


def _temperature(temperature: float) -> str:
    """Return what a temperature does to the probabilities, in words."""
    if temperature == 1.0:
        return "probabilities are left as they are"
    too_sure, change = ("too sure", "lowered") if temperature > 1.0 else ("not sure enough", "raised")
    return f"the model was {too_sure}, so the probability of its most likely class is {change}"


def _abstention(abstain_below: float) -> str:
    if abstain_below in (0.0, NEVER_SURE):
        return "never abstains" if abstain_below == 0.0 else "always abstains"
    return f"abstains if that probability is below {100 * abstain_below:.1f} %"


def print_calibration(console: Console, metrics: Mapping[str, Any]) -> None:
    """Print the measured coverage and errors beside those that the calibration promises."""
    measured, record = metrics["calibration"], metrics["evaluation"]
    if measured["warning"]:
        console.print(f"warning: {measured['warning']}")
    num_seen = measured["num_seen_in_calibration"]
    if num_seen:
        also = ""
        if record["split"] == "val" and record["trained_on_split_manifest_sha256"] == record["split_manifest_sha256"]:
            also = "; those above are slightly optimistic, too, because training chose its best epoch on these images"
        console.print(
            f"warning: {num_seen:,} of these images were used to calibrate, so the figures below are optimistic{also}; "
            "evaluate on test images"
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
                f"{task}: abstains on {_per_cent(part['abstained'])} of {part['n']:,}; calibration error "
                f"{_per_cent(part['ece_before'])} uncalibrated, {_per_cent(part['ece'])} calibrated"
                f"{calibration_gain(part)}"
            )
    console.print(table)
    for remark in remarks:
        console.print(remark)
    if age is not None:
        for line in _uncovered(age):
            console.print(line)


def calibration_gain(part: Mapping[str, Any]) -> str:
    """Return a remark if calibration made the calibration error of a task worse; else nothing.

    Args:
        part: of `evaluation.coverage.coverage_report`.
    """
    interval = part.get("nll_change_interval")
    if part["ece"] <= part["ece_before"] or interval is None:
        return ""
    if interval[0] > 0.0:
        return " (worse, and more than by chance: calibrate again, on images like these)"
    if interval[1] < 0.0:
        return " (but the probabilities as a whole fit these images better: the log loss is lower)"
    return f" (worse, but within chance for {part['n']:,} images)"


def _uncovered(age: Mapping[str, Any]) -> list[str]:
    """Return lines about the groups whose age intervals cover significantly less than the target."""
    groups = [item for breakdown in age["groups"].values() for item in breakdown.items()]
    large = [(name, part) for name, part in groups if part["n"] >= MIN_ROWS]
    failed = [
        f"  {name}: {_per_cent(part['coverage'])} of {part['n']:,} images"
        for name, part in large
        if part["interval"][1] < age["nominal"]
    ]
    num_small = len(groups) - len(large)
    left_out = f" ({num_small} groups of fewer than {MIN_ROWS} images are left out)" if num_small else ""
    if not failed:
        return []
    return [f"age intervals cover significantly less than {_per_cent(age['nominal'])} for{left_out}:", *failed]


def _per_cent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _between(interval: list[float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"

"""The terminal output of a scoring job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from agr_ray.config import ScoreConfig
from agr_ray.console import make_table, print_counts
from agr_ray.evaluation.shift import not_compared_lines
from agr_ray.json_log import name_run
from agr_ray.progress_bar import print_failed
from agr_ray.scoring.planning import Plan


def endings(plan: Plan, *, hides: bool = False) -> str:
    """Return the number of left-out keys for each ending; with `hides`, only the endings."""
    if hides:
        return "keys " + " and ".join(
            f"that end in {each}" if each else "without ending" for each in plan.endings_left_out
        )
    return ", ".join(
        f"{number:,} end in {ending}" if ending else f"{number:,} have no ending"
        for ending, number in plan.endings_left_out.items()
    )


def print_plan(config: ScoreConfig, plan: Plan, run_id: str, console: Console) -> None:
    """Print the plan and warn of likely mistakes; with score.min_cell, without counts. A JSON log names the run."""
    name_run(run_id)
    if not config.min_cell:
        left_out = f"{plan.num_excluded:,} left out by name or size, " if plan.num_excluded else ""
        console.print(
            f"{plan.num_listed:,} listed, {left_out}{plan.num_scored:,} already scored, {plan.num_to_do:,} to do"
        )
    if plan.endings_left_out and not config.include:
        console.print(f"left out: {endings(plan, hides=bool(config.min_cell))}; score.include selects the keys to read")
    for name, number in plan.num_grouped.items():
        if number < plan.num_to_do / 2:
            of = "few" if config.min_cell else f"{number:,} of {plan.num_to_do:,}"
            source = (
                "score.key_pattern captures it"
                if f"(?P<{name}>" in config.key_pattern
                else (f"it comes from score.metadata {config.metadata}, joined on the column uri")
            )
            console.print(f"warning: score.group_by {name}: only {of} photographs have a value; {source}")


def print_nothing_new(config: ScoreConfig, plan: Plan, run_id: str, console: Console) -> None:
    """Print that all photographs were scored before; with score.min_cell, without their number."""
    photographs = "all photographs" if config.min_cell else f"{plan.num_scored:,} photographs"
    console.print(f"nothing new since run {run_id}: {photographs} are scored already")
    console.print(
        "new options of demographic tables, such as group_by, only apply to photographs scored from now on; to apply "
        "them to all, give another --out"
    )


def print_summary(console: Console, totals: Mapping[str, Any], title: str) -> None:
    """Print the run's totals."""
    print_counts(console, title, totals["counts"] | {"faces": totals["num_faces"], "images": totals["num_images"]})
    table = make_table("", "number")
    rows = [("photographs", totals["num_images"])]
    rows += [(f"  {status}", count) for status, count in totals["counts"].items()]
    rows += [("faces", totals["num_faces"]), ("  flagged", totals["num_flagged"])]
    rows += [("  with an attribute too uncertain to tell", totals["num_abstained"])]
    if totals["num_unique"] is not None:
        rows += [("  distinct, of those not flagged", totals["num_unique"])]
    for label, number in rows:
        table.add_row(label, f"{number:,}")
    console.print(table)
    print_failed(console, totals["counts"])


def print_shift(console: Console, shift: Mapping[str, Any]) -> None:
    """Print whether the faces resemble those of the calibration, and where they do not (`Shift.to_json`)."""
    differs = shift["verdict"] in ("photographs_differ", "predictions_differ")
    console.print(f"{'warning: ' if differs else ''}{shift['sentence']}")
    for each in shift["quantities"]:
        if each["sentence"] and each["verdict"] == "shifted":
            console.print(f"  {each['sentence']}")
    for line in not_compared_lines(shift["quantities"]):
        console.print(f"  {line}")


def print_timings(console: Console, timings: Mapping[str, Any]) -> None:
    """Print the share of the workers' time that each stage took."""
    stages: dict[str, float] = timings["worker_s"]
    if stages:
        total_s = sum(stages.values())
        most_first = sorted(stages.items(), key=lambda stage: -stage[1])
        shares = ", ".join(f"{name} {spent_s / total_s:.0%}" for name, spent_s in most_first)
        console.print(f"workers' time: {shares}")

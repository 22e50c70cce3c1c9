"""Charts of an evaluation's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from agr_ray.evaluation.age_bands import AgeBand
from agr_ray.models.card_tables import words
from agr_ray.report.charts import INTERVAL, Dot, Line, Scale, dot_drawing, line_drawing
from agr_ray.report.page import Drawing

_BY_GROUP: Final = (
    ("age", "mae_years", "Age MAE by true group", Scale("age MAE, years", from_zero=True, interval_title=INTERVAL)),
    (
        "age",
        "bias_years",
        "Age bias by true group: below 0, people are estimated too young",
        Scale("age bias, years", interval_title=INTERVAL),
    ),
    ("gender", "accuracy", "Gender accuracy by true group", Scale("accuracy, %", 100.0, 1, interval_title=INTERVAL)),
    ("race", "accuracy", "Race accuracy by true group", Scale("accuracy, %", 100.0, 1, interval_title=INTERVAL)),
)
_SHOWN: Final = ("gender", "race", "age_group")


def age_by_truth(bands: Sequence[AgeBand]) -> list[Drawing]:
    """Return the predicted ages by true age: median and middle 80 %."""
    if len(bands) < 2:
        return []
    truth = [band.true_age_years for band in bands]
    lines = [
        Line(
            "median",
            truth,
            [band.median_years for band in bands],
            [band.low_years for band in bands],
            [band.high_years for band in bands],
        ),
        Line("the true age", truth, truth, is_reference=True),
    ]
    x, y = Scale("true age, years", digits=1), Scale("predicted age, years", digits=1, interval_title="middle 80 %")
    caption = "Predicted age by true age. The band holds the middle 80 % of the predictions."
    return [line_drawing("age-by-truth", caption, lines, x, y)]


def age_errors(metrics: Mapping[str, Any]) -> list[Drawing]:
    """Return the cumulative score: the share of images within so many years."""
    score, intervals = metrics["age"].get("cs"), metrics["intervals"]["age"].get("cs")
    if not score or score[0] is None:
        return []
    years = list(range(len(score)))
    low, high = ([each[end] if each else None for each in intervals or [None] * len(years)] for end in (0, 1))
    lines = [Line("model", years, score, low, high)]
    guess = metrics["baseline"]["age"].get("cs")
    if guess and guess[0] is not None:
        lines.append(Line("baseline", years, guess, is_reference=True))
    x = Scale("absolute error at most, years", digits=0, is_integer=True)
    return [
        line_drawing(
            "age-cumulative",
            "Cumulative score: share of images by absolute error, with 95 % intervals.",
            lines,
            x,
            Scale("share of images, %", 100.0, 1, from_zero=True, interval_title=INTERVAL),
        )
    ]


def reliability(task: str, points: Sequence[Mapping[str, Any]] | None) -> list[Drawing]:
    """Return accuracy against confidence."""
    if not points:
        return []
    x = [point["confidence"] for point in points]
    low, high = ([point["interval"][end] if point["interval"] else None for point in points] for end in (0, 1))
    lines = [
        Line("model", x, [point["accuracy"] for point in points], low, high),
        Line("perfect calibration", x, x, is_reference=True),
    ]
    caption = f"{task.capitalize()}: accuracy by confidence. Below the line, the model is overconfident."
    scale = Scale("confidence, %", 100.0, 1)
    return [
        line_drawing(
            f"reliability-{task}", caption, lines, scale, Scale("accuracy, %", 100.0, 1, interval_title=INTERVAL)
        )
    ]


def by_group(metrics: Mapping[str, Any]) -> list[Drawing]:
    """Return a chart for each metric, with a row for each group."""
    drawings = []
    for task, key, caption, scale in _BY_GROUP:
        overall, dots = metrics[task].get(key), []
        for breakdown in _SHOWN:
            own = [
                Dot(words(name), of[task][key], of["intervals"][task].get(key), f"n = {of['n']:,}")
                for name, of in metrics["groups"][breakdown].items()
                if of["n"] and of[task].get(key) is not None
            ]
            dots += [Dot(f"by {words(breakdown)}", is_heading=True), *own] if own else []
        if overall is not None and dots:
            name = f"groups-{task}-{key.replace('_', '-')}"
            drawings.append(dot_drawing(name, f"{caption}. Dotted: all images.", dots, scale, reference=overall))
    return drawings


def thresholds(each_threshold: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """Return, for each age limit, both error rates against the challenge age."""
    drawings = []
    for each in each_threshold:
        years = [point["challenge_years"] for point in each["curve"]]
        lines = []
        for who, name in (("adult", "false-adult rate"), ("minor", "false-minor rate")):
            rates = [point[f"false_{who}_rate"] for point in each["curve"]]
            intervals = [point[f"false_{who}_interval"] or (None, None) for point in each["curve"]]
            if any(rate is not None for rate in rates):
                low, high = ([pair[end] for pair in intervals] for end in (0, 1))
                lines.append(Line(name, years, rates, low, high))
        legal = each["threshold_years"]
        drawings.append(
            line_drawing(
                f"limit-{legal}",
                f"Legal age {legal}: false-adult and false-minor rate by challenge age.",
                lines,
                Scale("challenge age, years", digits=0, is_integer=True),
                Scale("error rate, %", 100.0, 1, from_zero=True, interval_title=INTERVAL),
                marks=(each["challenge_years"],),
            )
        )
    return drawings


def coverage_by_group(age: Mapping[str, Any]) -> list[Drawing]:
    """Return coverage and width of the age intervals by true group."""
    covered, widths = [], []
    for breakdown in _SHOWN:
        groups = age["groups"].get(breakdown) or {}
        if groups:
            covered.append(Dot(f"by {words(breakdown)}", is_heading=True))
            widths.append(Dot(f"by {words(breakdown)}", is_heading=True))
        for name, of in groups.items():
            note = f"n = {of['n']:,}"
            covered.append(Dot(words(name), of["coverage"], of["interval"], note))
            widths.append(Dot(words(name), of["mean_width_years"], None, note))
    return [
        dot_drawing(
            "interval-coverage",
            "Coverage of the age intervals by true group. Dotted: target coverage.",
            covered,
            Scale("true ages in their intervals, %", 100.0, 1, interval_title=INTERVAL),
            reference=age["nominal"],
        ),
        dot_drawing(
            "interval-width",
            "Mean width of the age intervals by true group. Dotted: all images.",
            widths,
            Scale("width, years", 1.0, 1, from_zero=True),
            reference=age["mean_width_years"],
        ),
    ]


def selective(curves: Mapping[str, Any]) -> list[Drawing]:
    """Return risk against coverage for each task."""
    drawings = []
    for task, found in curves.items():
        if not found:
            continue
        points = found["curve"]
        low, high = ([point["interval"][end] if point["interval"] else None for point in points] for end in (0, 1))
        line = Line("risk", [point["coverage"] for point in points], [point["risk"] for point in points], low, high)
        label, factor, digits = ("age MAE, years", 1.0, 2) if task == "age" else ("error rate, %", 100.0, 1)
        y = Scale(label, factor, digits, from_zero=True, interval_title=INTERVAL)
        caption = f"{task.capitalize()}: risk against coverage: the error of the most certain predictions."
        drawings.append(line_drawing(f"selective-{task}", caption, [line], Scale("coverage, %", 100.0, 0), y))
    return drawings

"""Tables of metrics: with intervals, by group, between groups, at age thresholds and under corruptions.

A function `*_rows` returns the table, which pages show too; `*_table` returns it in Markdown, for the model card.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple


class Rows(NamedTuple):
    """A table: the titles of its columns, and its rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


HEADLINES: Final = (
    ("age", "mae_years", "age MAE", 1.0, " years"),
    ("age", "within_5", "age within 5 years", 100.0, " %"),
    ("age", "exact_group", "in the right age group", 100.0, " %"),
    ("age", "one_off", "in the right age group or the next", 100.0, " %"),
    ("age", "bias_years", "age bias", 1.0, " years"),
    ("age", "cell_mae_years", "age MAE, mean over cells of gender, race and age group", 1.0, " years"),
    ("gender", "accuracy", "gender accuracy", 100.0, " %"),
    ("gender", "balanced_accuracy", "gender balanced accuracy", 100.0, " %"),
    ("gender", "auc", "gender AUC", 1.0, ""),
    ("gender", "ece", "gender calibration error", 100.0, " %"),
    ("race", "accuracy", "race accuracy", 100.0, " %"),
    ("race", "balanced_accuracy", "race balanced accuracy", 100.0, " %"),
    ("race", "auc", "race AUC, mean of one against the rest", 1.0, ""),
    ("race", "ece", "race calibration error", 100.0, " %"),
)
"""Metrics that get a row: task, key, title, and the factor and unit of the figures. Validation has not all of them."""

_COMPARED: Final = (
    ("age", "mae_years", "age MAE", 1.0, " years"),
    ("gender", "accuracy", "gender accuracy", 100.0, " %"),
    ("race", "accuracy", "race accuracy", 100.0, " %"),
    ("detector", "fallback_share", "no face found", 100.0, " %"),
)
"""Metrics of which the worst and the best group are shown."""

GROUPS: Final = ("gender", "race", "age_group")

NO_DISPARITY: Final = (
    "No significant difference between groups was found in age MAE, gender accuracy, race accuracy or the share "
    "without a detected face. That does not prove that there is none."
)
TOO_SMALL: Final = "The groups are too small to be compared: fewer than two have 30 images."
DISPARITY_NOTE: Final = (
    "Significant differences between groups of at least 30 images. The intervals are corrected for comparing all pairs "
    "of groups."
)
THRESHOLD_NOTE: Final = "If the predicted age decided who is old enough (the model must not be used so):"


def headline_table(metrics: Mapping[str, Any]) -> list[str]:
    """Return a table of the headline metrics, beside the constant baseline."""
    return table(*headline_rows(metrics))


def headline_rows(metrics: Mapping[str, Any]) -> Rows:
    """Return the headline metrics, with intervals if there are any, beside the constant baseline."""
    intervals = metrics.get("intervals") or {}
    rows = []
    for task, key, label, scale, unit in HEADLINES:
        value = metrics[task].get(key)
        if value is not None:
            interval = between((intervals.get(task) or {}).get(key), scale, unit)
            guess = (metrics.get("baseline") or {}).get(task, {}).get(key)
            num = f"{num_measured(metrics, task, key):,}"
            rows.append((label, figure(value, scale, unit), interval, figure(guess, scale, unit), num))
    if not any(interval for _, _, interval, *_ in rows):
        return Rows(
            ("metric", "model", "baseline", "images"), [(label, value, *rest) for label, value, _, *rest in rows]
        )
    return Rows(("metric", "model", "95 % interval", "baseline", "images"), rows)


def num_measured(metrics: Mapping[str, Any], task: str, key: str) -> int:
    """Return on how many images a metric was measured: those with the label, for age groups also with an age range."""
    of = metrics[task]
    if key in ("exact_group", "one_off"):
        return int(of["n"] + of["n_range"] - of["n_spanning"])
    return int(of["n"])


def group_table(groups: Mapping[str, Any]) -> list[str]:
    """Return a table with a row for each group by true label that has images."""
    found = group_rows(groups)
    return ["The figures of a group with few images are uncertain.", "", *table(*found)] if found.rows else []


def group_rows(groups: Mapping[str, Any]) -> Rows:
    """Return a row for each group by true label that has images."""
    rows = [
        (
            words(attribute),
            name,
            f"{of['n']:,}",
            number(of["age"]["mae_years"], 1.0, ""),
            number(of["age"]["bias_years"], 1.0, "", "+.2f"),
            number(of["age"]["exact_group"], 100.0, ""),
            number(of["gender"]["accuracy"], 100.0, ""),
            number(of["race"]["accuracy"], 100.0, ""),
            number(of.get("detector", {}).get("fallback_share"), 100.0, ""),
        )
        for attribute in GROUPS
        for name, of in (groups.get(attribute) or {}).items()
        if of["n"]
    ]
    header = ["by true", "", "images", "age MAE, years", "age bias, years"]
    header += ["in the right age group, %", "gender, %", "race, %", "no face found, %"]
    width = len(header) if any(row[-1] for row in rows) else len(header) - 1  # validation does not count these
    return Rows(header[:width], [row[:width] for row in rows])


def disparity_table(disparities: Mapping[str, Any]) -> list[str]:
    """Return a table of the worst and the best group, for each breakdown and metric that the images show to differ."""
    found = disparity_rows(disparities)
    if found is None:
        return []
    if not found.rows:
        return [NO_DISPARITY, ""]
    return [
        DISPARITY_NOTE,
        "",
        *table(*found),
        "",
        *(each for line in no_differences(disparities) for each in (line, "")),
    ]


def disparity_rows(disparities: Mapping[str, Any]) -> Rows | None:
    """Return the worst and the best group for each breakdown and metric that the images show to differ.

    None: no groups were compared, because they are too small.
    """
    rows = []
    num_compared = 0
    for breakdown, tasks in disparities.items():
        for task, key, label, scale, unit in _COMPARED:
            found = tasks[task][key]
            num_compared += found is not None
            if found is not None and found["differs"]:
                worst, best = (
                    f"{found[side]['name']}: {figure(found[side]['value'], scale, unit)}" for side in ("worst", "best")
                )
                gap = f"{number(found['gap'], scale, '')} ({between(found['gap_interval'], scale, unit)})"
                rows.append((words(breakdown), label, worst, best, gap, small_groups(found, scale, unit)))
    header = ("groups by", "metric", "worst", "best", "gap (95 % interval)", "left out")
    return Rows(header, rows) if num_compared else None


def no_differences(disparities: Mapping[str, Any]) -> list[str]:
    """Return a sentence about the breakdowns and metrics that do not differ significantly; empty: there are none."""
    texts = []
    for task, key, label, _, _ in _COMPARED:
        compared = {breakdown: tasks[task][key] for breakdown, tasks in disparities.items() if tasks[task][key]}
        same = [words(breakdown) for breakdown, found in compared.items() if not found["differs"]]
        if same:
            texts.append(f"{label} by {listed(same)}")
    return [f"No significant difference: {'; '.join(texts)}. That does not prove that there is none."] if texts else []


def small_groups(found: Mapping[str, Any], scale: float, unit: str) -> str:
    """Return how many groups were too small to be compared, and the worst of them; empty: none.

    Args:
        found: result of `evaluation.disparities.disparity`.
        scale: of the metric.
        unit: of the metric.
    """
    if not found["num_small"]:
        return ""
    groups = f"{found['num_small']} {'group' if found['num_small'] == 1 else 'groups'} of fewer than 30 images"
    worst = found.get("worst_small")
    return groups + (
        f"; worst: {worst['name']}, {figure(worst['value'], scale, unit)}, n={worst['n']}" if worst else ""
    )


def threshold_table(thresholds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of false-adult and false-minor rates, with and without a buffer."""
    found = threshold_rows(thresholds)
    return [THRESHOLD_NOTE, "", *table(*found)] if found.rows else []


def threshold_rows(thresholds: Sequence[Mapping[str, Any]]) -> Rows:
    """Return false-adult and false-minor rates, with and without a buffer."""
    rows = []
    for each in thresholds:
        for key, years in (("at_threshold", each["threshold_years"]), ("with_buffer", each["challenge_years"])):
            cells = []
            for who, name in (("minor", "false_adult"), ("adult", "false_minor")):
                rate, interval = each[key][f"{name}_rate"], each[key][f"{name}_rate_interval"]
                shown = f" ({between(interval, 100.0, ' %')})" if interval else ""
                cells += [f"{each[key][f'n_{who}']:,}", figure(rate, 100.0, " %") + shown]
            rows.append((str(each["threshold_years"]), str(years), *cells))
    return Rows(
        (
            "legal age",
            "challenge age",
            "below legal age",
            "false-adult rate",
            "at or above legal age",
            "false-minor rate",
        ),
        rows,
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(escaped(str(cell)) for cell in line) + " |" for line in lines]


def escaped(text: str) -> str:
    """Return text without special meaning in Markdown, on one line. `unescaped` reverses it."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def unescaped(text: str) -> str:
    """Return the text that `escaped` was given."""
    return re.sub(r"\\(.)", r"\1", text)


_SPECIAL: Final = re.compile(r"([\\`*{}\[\]<>#|~]|(?<![^\W_])_|_(?![^\W_]))")
"""Characters with a meaning in Markdown; an underscore within a word has none."""


def figure(value: float | None, scale: float, unit: str) -> str:
    """Return a value with its unit; empty if there is none. A fraction without a unit has three digits."""
    return number(value, scale, unit, ".2f" if unit else ".3f")


def between(interval: Sequence[float] | None, scale: float, unit: str) -> str:
    """Return an interval without its unit; empty if there is none."""
    digits = 2 if unit else 3
    return "" if interval is None else f"{interval[0] * scale:.{digits}f} to {interval[1] * scale:.{digits}f}"


def number(value: float | None, scale: float, unit: str, form: str = ".2f") -> str:
    """Return a value, scaled and formatted, with its unit; empty if there is none."""
    return "" if value is None else f"{value * scale:{form}}{unit}"


def listed(texts: Sequence[str]) -> str:
    """Return texts as a list in a sentence: `a, b and c`."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def words(name: str) -> str:
    """Return a key as words: `age_group` is `age group`."""
    return name.replace("_", " ")


def stress_table(stress: Mapping[str, Any] | None) -> list[str]:
    """Return the headline metrics of corrupted images beside those of the same images as they are."""
    if not stress:
        return []
    return ["", stress_note(stress), "", *table(*stress_rows(stress))]


def stress_note(stress: Mapping[str, Any]) -> str:
    """Return how many copies were measured, in words."""
    return (
        f"Corrupted copies of {stress['num_images']:,} of the images, by {len(stress['corruptions'])} corruptions of "
        "five severities each; means are over severities. Detection is not run again, so faces that the detector would "
        "miss are counted, too."
    )


def stress_rows(stress: Mapping[str, Any]) -> Rows:
    """Return the headline metrics of corrupted images beside those of the same images as they are."""
    titles = {f"{task}_{key}": (label, scale, unit) for task, key, label, scale, unit in HEADLINES}
    rows = []
    for name, clean in stress["clean"].items():
        label, scale, unit = titles[name]
        means = {corruption: each["mean"][name]["value"] for corruption, each in stress["corruptions"].items()}
        badness = {corruption: abs(value) if unit == " years" else -value for corruption, value in means.items()}
        worst = max(badness, key=badness.__getitem__)
        figures = (clean["value"], stress["mean"][name]["value"], means[worst])
        rows.append(
            (
                label,
                *(f"{figure * scale:.2f}{unit}" for figure in figures[:2]),
                f"{figures[2] * scale:.2f}{unit} ({words(worst)})",
            )
        )
    return Rows(("metric", "clean", "mean of all corruptions", "worst corruption"), rows)

"""The paper's tables and figures, filled with the figures of an evaluation.

Bosco and Chi, "Enhanced Age, Gender, Race Estimation Using Multi-task CNN", IJLTEMAS 2025. The paper's own figures are
quoted beside, as it prints them: its tables 9 and 12 give different ones for the same data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from agr_ray.config.presets import PRESETS
from agr_ray.report.charts import INTERVAL, Dot, Scale, dot_drawing
from agr_ray.report.page import Block, Drawing, Drawings, Paragraph, Table

_COLUMNS: Final[Sequence[tuple[str, str, str, float, str]]] = (
    ("age", "mae_years", "age MAE, years", 1.0, ".2f"),
    ("age", "within_5", "within 5 years, %", 100.0, ".1f"),
    ("age", "one_off", "in the right age group or the next, %", 100.0, ".1f"),
    ("gender", "accuracy", "gender, %", 100.0, ".1f"),
    ("race", "accuracy", "race, %", 100.0, ".1f"),
)
_PAPER: Final = (
    ("the paper: overall (table 6)", "2.95", "86.2", "90.7", "98.3", "93.1"),
    ("the paper: UTKFace (tables 7 to 9)", "4.8", "86.2", "86.2", "96.1", "91.4"),
    ("the paper: UTKFace (table 12)", "2.95", "86.2", "90.7", "98.3", "93.1"),
    ("the paper: Adience (tables 7 to 9)", "5.2", "83.5", "83.5", "93.8", ""),
    ("the paper: Adience (table 12)", "4.2", "83.5", "86.0", "", ""),
    ("the paper: MORPH II (tables 7 to 9)", "3.7", "90.4", "90.4", "97.2", "92.7"),
    ("the paper: MORPH II (table 12)", "2.8", "90.4", "", "97.8", "93.5"),
    ("the paper: synthetic (tables 7 to 9)", "0", "100", "100", "100", "100"),
)
_TITLE: Final = "The paper's tables and figures"
_MISSING: Final = {"Faces": "only with --faces, because it shows people"}
_INDEX: Final = (
    ("table 1", "learning rate and loss", "Model and training"),
    ("table 2", "training and test setting", "Model and training; Data"),
    ("table 3", "confusion of gender", "Gender"),
    ("table 4", "confusion of race", "Race"),
    ("table 5", "confusion of age groups", "Age"),
    ("table 6", "overall metrics", "Results"),
    ("table 7", "results by data set", "The paper's tables and figures: by data set"),
    ("table 8", "one-off accuracy by data set", "The paper's tables and figures: by data set"),
    ("table 9", "comparison of data sets", "The paper's tables and figures: by data set"),
    ("table 10", "methods and their data", "The paper's tables and figures: as cited in the paper"),
    ("table 11", "comparison with other methods", "The paper's tables and figures: as cited in the paper"),
    ("table 12", "comparison with the best method", "The paper's tables and figures: by data set"),
    ("figure 1", "the network", "Model and training"),
    ("figure 2", "the network, in detail", "Model and training: as a table"),
    ("figure 3", "training", "Model and training: one step of training"),
    ("figure 4", "sample images", "Faces"),
    ("figure 5", "confusion of age groups", "Age"),
    ("figure 6", "confusion of similar races", "Race"),
    ("figure 7", "overall metrics as a chart", "The paper's tables and figures: accuracies"),
    ("figure 8", "data sets as a chart", "The paper's tables and figures: accuracies"),
    ("figure 9", "confusion of race", "Race"),
    ("figure 10", "confusion of race and gender", "Race; Gender"),
)


def data_sets(evaluations: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Return the headline metrics of each data set beside those that the paper prints, and a chart of them.

    Args:
        evaluations: content of metrics.json of each evaluation, of different data.
    """
    rows = [
        (f"{each['evaluation']['source']}, split {each['evaluation']['split']}", *_figures(each))
        for each in evaluations
    ]
    table = Table(
        ("by data set", *(column[2] for column in _COLUMNS)),
        [*rows, *_PAPER],
        caption="By data set",
        note="The paper's results are as it prints them. It equates 'within 5 years' with 'age group or the next', and "
        "tables 9 and 12 contradict each other. Its data and splits are not public, so its results cannot be compared "
        "with this model's. Results of different data sets are never averaged here.",
    )
    return [table, Drawings([_accuracies(evaluations)])]


def _figures(metrics: Mapping[str, Any]) -> list[str]:
    values = ((metrics[task].get(key), factor, form) for task, key, _, factor, form in _COLUMNS)
    return ["" if value is None else f"{value * factor:{form}}" for value, factor, form in values]


def _accuracies(evaluations: Sequence[Mapping[str, Any]]) -> Drawing:
    dots = []
    for metrics in evaluations:
        name = f"{metrics['evaluation']['source']}, split {metrics['evaluation']['split']}"
        dots.append(Dot(name, is_heading=True))
        for task, key, title, factor, _ in _COLUMNS:
            value = metrics[task].get(key)
            if factor != 1.0 and value is not None:
                dots.append(Dot(title.removesuffix(", %"), value, metrics["intervals"][task].get(key)))
    scale = Scale("accuracy, %", 100.0, 1, interval_title=INTERVAL)
    return dot_drawing("accuracies", "Accuracies by data set, with 95 % intervals.", dots, scale)


def paper_methods(metrics: Mapping[str, Any]) -> list[Block]:
    """Return what the paper cites of other methods, with this model above."""
    columns = [column for column in _COLUMNS if column[1] != "within_5"]
    own = [
        "" if metrics[task].get(key) is None else f"{metrics[task][key] * factor:{form}}"
        for task, key, _, factor, form in columns
    ]
    rows = [("this model, here", "", *own)]
    for name, preset in PRESETS.items():
        if preset.cited is not None:
            age, rest = preset.cited.mae_years, (preset.cited.one_off, preset.cited.gender, preset.cited.race)
            shares = ("" if value is None else f"{100 * value:.1f}" for value in rest)
            rows.append((preset.row, name, "" if age is None else f"{age:.2f}", *shares))
    return [
        Table(
            ("as cited in the paper", "preset", *(column[2] for column in columns)),
            rows,
            num_text_columns=2,
            caption="As cited in the paper",
            note="Tables 10 and 11 of the paper cite results on other data, splits and protocols. Do not use them as "
            "targets, and do not rank them against each other or against this model. agr-ray compare trains and "
            "measures these networks on the same data.",
        ),
        Paragraph("Where to find each table and figure of the paper on this page:"),
    ]


def paper_index(sections: Sequence[str]) -> list[Block]:
    """Return where each table and figure of the paper is on the page, and which are missing.

    Args:
        sections: titles of the other sections of the page.
    """
    rows = []
    for number, what, where in _INDEX:
        places = [place for place in where.split("; ") if place.partition(":")[0] in (*sections, _TITLE)]
        rows.append(
            (number, what, "; ".join(places) or _MISSING.get(where, "not measured: no such labels or no such head"))
        )
    return [Table(("in the paper", "content", "here"), rows, num_text_columns=3)]

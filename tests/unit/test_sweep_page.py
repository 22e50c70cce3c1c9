"""The report of a sweep contains every outcome. Its looks must be checked by eye."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from outlines import outline, words

from agr_ray.report.figure import COLOURS, figure_style
from agr_ray.report.importance import MIN_TRIALS, importances
from agr_ray.report.page import Drawing
from agr_ray.report.page_files import write_page
from agr_ray.report.page_html import page_html
from agr_ray.report.page_markdown import page_markdown
from agr_ray.report.sweep_figures import SweepFigures
from agr_ray.report.sweep_page import SweepReport, sweep_page
from agr_ray.report.trial_rows import TrialRow
from agr_ray.report.trial_study import trial_study
from agr_ray.storage import Storage

NAN = float("nan")
BASELINE = {"objective": 1.0, "age_mae_years": 15.0, "gender_error": 0.5, "race_error": 0.8}


def trial(number: int, objective: float | None = 0.4, **changes: Any) -> TrialRow:
    row = TrialRow(
        number=number,
        state="complete",
        why="",
        params={},
        objective=objective,
        age_mae_years=6.0,
        gender_error=0.1,
        race_error=0.2,
        worst_group_mae_years=9.0,
        epochs=2,
        duration_s=90.0,
        is_feasible=True,
        curve=(0.6, objective),
        is_reference=False,
    )
    return replace(row, **changes)


def report(trials: list[TrialRow], best_number: int | None = None, **changes: Any) -> SweepReport:
    made = SweepReport(
        title="A sweep",
        mode="scalar",
        trials=trials,
        space=space_of(trials),
        best_number=best_number,
        recipe_toml="[loss]\nage_weight = 2.0\n" if best_number is not None else "",
        constraints=(),
        provenance={"seed": "7"},
    )
    return replace(made, **changes)


def space_of(trials: list[TrialRow]) -> dict[str, BaseDistribution]:
    """Return a space that holds the trials' parameters."""
    values: dict[str, list[Any]] = {}
    for row in trials:
        for name, value in row.params.items():
            values.setdefault(name, []).append(value)
    return {name: distribution(each) for name, each in values.items()}


def distribution(values: list[Any]) -> BaseDistribution:
    if isinstance(values[0], bool | str):
        return CategoricalDistribution(sorted(set(values)))
    kind = IntDistribution if isinstance(values[0], int) else FloatDistribution
    return kind(min(values), max(values), log=min(values) > 0 and max(values) > 20 * min(values))


def html(made: SweepReport) -> str:
    return page_html(sweep_page(made))


def many(num: int) -> list[TrialRow]:
    """Trials in which the age's weight decides, of all states, with categories and a parameter that some lack."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(num):
        age_weight, race_weight = (float(10 ** rng.uniform(-1, 1)) for _ in range(2))
        optimizer = str(rng.choice(["adam", "sgd"]))
        params: dict[str, Any] = {"loss.age_weight": age_weight, "loss.race_weight": race_weight}
        params |= {"optimizer": optimizer, "frozen": bool(rng.integers(2)), "batch_size": int(rng.choice([32, 64]))}
        if optimizer == "sgd":
            params["momentum"] = float(rng.uniform(0.5, 0.99))
        objective = 0.3 + 0.1 * abs(math.log10(age_weight)) + 0.005 * float(rng.normal())
        state = ("complete", "complete", "complete", "pruned", "failed")[number % 5]
        errors = rng.uniform(size=3)
        rows.append(
            trial(
                number,
                objective,
                state=state,
                why="" if state == "complete" else "out of memory",
                params=params,
                is_feasible=number % 7 != 1,
                is_reference=number == 0,
                is_on_front=number % 10 == 0,
                age_mae_years=float(errors[0]),
                gender_error=float(errors[1]),
                race_error=float(errors[2]),
            )
        )
    return rows


@pytest.fixture(scope="module")
def large() -> str:
    return html(report(many(120), best_number=0))


def test_a_large_report_is_complete_and_self_contained(large: str) -> None:
    found = outline(large)

    assert all(link.startswith("data:image/png;base64,") for link in found.fetched)
    assert not {"link", "iframe", "img", "object", "embed", "base"} & set(found.tags)
    assert not re.search(r"https?://|<script[^>]*src|@import|url\((?!#)", large)
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert found.tags.count("svg") == 2 + 1 + 6 + 1 + 3  # course, importance, slices, contour, front
    assert len(large) < 2_000_000


def test_optunas_figures_take_their_colours_from_the_page(large: str) -> None:
    for colour in ("#1f77b4", "#d62728", "#cccccc", "#e5e5e5", "#555555"):  # Optuna's and ggplot's
        assert colour not in large
    assert "stroke: var(--red)" in large
    assert "fill: var(--blue)" in large


def test_optunas_figures_leave_nothing_behind() -> None:
    style = {name: str(value) for name, value in matplotlib.rcParams.items()}
    ggplot = dict(matplotlib.style.library["ggplot"])
    before = plt.get_fignums()

    assert "<svg" in html(report(many(30), 0))

    assert plt.get_fignums() == before
    assert {name: str(value) for name, value in matplotlib.rcParams.items()} == style
    assert dict(matplotlib.style.library["ggplot"]) == ggplot


def test_a_large_report_names_important_settings_and_those_some_trials_lack(large: str) -> None:
    text = words(large)

    assert "Importance by fANOVA, from the final objectives of 72 complete trials" in text
    assert "not all of these trials have it: momentum" in text
    assert re.search(r"\d+ of 72 complete trials have it", text)


def test_the_same_rows_make_the_same_page() -> None:
    rows = many(4)

    assert html(report(rows, 0)) == html(report(rows[::-1], 0))


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ([], "No trial was started."),
        ([trial(0, None, state="failed", why="out of memory", curve=(), epochs=0)], "No trial was completed"),
        ([trial(0, state="pruned", why="ASHA")], "No trial was completed"),
        ([trial(0, is_feasible=False), trial(1, is_feasible=False)], "None of the 2 complete trials satisfies all"),
        ([trial(0)], "No trial was chosen."),
        ([trial(0, NAN, curve=(NAN, None))], "without a finite objective"),
    ],
)
def test_a_sweep_without_a_chosen_trial_says_why(trials: list[TrialRow], said: str) -> None:
    text = words(html(report(trials)))

    assert said in text
    assert "No importances are shown." in text
    assert "there is no best.toml" in text


def test_one_trial_makes_a_page() -> None:
    text = words(html(report([trial(0, is_reference=True)], 0)))

    assert "1 trial:" in text
    assert "These are the paper's own weights" in text
    assert f"at least {MIN_TRIALS} are needed" in text


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, None])
def test_non_finite_values_are_shown_as_missing_and_not_drawn(value: float | None) -> None:
    odd = trial(
        2,
        value,
        params={"lr": 0.3},
        age_mae_years=value,
        gender_error=value,
        race_error=value,
        worst_group_mae_years=value,
        curve=(value, 0.5, value),
    )
    rows = [trial(0, 0.5, params={"lr": 0.1}), trial(1, 0.4, params={"lr": 0.2}), odd]

    page = html(report(rows, 1))

    assert "without a finite objective, and so in no figure: 2." in words(page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert not re.search(r"\b(nan|inf)\b", svg)


@pytest.mark.usefixtures("blank_figures")
def test_the_headline_compares_with_the_papers_weights_and_the_baseline() -> None:
    rows = [trial(0, 0.5, is_reference=True, age_mae_years=8.0), trial(1, 0.4, age_mae_years=6.0)]

    text = words(html(report(rows, 1, baseline=BASELINE)))

    assert "Trial 1 was chosen, with an objective of 0.4000. That is 20.0 % lower than the 0.5000" in text
    assert "Chosen, trial 1 0.4000 6.00 10.0 % 20.0 % 9.00" in text
    assert "Paper's own weights, trial 0 0.5000 8.00" in text
    assert "Change -20.0 % -25.0 % +0.0 %" in text
    assert "most frequent classes 1.0000 15.00 50.0 % 80.0 %" in text


@pytest.mark.usefixtures("blank_figures")
def test_the_papers_weights_are_called_best_only_if_they_are() -> None:
    rows = [trial(0, 0.5, is_reference=True), trial(1, 0.4)]

    assert "no other trial was better" not in html(report(rows, 0))
    assert "no other trial was better" in html(report([rows[0], trial(1, 0.6)], 0))


@pytest.mark.usefixtures("blank_figures")
def test_a_stopped_reference_is_not_compared() -> None:
    rows = [trial(0, 0.5, is_reference=True, state="pruned"), trial(1)]

    text = words(html(report(rows, 1)))

    assert "was not completed, so they cannot be compared" in text
    assert "Change" not in text


def test_strings_in_the_report_are_escaped() -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>--!> \" ' & $x^2$"
    rows = [
        trial(number, 0.4 + 0.01 * number, params={evil: number, "word": evil if number else "plain"})
        for number in range(3)
    ]
    rows.append(trial(3, None, state="failed", why=evil))
    made = report(
        rows,
        0,
        title=evil,
        constraints=(evil,),
        recipe_toml=evil,
        provenance={evil: evil},
    )

    found = outline(html(made))

    assert found.tags.count("script") == 1
    assert "img" not in found.tags
    assert evil in "".join(found.texts)


def test_control_characters_and_lone_surrogates_can_be_written(tmp_path: Path) -> None:
    odd = "a\x00\x1b\ud800\n$\\frac$"
    rows = [trial(number, params={"word": f"{odd}{number}", odd: number}) for number in range(3)]

    page = write_page(Storage(), str(tmp_path), sweep_page(report(rows, 0)))

    assert "All trials" in Path(page).read_text("utf-8")


@pytest.mark.usefixtures("blank_figures")
def test_failures_with_the_same_reason_are_printed_once() -> None:
    rows = [trial(n, None, state="failed", why=why, curve=()) for n, why in enumerate(["oom", "nan", "oom", " "])]

    text = words(html(report(rows)))

    assert "Trials 0, 2: oom" in text
    assert "Trial 1: nan" in text
    assert "Trial 3: no reason was recorded" in text


def test_without_a_head_the_front_is_of_the_other_errors() -> None:
    rows = [
        trial(n, age_mae_years=5.0 + n, gender_error=0.2 - 0.01 * n, race_error=None, is_on_front=True)
        for n in range(3)
    ]

    page = html(report(rows, 0, mode="pareto"))

    assert "3 complete trials satisfy all constraints" in words(page)
    assert page.count("<svg") == 2 + 1


def test_the_front_matches_the_rows() -> None:
    rows = [trial(n, age_mae_years=9.0 - n, is_on_front=n != 1) for n in range(3)]

    page = html(report(rows, 0, mode="pareto"))

    assert "2 complete trials satisfy all constraints" in words(page)
    table = page[page.index('id="trade-off"') : page.index('id="failures"')]
    assert re.findall(r'<th scope="row" class="text">(\d)</th>', table) == ["2", "0"]


def test_the_panel_of_a_front_contains_it_and_the_chosen_trial() -> None:
    near = [trial(n, age_mae_years=9.0 + 0.1 * n, gender_error=0.2) for n in range(3)]
    far = trial(3, age_mae_years=30.0, gender_error=0.1)
    errors = ("age_mae_years", "gender_error")

    def right_end(row: TrialRow, best_number: int | None) -> float:
        drawing = SweepFigures([*near, row], {}, best_number).front(errors, {name: name for name in errors}, errors, "")
        with figure_style():
            return float(drawing.draw().axes[0].get_xlim()[1])

    assert right_end(far, None) < 10.0
    assert right_end(far, 3) > 30.0
    assert right_end(replace(far, is_on_front=True), None) > 30.0


def test_an_outlier_does_not_stretch_the_axes_and_is_counted() -> None:
    rows = [trial(n, 0.4 + 0.01 * n, params={"lr": 0.1 + n}) for n in range(9)]
    rows.append(trial(9, 50.0, params={"lr": 3.0}))
    figures = SweepFigures(rows, space_of(rows), 0)

    for drawing in (figures.history(""), figures.slice("lr", "slice-0", "")):
        with figure_style():
            axes = drawing.draw().axes[0]
        assert axes.get_ylim()[1] < 0.6
        assert [text.get_text() for text in axes.texts] == ["1 above"]


def test_the_chosen_trial_and_the_papers_are_marked_where_they_are() -> None:
    rows = [trial(n, 0.4 + 0.01 * n, params={"optimizer": "adam" if n else "sgd", "lr": 0.1 + n}) for n in range(4)]
    rows[2] = replace(rows[2], is_reference=True)
    figures = SweepFigures(rows, space_of(rows), 0)

    def marks(drawing: Drawing) -> dict[str, list[float]]:
        with figure_style():
            axes = drawing.draw().axes[0]
        named = {str(dots.get_label()): dots.get_offsets().tolist() for dots in axes.collections}
        return {label: named[label][0] for label in ("chosen", "paper's weights")}

    assert marks(figures.slice("lr", "a", "")) == {"chosen": [0.1, 0.4], "paper's weights": [2.1, pytest.approx(0.42)]}
    assert marks(figures.slice("optimizer", "b", "")) == {
        "chosen": [1.0, 0.4],
        "paper's weights": [0.0, pytest.approx(0.42)],
    }


def test_curves_are_told_apart_by_state() -> None:
    rows = [
        trial(0, 0.5),
        trial(1, 0.4),
        trial(2, state="failed", curve=(0.9,)),
        trial(3, state="pruned", curve=(0.9,)),
    ]
    with figure_style():
        axes = SweepFigures(rows, {}, 1).curves("").draw().axes[0]

    colours = [(str(line.get_label()), str(line.get_color())) for line in axes.lines]
    assert colours == [
        ("complete", COLOURS["blue"]),
        ("chosen", COLOURS["red"]),
        ("stopped early", COLOURS["amber"]),
    ]


def test_the_study_has_the_numbers_of_the_rows() -> None:
    rows = [trial(1, 0.5), trial(3, NAN), trial(4, state="pruned"), trial(5, is_feasible=False)]

    study = trial_study(rows, {})

    states = [TrialState.FAIL, TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL, TrialState.PRUNED]
    assert [each.state for each in study.trials] == [*states, TrialState.COMPLETE]
    assert study.best_trial.number == 1


@pytest.mark.usefixtures("blank_figures")
def test_a_trial_that_has_not_ended_is_not_called_failed() -> None:
    rows = [trial(0), trial(1, 0.5, state="unfinished", curve=(0.5,))]

    page = html(report(rows, 0))

    assert "2 trials: 1 complete, 0 stopped early, 0 failed, 1 not finished." in words(page)
    assert "No trial failed." in words(page)
    assert "not finished" in page[page.index('id="trials"') :]


@pytest.mark.usefixtures("blank_figures")
def test_a_better_trial_that_violates_a_constraint_does_not_count_against_the_papers_weights() -> None:
    rows = [trial(0, 0.5, is_reference=True), trial(1, 0.1, is_feasible=False), trial(2, 0.2, state="pruned")]

    assert "no other trial was better" in html(report(rows, 0))


def test_the_page_as_markdown_has_every_trial() -> None:
    page = page_markdown(sweep_page(report(many(6), 0)), "figures")

    table = page[page.index("## All trials") : page.index("## Recipe")]
    assert [line.split(" | ")[0] for line in table.splitlines()[4:-1]] == ["| **0**", *(f"| {n}" for n in range(1, 6))]
    assert "![" in page


def test_importance_finds_the_parameter_that_decides() -> None:
    found = importances(many(60), space_of(many(60)))

    assert found.why_not == ""
    assert next(iter(found.shares)) == "loss.age_weight"
    assert found.shares["loss.age_weight"] > found.chance > found.shares["frozen"]


def test_importance_of_noise_is_not_shown() -> None:
    rng = np.random.default_rng(1)
    rows = [trial(n, float(rng.uniform()), params={"a": float(rng.uniform()), "b": n % 3}) for n in range(24)]

    found = importances(rows, space_of(rows))

    assert found.shares == {}
    assert "stands out from chance" in found.why_not


def test_stopped_trials_are_compared_at_an_epoch_that_all_reached() -> None:
    rows = [
        replace(row, state="complete" if row.number % 5 == 0 else "pruned", curve=(row.objective, 9.0)[: 1 + n % 2])
        for n, row in enumerate(many(40))
    ]

    found = importances(rows, space_of(rows))

    assert found.compared == "the objectives of 40 trials after epoch 1, the last that all of them reached"
    assert next(iter(found.shares)) == "loss.age_weight"

"""The population pyramid shows the faces of every age group and gender."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from agr_ray.labels import UTKFACE
from agr_ray.report.page import Drawing
from agr_ray.report.pyramid import population_pyramid
from agr_ray.schema import DEMOGRAPHICS


def _row(group: str, gender: str, race: str, n: int | None, **changes: Any) -> dict[str, Any]:
    cell = {"is_total": True, "breakdown": "age_group,gender,race", "age_group": group, "gender": gender, "race": race}
    counts = dict.fromkeys((field.name for field in DEMOGRAPHICS if field.name.startswith("num_")), 0)
    return counts | cell | {"n": n, "suppressed": n is None} | changes


def _pyramid(table: pa.Table) -> Drawing:
    drawing = population_pyramid(table, UTKFACE)
    assert drawing is not None
    return drawing


def _lengths(table: pa.Table) -> tuple[list[float], str]:
    drawing = _pyramid(table)
    axes = drawing.draw().axes[0]
    return [bar.get_width() for container in axes.containers for bar in container], drawing.caption


def test_bars_sum_the_races_of_the_total() -> None:
    rows = [
        _row("0-10", "female", "white", 3),
        _row("0-10", "female", "black", 4),
        _row("21-30", "male", "white", 5),
        _row("21-30", "male", "white", 100, is_total=False),
        _row("21-30", "male", "white", 100, breakdown="gender"),
    ]

    lengths, caption = _lengths(pa.Table.from_pylist(rows, DEMOGRAPHICS))

    groups = len(UTKFACE.age_groups)
    assert lengths == [-7, *[0] * (groups - 1), 0, 0, 5, *[0] * (groups - 3)]
    assert caption == "Faces by perceived age group and gender."


def test_hidden_cells_are_mentioned() -> None:
    rows = [_row("0-10", "female", "white", None), _row("0-10", "female", "black", 12)]

    lengths, caption = _lengths(pa.Table.from_pylist(rows, DEMOGRAPHICS))

    assert sum(lengths) == 0  # the bar would be too short
    assert "score.min_cell" in caption
    numbers = _pyramid(pa.Table.from_pylist(rows, DEMOGRAPHICS)).numbers
    assert numbers is not None
    assert next(iter(numbers.rows)) == ("0-10", "hidden", "0")


def test_faces_without_a_cell_are_mentioned() -> None:
    rows = [_row("0-10", "female", "white", 3, num_abstained=7)]

    lengths, caption = _lengths(pa.Table.from_pylist(rows, DEMOGRAPHICS))

    assert sum(lengths) == -3
    assert caption.endswith(" 7 more are left out, because the model abstained on an attribute.")


def test_a_model_without_race_has_its_bars() -> None:
    rows = [_row("0-10", "female", "", 3, breakdown="age_group,gender")]

    assert sum(_lengths(pa.Table.from_pylist(rows, DEMOGRAPHICS))[0]) == -3


@pytest.mark.parametrize("rows", [[], [_row("0-10", "female", "white", 0, num_abstained=9)]])
def test_without_a_face_there_is_no_pyramid(rows: list[dict[str, Any]]) -> None:
    assert population_pyramid(pa.Table.from_pylist(rows, DEMOGRAPHICS), UTKFACE) is None


@pytest.mark.parametrize("longest", [1, 3, 9, 14, 75, 1234])
def test_ticks_are_whole_numbers(longest: int) -> None:
    rows = [_row("0-10", "female", "white", longest)]

    axes = _pyramid(pa.Table.from_pylist(rows, DEMOGRAPHICS)).draw().axes[0]

    ticks = axes.get_xticks()
    assert [tick for tick in ticks if tick != round(tick)] == []
    assert len(ticks) >= 3


def test_the_legend_covers_no_bar_and_no_number() -> None:
    rows = [_row(group, gender, "white", 10) for group in UTKFACE.age_groups for gender in UTKFACE.genders]
    figure = _pyramid(pa.Table.from_pylist(rows, DEMOGRAPHICS)).draw()
    figure.draw_without_rendering()

    axes = figure.axes[0]
    legend = axes.get_legend()
    assert legend is not None
    drawn = [bar for container in axes.containers for bar in container] + axes.texts
    assert len(drawn) == 4 * len(UTKFACE.age_groups)
    assert not any(legend.get_window_extent().overlaps(each.get_window_extent()) for each in drawn)

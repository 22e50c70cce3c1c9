"""The population pyramid shows the faces of every age group and gender."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from agr_ray.labels import UTKFACE
from agr_ray.report.pyramid import population_pyramid
from agr_ray.schema import DEMOGRAPHICS


def _row(group: str, gender: str, race: str, n: int | None, **changes: Any) -> dict[str, Any]:
    cell = {"is_total": True, "breakdown": "age_group,gender,race", "age_group": group, "gender": gender, "race": race}
    counts = dict.fromkeys((field.name for field in DEMOGRAPHICS if field.name.startswith("num_")), 0)
    return counts | cell | {"n": n, "suppressed": n is None} | changes


def _lengths(table: pa.Table) -> tuple[list[float], str]:
    drawing = population_pyramid(table, UTKFACE)
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
    numbers = population_pyramid(pa.Table.from_pylist(rows, DEMOGRAPHICS), UTKFACE).numbers
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


def test_an_empty_table_has_empty_bars() -> None:
    lengths, _ = _lengths(DEMOGRAPHICS.empty_table())

    assert lengths == [0] * (2 * len(UTKFACE.age_groups))


def test_the_legend_covers_no_bar_and_no_number() -> None:
    rows = [_row(group, gender, "white", 10) for group in UTKFACE.age_groups for gender in UTKFACE.genders]
    figure = population_pyramid(pa.Table.from_pylist(rows, DEMOGRAPHICS), UTKFACE).draw()
    figure.draw_without_rendering()

    axes = figure.axes[0]
    legend = axes.get_legend()
    assert legend is not None
    drawn = [bar for container in axes.containers for bar in container] + axes.texts
    assert len(drawn) == 4 * len(UTKFACE.age_groups)
    assert not any(legend.get_window_extent().overlaps(each.get_window_extent()) for each in drawn)

"""The population pyramid of a scored bucket: faces by age group and gender."""

from __future__ import annotations

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agr_ray.labels import LabelSpace
from agr_ray.report.figure import COLOURS, new_figure
from agr_ray.report.page import Drawing, Table

_COLOURS: Final = ("blue", "amber")
_WIDTH_INCHES: Final = 6.5
_ROW_INCHES: Final = 0.36


def population_pyramid(demographics: pa.Table, space: LabelSpace) -> Drawing | None:
    """Draw how many faces of all groups together have each age group and gender; None: it would show none.

    A bar of which `score.min_cell` hides a cell is left out, and says `hidden`.

    Args:
        demographics: schema.DEMOGRAPHICS. Its joint breakdown is drawn: by age group, gender and race, without those
            that the model does not predict. A face with an attribute that is too uncertain is in none of its cells; the
            caption counts such faces.
        space: the label space of the model. Its two genders are the sides, its age groups the rows, youngest below.
    """
    joint = max(pc.unique(demographics["breakdown"]).to_pylist(), key=len, default="")
    cells = demographics.filter(pc.field("is_total") & (pc.field("breakdown") == joint))
    summed = cells.group_by(["age_group", "gender"]).aggregate([("suppressed", "any"), ("n", "sum")])
    counts = {
        (row["age_group"], row["gender"]): None if row["suppressed_any"] else row["n_sum"] or 0
        for row in summed.to_pylist()
    }
    if all(count == 0 for count in counts.values()):
        return None
    abstained = pc.max(cells["num_abstained"]).as_py() or 0
    notes = [f"{abstained:,} more are left out, because the model abstained on an attribute."] if abstained else []
    notes += ["Bars with counts that score.min_cell hides are left out."] if None in counts.values() else []

    def draw() -> Figure:
        return _draw(counts, space)

    rows = [(group, *(_text(counts.get((group, gender), 0)) for gender in space.genders)) for group in space.age_groups]
    return Drawing(
        "pyramid",
        " ".join(["Faces by perceived age group and gender.", *notes]),
        draw,
        Table(("age group", *space.genders), rows),
    )


def _text(count: int | None) -> str:
    return "hidden" if count is None else f"{count:,}"


def _draw(counts: dict[tuple[str, str], int | None], space: LabelSpace) -> Figure:
    figure, axes = new_figure(_WIDTH_INCHES, 1.1 + _ROW_INCHES * len(space.age_groups))
    axes.grid(visible=False)
    longest = max((count or 0 for count in counts.values()), default=0) or 1
    for gender, colour, side in zip(space.genders, _COLOURS, (-1, 1), strict=True):
        lengths = [counts.get((group, gender), 0) for group in space.age_groups]
        widths = [side * (length or 0) for length in lengths]
        bars = axes.barh(space.age_groups, widths, color=COLOURS[colour], label=gender, height=0.8)
        axes.bar_label(bars, ["" if length == 0 else _text(length) for length in lengths], padding=3)
    axes.set_xlim(-1.2 * longest, 1.2 * longest)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(lambda count, _: f"{abs(count):,.0f}")
    axes.set(xlabel="faces", ylabel="perceived age, years")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=COLOURS["quiet"], linewidth=1)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderpad=0.2)
    return figure

"""The population pyramid of a scored bucket: faces by age group and gender."""

from __future__ import annotations

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agr_ray.labels import LabelSpace

_COLOURS: Final = ("#0072b2", "#e69f00")
"""Blue and orange of Okabe and Ito's palette, which colour-blind readers can tell apart."""


def population_pyramid(demographics: pa.Table, space: LabelSpace, title: str) -> Figure:
    """Draw how many faces of all groups together have each age group and gender.

    Args:
        demographics: schema.DEMOGRAPHICS. Its joint breakdown is drawn: by age group, gender and race, without those
            that the model does not predict. A face with an attribute that is too uncertain is in none of its cells; a
            note counts such faces.
        space: the label space of the model. Its two genders are the sides, its age groups the rows, youngest below.
        title: of the picture.

    Returns:
        A figure of 1200 x 900 pixels. A cell that `score.min_cell` hides adds nothing to its bar, and a note says so.
    """
    joint = max(pc.unique(demographics["breakdown"]).to_pylist(), key=len, default="")
    cells = demographics.filter(pc.field("is_total") & (pc.field("breakdown") == joint))
    counts = {
        (row["age_group"], row["gender"]): row["n_sum"] or 0
        for row in cells.group_by(["age_group", "gender"]).aggregate([("n", "sum")]).to_pylist()
    }
    figure = Figure(figsize=(12, 9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    longest = max(counts.values(), default=0) or 1
    for gender, colour, side in zip(space.genders, _COLOURS, (-1, 1), strict=True):
        lengths = [counts.get((group, gender), 0) for group in space.age_groups]
        bars = axes.barh(space.age_groups, [side * length for length in lengths], color=colour, label=gender)
        axes.bar_label(bars, [f"{length:,}" if length else "" for length in lengths], padding=4, fontsize=16)
    axes.set_xlim(-1.15 * longest, 1.15 * longest)
    axes.xaxis.set_major_formatter(lambda count, _: f"{abs(count):,.0f}")
    axes.set_title(title, fontsize=20, parse_math=False)
    abstained = pc.max(cells["num_abstained"]).as_py() or 0
    notes = [f"; {abstained:,} more have an attribute that is too uncertain"] if abstained else []
    notes += ["; cells that score.min_cell hides are left out"] if cells["n"].null_count else []
    axes.set_xlabel("faces" + "".join(notes), fontsize=16)
    axes.set_ylabel("perceived age, years", fontsize=16)
    axes.tick_params(labelsize=14, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.axvline(0, color="0.3", linewidth=1)
    figure.legend(fontsize=16, loc="outside lower center", ncols=2, frameon=False)
    return figure

"""A figure of a page: SVG that takes its colours from the page's style sheet, for light, dark and print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS: Final = {
    "ink": "#010203",
    "faint": "#010204",
    "complete": "#010205",
    "pruned": "#010206",
    "failed": "#010207",
    "unfinished": "#01020b",
    "best": "#010208",
    "reference": "#010209",
    "page": "#01020a",
}
"""Placeholder colours. Each becomes `var(--NAME)` of the page's style sheet."""

_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["faint"],
    "xtick.color": COLOURS["faint"],
    "ytick.color": COLOURS["faint"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "grid.color": COLOURS["faint"],
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
}
_WIDTH_INCHES: Final = 3.7
_HEIGHT_INCHES: Final = 2.7


@contextmanager
def panel(
    name: str, width_inches: float = _WIDTH_INCHES, height_inches: float = _HEIGHT_INCHES
) -> Iterator[tuple[Axes, list[str]]]:
    """Yield axes to draw on, and a list that contains the SVG after the block.

    Args:
        name: of the figure on its page; makes the ids in it unique.
        width_inches: of the figure.
        height_inches: of the figure.
    """
    done: list[str] = []
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        axes.grid(True)
        axes.set_axisbelow(True)
        yield axes, done
        file = StringIO()
        canvas.print_svg(file, metadata={"Date": None})  # type: ignore[no-untyped-call]  # matplotlib does not annotate it
        done.append(_inline(file.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """Turn an SVG file into an element of a page: no header or namespaces, unique ids, the page's colours."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"\s+xmlns(:\w+)?=\"[^\"]*\"", "", body)
    body = re.sub(r"xlink:href=", "href=", body)
    body = re.sub(r"(<svg[^>]*?)\s+width=\"[^\"]*\"", r"\1", body, count=1)
    body = re.sub(r"(<svg[^>]*?)\s+height=\"[^\"]*\"", r'\1 aria-hidden="true"', body, count=1)
    body = re.sub(r"\bid=\"", f'id="{name}-', body)
    body = re.sub(r"href=\"#", f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    for colour, placeholder in COLOURS.items():
        body = body.replace(placeholder, f"var(--{colour})")
    return body

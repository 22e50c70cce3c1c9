"""One style for the figures of all pages, and what is made of a figure: PNG, SVG, and SVG for light and dark pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Final
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS: Final = {
    "ink": "#1b1f24",
    "quiet": "#57606a",
    "faint": "#9aa1aa",
    "page": "#ffffff",
    "blue": "#0072b2",
    "red": "#d55e00",
    "green": "#007a59",
    "purple": "#b0518a",
    "amber": "#c77c00",
}
"""The colours of figures. On a page, each becomes `var(--NAME)` of the style sheet, which is lighter in the dark."""

SERIES: Final = (("blue", "o"), ("red", "s"), ("green", "^"), ("purple", "D"), ("amber", "v"), ("quiet", "P"))
"""Colours and markers of the series of a figure, in their order: the markers tell them apart without colour."""

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
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
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
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
}
_PNG_DPI: Final = 160


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw the figures of the block in the style of all pages."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width_inches: float, height_inches: float) -> tuple[Figure, Axes]:
    """Return a figure and its only axes, with a grid."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True)
    return figure, axes


def figure_svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG file; `name` makes the ids in it unique."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        file = BytesIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})  # type: ignore[no-untyped-call]  # matplotlib does not annotate it
    return file.getvalue().decode()


def figure_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file with a white background."""
    file = BytesIO()
    with figure_style():
        figure.savefig(file, format="png", dpi=_PNG_DPI, facecolor="white")
    return file.getvalue()


def inline_svg(svg: str, name: str) -> str:
    """Turn an SVG file into an element of a page: no header or namespaces, unique ids, the page's colours.

    Only attributes are changed, so texts, which may be anything, stay as they are.
    """
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        for child in [child for child in element if _local(child.tag) in ("metadata", "style")]:
            element.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        values = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in values.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = value.replace("#", f"#{name}-", 1)
            elif key == "style":
                value = _FONT_SIZE.sub(r"font-size: \1", value)
                value = _FONT_FAMILY.sub("", value)
            value = value.replace("url(#", f"url(#{name}-")
            for colour, placeholder in COLOURS.items():
                value = value.replace(placeholder, f"var(--{colour})")
            element.set(key, value)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("aria-hidden", "true")
    return ElementTree.tostring(root, encoding="unicode")


_FONT_SIZE: Final = re.compile(r"font: ([\d.]+px) [^;]*")
_FONT_FAMILY: Final = re.compile(r"font-family: [^;]*;?")


def _local(name: str) -> str:
    """Return a tag's or an attribute's name without its namespace."""
    return name.rpartition("}")[2]

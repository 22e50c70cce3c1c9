"""A page as one HTML file that loads no other file: light and dark, for screens of any width and for paper."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from agr_ray.report.figure import figure_style, figure_svg, inline_svg
from agr_ray.report.page import Cell, Drawing, Page, Photograph


def page_html(page: Page, drawn: Mapping[str, str] | None = None) -> str:
    """Return the page as HTML.

    Values are escaped. A term of `page.terms` is a link to its definition, which also shows while the pointer is over
    it. The policy in the head lets a browser load nothing from anywhere.

    Args:
        page: to write.
        drawn: SVG files of drawings by name; the others are drawn.
    """
    environment = Environment(
        loader=PackageLoader("agr_ray.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "kind": lambda block: type(block).__name__,
        "svg": lambda drawing: _svg(drawing, drawn or {}),
        "data_uri": _data_uri,
        "cell": lambda cell: cell if isinstance(cell, Cell) else Cell(cell),
        "marked": _marker(page.terms),
        "sort_key": _sort_key,
        "breakable": _breakable,
        "anchor": anchor,
    }
    return environment.get_template("page.html.jinja").render(page=page)


def anchor(term: str) -> str:
    """Return the anchor of a term's definition."""
    return "term-" + re.sub(r"[^a-z0-9]+", "-", term.lower()).strip("-")


def _svg(drawing: Drawing, drawn: Mapping[str, str]) -> Markup:
    svg = drawn.get(drawing.name)
    if svg is None:
        with figure_style():
            svg = figure_svg(drawing.draw(), drawing.name)
    return Markup(inline_svg(svg, drawing.name))


def _data_uri(photograph: Photograph) -> str:
    return "data:image/png;base64," + base64.b64encode(photograph.png).decode()


def _marker(terms: Mapping[str, str]) -> Callable[[Any], Markup]:
    """Return a function that escapes text and links the terms in it to their definitions."""
    if not terms:
        return lambda text: Markup(_breakable(text))
    longest_first = sorted(terms, key=len, reverse=True)
    pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, longest_first)) + r")(?!\w)", re.IGNORECASE)
    by_lower = {term.lower(): term for term in terms}

    def link(found: re.Match[str]) -> str:
        term = by_lower[found[1].lower()]
        return f'<a class="term" href="#{anchor(term)}" title="{escape(terms[term])}">{escape(found[1])}</a>'

    def mark(text: Any) -> Markup:
        parts, end = [], 0
        for found in pattern.finditer(str(text)):
            parts += [str(_breakable(str(text)[end : found.start()])), link(found)]
            end = found.end()
        return Markup("".join([*parts, str(_breakable(str(text)[end:]))]))

    return mark


def _breakable(text: Any) -> Markup:
    """Escape text, and allow line breaks after the dots, slashes and underscores of a long name, not in a number."""
    return Markup(re.sub(r"([._/])(?=[^\W\d])", r"\1<wbr>", str(escape(text))))


def _sort_key(cell: Cell) -> str:
    """Return a cell's sort key, numeric for numbers; empty sorts last."""
    if cell.key is None:
        return cell.text
    return str(cell.key)

"""The files of a page: report.html, report.md, and the pictures in report-figures/ as PNG and SVG."""

from __future__ import annotations

from typing import Final

from agr_ray.report.figure import figure_png, figure_style, figure_svg
from agr_ray.report.page import HTML_FILE, Page, Photograph
from agr_ray.report.page_html import page_html
from agr_ray.report.page_markdown import page_markdown
from agr_ray.storage import Storage

MARKDOWN_FILE: Final = "report.md"
FIGURES: Final = "report-figures"


def write_page(storage: Storage, folder: str, page: Page) -> str:
    """Write a page's files, in place of earlier ones; return the URI of the HTML file, which needs no other file.

    The HTML file is written last.
    """
    figures = storage.join(folder, FIGURES)
    earlier = {info.uri for info in storage.list(figures)} if storage.exists(figures) else set()
    written, drawn = set(), {}
    for picture in page.drawings():
        if isinstance(picture, Photograph):
            files = {f"{picture.name}.png": picture.png}
        else:
            with figure_style():
                figure = picture.draw()
            drawn[picture.name] = figure_svg(figure, picture.name)
            figure.set_layout_engine("none")  # the layout is done; the PNG has the same
            files = {
                f"{picture.name}.png": figure_png(figure),
                f"{picture.name}.svg": _encoded(drawn[picture.name]),
            }
        for name, content in files.items():
            uri = storage.join(figures, name)
            storage.write(uri, content)
            written.add(uri)
    for uri in earlier - written:
        storage.delete(uri)
    storage.write(storage.join(folder, MARKDOWN_FILE), _encoded(page_markdown(page, FIGURES)))
    html = storage.join(folder, HTML_FILE)
    storage.write(html, _encoded(page_html(page, drawn)))
    return html


def _encoded(text: str) -> bytes:
    """Return text as UTF-8; a lone surrogate, such as of a file name in another encoding, becomes a question mark."""
    return text.encode("utf-8", "replace")

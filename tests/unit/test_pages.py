"""The shell of all pages: HTML that loads nothing, Markdown, and the files of the figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from outlines import outline, words

from agr_ray.report.charts import INTERVAL, Dot, Line, Scale, dot_drawing, line_drawing
from agr_ray.report.figure import COLOURS
from agr_ray.report.page import (
    Cell,
    Code,
    Drawing,
    Drawings,
    Fold,
    Page,
    Paragraph,
    Photograph,
    Section,
    Table,
    Values,
)
from agr_ray.report.page_files import write_page
from agr_ray.report.page_html import page_html
from agr_ray.report.page_markdown import page_markdown
from agr_ray.storage import Storage

HOSTILE = 'font-family: a; #0072b2 <script>alert("1")</script> & $x$ | `y` [z](http://elsewhere.example)'
PNG = b"\x89PNG\r\n\x1a\nnot really"


def chart(name: str = "chart", series: str = "model") -> Drawing:
    lines = [Line(series, [0, 1, 2], [0.5, None, 0.7], [0.4, None, 0.6], [0.6, None, 0.8])]
    return line_drawing(
        name, f"Caption of {series}", lines, Scale("years"), Scale("share, %", 100.0, 1, interval_title=INTERVAL)
    )


def page(text: str = "text", title: str = "Title") -> Page:
    table = Table((text, "number"), [(text, Cell("7", shade=0.5, is_strong=True, key=7))], caption=text, note=text)
    scale = Scale("share", interval_title=INTERVAL)
    dots = dot_drawing(
        "dots", text, [Dot(text, is_heading=True), Dot(text, 0.5, (0.4, 0.6), text), Dot(text)], scale, reference=0.4
    )
    blocks = [
        Paragraph(text),
        table,
        chart(series=text),
        Drawings([dots, chart("second")]),
        Photograph("faces", text, PNG),
        Values({text: text}),
        Code(text),
        Fold(text, [Paragraph(text), chart("third")]),
    ]
    return Page(
        title, [Paragraph(text, "verdict"), Paragraph(text, "warning")], [Section("one", text, blocks)], {"share": text}
    )


def test_hostile_text_is_shown_and_never_run() -> None:
    html = page_html(page(HOSTILE, HOSTILE))

    found = outline(html)  # it also checks that nothing is fetched, and that all links have a target
    assert found.tags.count("script") == 1
    assert words(html).count(HOSTILE) > 10
    assert "default-src 'none'" in html


def test_hostile_text_has_no_meaning_in_markdown() -> None:
    text = page_markdown(page(HOSTILE, HOSTILE), "pictures")

    outside_code = re.sub(r"^(`{3,})\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside_code
    assert not re.search(r"(?<!\\)\]\(http", outside_code)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {3}


def test_terms_link_to_their_definitions() -> None:
    html = page_html(page("the share of faces"))

    assert re.search(r'<a class="term" href="#term-share" title="the share of faces">share</a>', html)
    assert re.search(r'<dt id="term-share">share</dt><dd>the share of faces</dd>', html)
    assert "<th>shares</th>" in re.sub(r" \w+=\"[^\"]*\"", "", page_html(page("shares")))  # a term is a whole word


def test_figures_take_their_colours_from_the_page() -> None:
    html = page_html(page())
    figures = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))

    assert "var(--blue)" in figures
    assert not re.findall(r"#[0-9a-f]{6}\b", figures)
    for name in COLOURS:
        assert f"--{name}: #" in html


def test_every_chart_has_its_numbers() -> None:
    html = words(page_html(page()))

    assert html.count("As a table") == 4
    assert "0.00 50.0 40.0 to 60.0" in " ".join(html.split())


def test_all_pictures_are_files_and_stale_ones_are_deleted(tmp_path: Path) -> None:
    stale = tmp_path / "report-figures" / "old.png"
    stale.parent.mkdir()
    stale.write_bytes(PNG)

    uri = write_page(Storage(), str(tmp_path), page())

    assert uri == str(tmp_path / "report.html")
    names = sorted(path.name for path in (tmp_path / "report-figures").iterdir())
    drawn = ("chart", "dots", "second", "third")
    assert names == sorted([*(f"{name}.{kind}" for name in drawn for kind in ("png", "svg")), "faces.png"])
    text = (tmp_path / "report.md").read_text()
    linked = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert linked == [f"report-figures/{name}.png" for name in ("chart", "dots", "second", "faces", "third")]
    assert all((tmp_path / path).exists() for path in linked)


def test_the_same_page_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_page(Storage(), str(tmp_path / name), page())

    first, second = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("a", "b")
    )
    assert first == second


@pytest.mark.parametrize("lines", [[], [Line("empty", [], [])], [Line("gap", [1], [None])]])
def test_a_chart_without_points_is_drawn(lines: list[Line]) -> None:
    drawing = line_drawing("none", "caption", lines, Scale("x"), Scale("y", from_zero=True))

    outline(page_html(Page("t", [drawing], [])))

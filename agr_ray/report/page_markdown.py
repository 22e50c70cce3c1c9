"""A page as Markdown, with its pictures in files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from agr_ray.models.card_tables import escaped
from agr_ray.report.page import Block, Cell, Code, Drawing, Drawings, Fold, Page, Paragraph, Photograph, Table, Values


def page_markdown(page: Page, pictures: str) -> str:
    """Return the page as Markdown.

    Args:
        page: to write.
        pictures: folder of its pictures, relative to the page: NAME.png for each.
    """
    lines = [f"# {escaped(page.title)}", "", *_blocks(page.lead, pictures)]
    for section in page.sections:
        lines += [f"## {escaped(section.title)}", "", *_blocks(section.blocks, pictures)]
    if page.terms:
        lines += ["## Terms", "", *(f"- **{escaped(term)}**: {escaped(text)}" for term, text in page.terms.items()), ""]
    return "\n".join(lines).rstrip() + "\n"


def _blocks(blocks: Sequence[Block], pictures: str) -> Iterator[str]:
    for block in blocks:
        match block:
            case Paragraph():
                text = escaped(block.text)
                yield f"**{text}**" if block.emphasis in ("verdict", "warning") else text
            case Table():
                if block.caption:
                    yield from (f"**{escaped(block.caption)}**", "")
                yield from table_lines(block)
                if block.note:
                    yield from ("", escaped(block.note))
            case Drawing() | Photograph():
                yield f"![{escaped(block.caption)}]({pictures}/{block.name}.png)"
                yield from ("", f"*{escaped(block.caption)}*")
            case Drawings():
                yield from _blocks(block.drawings, pictures)
                continue
            case Values():
                yield from (f"- {escaped(name)}: {escaped(value)}" for name, value in block.values.items())
            case Code():
                fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
                yield from (fence, block.text.rstrip("\n"), fence)
            case Fold():
                yield from (f"### {escaped(block.summary)}", "", *_blocks(block.blocks, pictures))
                continue
        yield ""


def table_lines(table: Table) -> list[str]:
    """Return the lines of a table."""
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    marks = ["---" if place < table.num_text_columns else "---:" for place in range(len(table.columns))]
    if table.last_is_text:
        marks[-1] = "---"
    lines = [[escaped(column) for column in table.columns], marks, *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return escaped(cell)
    return f"**{escaped(cell.text)}**" if cell.is_strong and cell.text else escaped(cell.text)

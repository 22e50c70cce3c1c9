"""What a page consists of. `page_html` and `page_markdown` write it; the page builders of this package fill it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HTML_FILE: Final = "report.html"

Emphasis = Literal["plain", "note", "verdict", "warning"]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str
    emphasis: Emphasis = "plain"


@dataclass(frozen=True)
class Cell:
    """A cell of a table with a background or a mark."""

    text: str
    shade: float = 0.0
    """How dark the background is, 0 to 1."""
    is_strong: bool = False
    key: float | str | None = None
    """By which the column is sorted; None: by the text."""


@dataclass(frozen=True)
class Table:
    """A table. The first column names the rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    num_text_columns: int = 1
    """The first columns are text, and aligned left; the others are numbers."""
    caption: str = ""
    note: str = ""
    is_sortable: bool = False
    is_headline: bool = False
    """On a narrow screen, each row becomes a block of lines."""
    last_is_text: bool = False
    """The last column is long text, which may be wrapped."""


@dataclass(frozen=True)
class Drawing:
    """A figure, with the numbers in it."""

    name: str
    """Of its files and of the ids in it: unique on the page, lower-case letters, digits and hyphens."""
    caption: str
    draw: Callable[[], Figure]
    """Called within `figure.figure_style`."""
    numbers: Table | None = None
    """Shown on request, to read or to copy."""


@dataclass(frozen=True)
class Photograph:
    """A picture that is not drawn, such as a sheet of faces."""

    name: str
    """As of a `Drawing`."""
    caption: str
    png: bytes


@dataclass(frozen=True)
class Drawings:
    """Figures side by side where the screen is wide enough."""

    drawings: Sequence[Drawing]
    is_small: bool = False


@dataclass(frozen=True)
class Values:
    """Names and values, such as settings."""

    values: Mapping[str, str]


def flat(sections: Mapping[str, Any], text: Callable[[Any], str] = str) -> dict[str, str]:
    """Return the values of sections by dotted key, and those outside any section by name."""
    values: dict[str, str] = {}
    for name, content in sections.items():
        if isinstance(content, Mapping):
            values |= {f"{name}.{key}": text(value) for key, value in content.items()}
        else:
            values[name] = text(content)
    return values


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is, such as a recipe."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on request."""

    summary: str
    blocks: Sequence[Block]


Block = Paragraph | Table | Drawing | Photograph | Drawings | Values | Code | Fold


@dataclass(frozen=True)
class Section:
    """A section with a heading."""

    name: str
    """Its anchor: lower-case letters, digits and hyphens."""
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page."""

    title: str
    lead: Sequence[Block]
    """Above the contents: the result in a sentence or two."""
    sections: Sequence[Section]
    terms: Mapping[str, str] = field(default_factory=dict)
    """Terms that are explained where they occur in table heads, row names and captions: term -> definition."""

    def drawings(self) -> Iterator[Drawing | Photograph]:
        """Yield all pictures."""
        yield from _drawings([*self.lead, *(block for section in self.sections for block in section.blocks)])


def _drawings(blocks: Sequence[Block]) -> Iterator[Drawing | Photograph]:
    for block in blocks:
        match block:
            case Drawing() | Photograph():
                yield block
            case Drawings():
                yield from block.drawings
            case Fold():
                yield from _drawings(block.blocks)

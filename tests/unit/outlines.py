"""What a page of HTML holds: tags, ids, links, and everything that a browser would fetch."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "wbr", "hr", "img", "input"}


class Outline(HTMLParser):
    """Open tags, ids, and every URL that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "data", "poster", "action"):
                (self.links if (value or "").startswith("#") else self.fetched).append(value or "")
            self.links += re.findall(r"url\((#[^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    found.close()
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert set(found.links) <= {f"#{name}" for name in found.ids}
    assert [uri for uri in found.fetched if not uri.startswith("data:")] == []
    return found


def words(page: str) -> str:
    """Return the text of a page on one line."""
    return " ".join("".join(outline(page).texts).split())

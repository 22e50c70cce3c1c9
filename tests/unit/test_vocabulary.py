"""The vocabulary check of `make lint`."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

VOCABULARY = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "vocabulary.py"))
PHRASES = {"resume again": "resume", "odd phrase": "plain phrase"}


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("Runs that\nresume again.", [(2, "resume again")]),
        ("    # A run may Resume\n    # again after a kill.\n", [(1, "resume again")]),
        ('raise ValueError(\n    "an odd "\n    f"phrase: {text}"\n)\n', [(2, "odd phrase")]),
        ("> An odd\n> phrase,\n\n- and one that\n  resume  again", [(1, "odd phrase"), (5, "resume again")]),
        ("def test_an_odd_phrase_is_found() -> None:", [(1, "odd phrase")]),
        ("Resume. Again, an odd, phrase", []),
        ("oddphrase, odd phrases, resume once again", []),
        ("An odd\n\nphrase", []),
        ("", []),
    ],
)
def test_a_phrase_is_found_across_lines_and_comment_markers(text: str, hits: list[tuple[int, str]]) -> None:
    assert VOCABULARY["find"](text, PHRASES) == hits


def test_the_list_is_read_without_comments() -> None:
    assert VOCABULARY["read_list"]("# comment\n\nodd phrase -> plain -- phrase\n") == {"odd phrase": "plain -- phrase"}


def test_the_repository_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert VOCABULARY["main"]() == 0, capsys.readouterr().out

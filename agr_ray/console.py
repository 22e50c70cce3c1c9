"""Output on the terminal and in logs: the only module that creates rich consoles and tables.

Paths, keys and messages contain arbitrary user text. They are printed verbatim: `[bold]` is not markup, `:key:` is not
an emoji, and lines are not wrapped, except in a table that is too wide for the terminal. Only control characters are
escaped, because they could steer the terminal.
"""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Mapping
from typing import IO, Any, Final

from rich.console import Console
from rich.progress import ProgressColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

from agr_ray.json_log import JsonLog, current_log
from agr_ray.redact import printable

LOG_WIDTH: Final = 10_000
"""Line width in characters for files and pipes, which have no terminal width."""


def make_console(file: IO[str] | None = None, *, quiet: bool = False) -> Console:
    """Return a console that prints text verbatim to a file (None: standard output); with `quiet` it prints nothing.

    If the log is JSON, it takes the place of standard output. From this call on, the file escapes characters that its
    encoding lacks, instead of raising an error.
    """
    log = current_log()
    if file is None and log is not None:
        # Never a terminal, whatever FORCE_COLOR says: rich's live display would print through the log into itself.
        return _JsonConsole(
            file=log, quiet=quiet, markup=False, emoji=False, width=LOG_WIDTH, force_terminal=False, color_system=None
        )
    stream = sys.stdout if file is None else file
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    console = _PlainConsole(file=file, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


class _PlainConsole(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        """Return text as rich shows it, in table cells, too, with its control characters escaped."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


class _JsonConsole(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """Print a table as a line for each row: `status ok, images 1,234`."""
        for each in objects:
            if not isinstance(each, Table):
                super().print(each, **options | {"soft_wrap": True})
                continue
            headings = [str(column.header) for column in each.columns]
            for row in zip(*(column.cells for column in each.columns), strict=True):
                cells = (f"{heading} {cell}".split() for heading, cell in zip(headings, row, strict=True))
                super().print(", ".join(map(" ".join, cells)), soft_wrap=True)


def print_counts(console: Console, line: str, counts: Mapping[str, Any]) -> None:
    """Print a line; a JSON log also has its counts as numbers."""
    if isinstance(console.file, JsonLog):
        if not console.quiet:
            console.file.log(line, counts)
    else:
        console.print(line)


def make_table(*headings: str) -> Table:
    """Return a table that wraps cells too long for the terminal; rich's default truncates them.

    It has no title, because rich would wrap one at the table's width: print the title as a line before the table.
    """
    return Table(*(Column(heading, overflow="fold") for heading in headings))


def print_next(console: Console, what: str, *words: str) -> None:
    """Print the command that usually follows.

    Args:
        console: to print on.
        what: it does.
        words: of the command, after `agr-ray`.
    """
    console.print(f"next, {what}: agr-ray {shlex.join(words)}")


def text_column(text_format: str) -> ProgressColumn:
    """Return a progress-bar column that shows a task's text verbatim."""
    return TextColumn(text_format, markup=False)

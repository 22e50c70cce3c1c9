"""Output on the terminal and in logs: the only module that creates rich consoles and tables.

Paths, keys and messages contain arbitrary user text. They are printed verbatim: `[bold]` is not markup, `:key:` is not
an emoji, and lines are not wrapped, except in a table that is too wide for the terminal. Only control characters are
escaped, because they could steer the terminal.
"""

from __future__ import annotations

import io
import shlex
import sys
from typing import IO, Any, Final

from rich.console import Console
from rich.progress import ProgressColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

from agr_ray.redact import printable

LOG_WIDTH: Final = 10_000
"""Line width in characters for files and pipes, which have no terminal width."""


def make_console(file: IO[str] | None = None, *, quiet: bool = False) -> Console:
    """Return a console that prints text verbatim to a file (None: standard output); with `quiet` it prints nothing.

    From this call on, the file escapes characters that its encoding lacks, instead of raising an error.
    """
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

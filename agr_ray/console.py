"""What a person sees on the terminal or in a log: the only place that makes a rich console or table.

Paths, keys and messages hold whatever users put there. They are printed as they are: `[bold]` is no markup, `:key:` no
emoji, and no line is broken, except in a table on a terminal that is too narrow for it.
"""

from __future__ import annotations

import io
import sys
from typing import IO, Final

from rich.console import Console
from rich.progress import ProgressColumn, TextColumn
from rich.table import Column, Table

LOG_WIDTH: Final = 10_000
"""Characters of a line in a file or pipe, whose reader has no width that rich could know."""


def make_console(file: IO[str] | None = None, *, quiet: bool = False) -> Console:
    """Return a console on a file (None: standard output) that prints text as it is; `quiet`: it prints nothing.

    Characters that the file's encoding lacks are escaped from now on, instead of ending the job.
    """
    stream = sys.stdout if file is None else file
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    console = Console(file=file, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def make_table(*headings: str) -> Table:
    """Return a table that breaks what is too long for a terminal, where rich's own would cut it off.

    It has no title, which rich would break at the table's width: print that as a line before it.
    """
    return Table(*(Column(heading, overflow="fold") for heading in headings))


def text_column(text_format: str) -> ProgressColumn:
    """Return a column of progress bars that shows a task's text as it is."""
    return TextColumn(text_format, markup=False)

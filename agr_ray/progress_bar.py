"""Progress of a long job: a bar on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from agr_ray.console import text_column
from agr_ray.schema import Status

LOG_EVERY_S = 10.0

Update = Callable[[int, str], None]
"""Called with the total done so far, and a short remark."""


@contextmanager
def progress(console: Console, label: str, total: int | None) -> Iterator[Update]:
    """Show progress until the block ends; `total` is None if it is not known in advance."""
    if not console.is_terminal:
        yield _log_lines(console, label, total)
        return
    columns = (
        SpinnerColumn(),
        text_column("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        text_column("{task.fields[remark]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(label, total=total, remark="")
        yield lambda done, remark: bars.update(task, completed=done, remark=remark)


def print_failed(console: Console, counts: Mapping[str, int]) -> None:
    """Tell the user that failed rows can be retried."""
    if counts.get(Status.FAILED):
        console.print(f"{counts[Status.FAILED]:,} failed: the same command retries them")


def _log_lines(console: Console, label: str, total: int | None) -> Update:
    started = last = time.monotonic()

    def update(done: int, remark: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LOG_EVERY_S:
            return
        last = now
        of_total = f" of {total:,}" if total else ""
        rate = done / (now - started)
        pace = f"{rate:.1f}/s" if rate >= 1.0 or not done else f"{1.0 / rate:.1f} s each"
        line = f"{label}: {done:,}{of_total}, {pace} {remark}".rstrip()
        console.print(line)

    return update

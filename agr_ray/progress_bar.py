"""Progress of a long job: a bar on a terminal; in a log, a line every ten seconds, or minute if nothing happens."""

from __future__ import annotations

import threading
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
from rich.text import Text

from agr_ray.console import print_counts, text_column
from agr_ray.schema import Status

LOG_EVERY_S = 10.0
LOG_AT_LEAST_EVERY_S = 60.0

Update = Callable[[int, str], None]
"""Called with the total done so far, and a short remark."""
ShowStatus = Callable[[str], None]
"""Replaces the terminal's last line; in a log, the line that is printed every `LOG_AT_LEAST_EVERY_S`."""


@contextmanager
def progress(console: Console, label: str, total: int | None) -> Iterator[Update]:
    """Show progress until the block ends; `total` is None if it is not known in advance."""
    if not console.is_terminal:
        lines = _LogLines(console, label, total)
        with _repeated(lines.show_if_silent):
            yield lines.update
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


@contextmanager
def status_line(console: Console) -> Iterator[ShowStatus]:
    """Show the status of several tasks until the block ends."""
    if not console.is_terminal:
        latest = ""

        def note(text: str) -> None:
            nonlocal latest
            latest = text

        with _repeated(lambda: console.print(latest) if latest else None):
            yield note
        return
    with console.status("") as status:
        yield lambda text: status.update(Text(text))  # rich parses a str as markup, even with markup off


@contextmanager
def _repeated(show: Callable[[], None]) -> Iterator[None]:
    """Call `show` every `LOG_AT_LEAST_EVERY_S` in another thread until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(LOG_AT_LEAST_EVERY_S):
            show()

    thread = threading.Thread(target=repeat, name="status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _LogLines:
    """Prints progress every `LOG_EVERY_S` if there is any, and at least every `LOG_AT_LEAST_EVERY_S`."""

    def __init__(self, console: Console, label: str, total: int | None) -> None:
        self._console, self._label, self._total = console, label, total
        self._started = self._last = time.monotonic()
        self._latest = (0, "")

    def update(self, done: int, remark: str) -> None:
        """Note the progress."""
        self._latest = done, remark
        if time.monotonic() - self._last >= LOG_EVERY_S:
            self.show()

    def show_if_silent(self) -> None:
        """Print a line if there was none for a while."""
        if time.monotonic() - self._last >= LOG_AT_LEAST_EVERY_S - LOG_EVERY_S:
            self.show()

    def show(self) -> None:
        """Print a line."""
        done, remark = self._latest
        self._last = time.monotonic()
        elapsed_s = self._last - self._started
        of_total = f" of {self._total:,}" if self._total else ""
        rate = done / elapsed_s if elapsed_s else 0.0
        pace = f"{rate:.1f}/s" if rate >= 1.0 else f"{1.0 / rate:.1f} s each" if done and rate else f"{elapsed_s:.0f} s"
        line = ", ".join(filter(None, [f"{self._label}: {done:,}{of_total}", pace, remark]))
        print_counts(self._console, line, {"done": done, "total": self._total})

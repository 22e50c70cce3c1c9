"""Show the progress of training on the driver's terminal.

The first worker puts its latest `Progress` on a board, an actor that keeps nothing else. A thread of the driver reads
it and draws two bars and a line of figures. Training does not depend on the board: no worker waits for it, Ray restarts
one that dies, and calls to one that is gone are ignored.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray
from ray.exceptions import RayError
from rich import progress as bars
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from agr_ray.console import text_column
from agr_ray.learn.progress import Progress

LOOK_EVERY_S: Final = 0.5
TIMEOUT_S: Final = 2.0


class Board:
    """Keeps the latest progress."""

    def __init__(self) -> None:
        self._latest: Progress | None = None

    def put(self, progress: Progress) -> None:
        """Replace the progress."""
        self._latest = progress

    def latest(self) -> Progress | None:
        """Return the progress; None: there is none yet, or Ray has restarted the board since."""
        return self._latest


class TrainingBars:
    """Bars of epochs and of this epoch's images, and a line of figures. Rich redraws them as they change."""

    def __init__(self) -> None:
        self._bars = bars.Progress(
            text_column("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            text_column("{task.fields[left]}"),
        )
        self._figures = Text("starting workers")
        self._tasks: tuple[bars.TaskID, bars.TaskID] | None = None

    def show(self, progress: Progress) -> None:
        """Update the bars. They move backwards if a run has resumed from an earlier checkpoint."""
        if self._tasks is None:
            self._tasks = (self._bars.add_task("epochs", left=""), self._bars.add_task("epoch", left=""))
        epochs, epoch = self._tasks
        done = progress.epoch - 1
        self._bars.update(epochs, total=progress.num_epochs, completed=done, left=progress.run_left)
        self._bars.update(
            epoch,
            description=f"epoch {progress.epoch}",
            total=progress.num_samples_total,
            completed=min(progress.num_samples, progress.num_samples_total),
            left=progress.epoch_left,
        )
        self._figures = Text(progress.figures(), no_wrap=False)  # else the console, which wraps nothing, cuts it

    def __rich__(self) -> Group:
        return Group(self._bars, self._figures) if self._tasks else Group(self._figures)


@contextmanager
def progress_board(console: Console) -> Iterator[Any]:
    """Show training's progress on the terminal until the block ends; yield the board's handle, for the first worker.

    Lines that workers print appear above the bars. Without a terminal, yield None and start nothing.
    The board ends with its last handle, or with the driver.
    """
    if not console.is_terminal:
        yield None
        return
    board: Any = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()
    shown = TrainingBars()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(LOOK_EVERY_S):
            try:
                latest = ray.get(board.latest.remote(), timeout=TIMEOUT_S)
            except RayError:  # it is being restarted, or the machine is busy
                continue
            if latest is not None:
                shown.show(latest)

    thread = threading.Thread(target=look, name="progress", daemon=True)
    with Live(shown, console=console, transient=True):
        thread.start()
        try:
            yield board
        finally:
            is_over.set()
            thread.join()

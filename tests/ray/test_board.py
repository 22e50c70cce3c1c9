"""Training's progress on a terminal: what happens to the bars, and to training, when the board dies."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable

import pytest
import ray
from ray.util.state import list_actors
from rich.console import Console

from agr_ray.learn.progress import Progress
from agr_ray.runtime.training.board import progress_board

pytestmark = pytest.mark.usefixtures("ray_cluster")

RUNNING = {"age_mae_years": 5.012, "gender_accuracy": 0.928, "race_accuracy": 0.8199}
PROGRESS = Progress(3, 24, 1024, 13000, 2.803, RUNNING, 137.7, 0.004, 21 * 13000, 137.7)


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def test_the_terminal_shows_progress_after_the_board_was_killed(terminal: Console) -> None:
    @ray.remote(num_cpus=0)
    def leave_in_a_worker(board: object, progress: Progress) -> None:  # which can't import this file
        board.put.remote(progress)  # type: ignore[attr-defined]  # an actor's handle

    with progress_board(terminal) as board:
        ray.get(leave_in_a_worker.remote(board, PROGRESS))
        wait_until(lambda: "loss 2.803" in shown(terminal))
        os.kill(board_pid(), signal.SIGKILL)

        def left_again() -> bool:
            ray.get(leave_in_a_worker.remote(board, Progress(4, 24, 64, 13000, 1.5, {}, 100.0, 0.0, 20 * 13000, 100.0)))
            return "loss 1.500" in shown(terminal)

        wait_until(left_again)


def test_progress_for_a_dead_board_is_dropped(terminal: Console) -> None:
    with progress_board(terminal) as board:
        ray.kill(board)
    started = time.monotonic()
    board.put.remote(PROGRESS)
    assert time.monotonic() - started < 5


def shown(terminal: Console) -> str:
    return terminal.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


def board_pid() -> int:
    address = ray.get_runtime_context().gcs_address
    found = list_actors(address, filters=[("class_name", "=", "Board"), ("state", "=", "ALIVE")])
    assert len(found) == 1
    return int(found[0].pid)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)

"""Measure how long small jobs take to start, beside the work in them.

    python benchmarks/startup.py --photographs FOLDER --checkpoint RUN/best --data PREPARED [--num 40]

Runs three commands as a user does, and prints the time of each phase and the CPU time of all its processes:

    score   a few photographs, from the command to the published tables; so few are scored without Ray
    train   one epoch of a small network, on a Ray cluster of its own, up to the first step and to the end
    tune    one trial of the same; what it takes more than the training is the overhead of a trial

Phases end with the lines that the commands print. CPU times are sampled once a second, so a process that lives for less
than a second is missed. Every figure needs a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import ray  # noqa: F401  # brings psutil, of which it carries a copy

# isort: split
import psutil

from agr_ray.console import make_console, make_table
from agr_ray.device import cpu_name

SMALL: Final = (
    *("--preset", "lightweight", "--model.image_size", "32", "--train.batch_size", "16"),
    *("--train.epochs", "1", "--train.early_stopping_patience", "0"),
)
SPACE: Final = '{"train.lr": {"choice": [1e-4, 1e-3]}}'
PHASES: Final = {
    "score": {"command read, photographs listed": "listed", "first part scored": r"scoring: [1-9]", "published": ""},
    "train": {"workers ready": "starting, ", "first epoch done": r"epoch 1/1 done", "checkpoint written": ""},
    "tune": {"results written": ""},
}
"""Phases of a command, each with the line that ends it; the last one ends with the command."""


class Measured(NamedTuple):
    """A command that has run."""

    ends_s: dict[str, float]
    """End of each phase, since the command began."""
    cpu_s: float


def main() -> None:
    """Run the commands and print their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="folder of at least NUM photographs")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, help="a prepared set")
    parser.add_argument("--num", type=int, default=40, help="photographs to score (40)")
    arguments = parser.parse_args()
    console = make_console()
    console.print(f"{cpu_name()}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as work:
        few = Path(work, "photographs")
        few.mkdir()
        for path in sorted(path for path in arguments.photographs.iterdir() if path.is_file())[: arguments.num]:
            (few / path.name).symlink_to(path.resolve())
        commands = {
            "score": ["--checkpoint", arguments.checkpoint, "--input", str(few), "--out", f"{work}/scores"],
            "train": ["--data", arguments.data, "--out", f"{work}/runs", *SMALL],
            "tune": ["--data", arguments.data, "--out", f"{work}/sweeps", "--trials", "1", "--space", SPACE, *SMALL],
        }
        measured = {name: _run(name, options, Path(work)) for name, options in commands.items()}
    table = make_table("command", "phase", "s", "ends after, s", "CPU s of all processes")
    for name, each in measured.items():
        before = 0.0
        for phase, end_s in each.ends_s.items():
            is_last = phase == list(each.ends_s)[-1]
            table.add_row(name, phase, f"{end_s - before:.1f}", f"{end_s:.1f}", f"{each.cpu_s:.1f}" if is_last else "")
            before = end_s
    console.print(table)
    console.print(
        f"a trial takes {measured['tune'].cpu_s - measured['train'].cpu_s:.1f} CPU s more than its training alone"
    )


def _run(name: str, options: Sequence[str], work: Path) -> Measured:
    """Run a command to its end, and return when its phases ended."""
    begun_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", "from agr_ray.cli import main; main()", name, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=work,
    )
    cpu_s: dict[int, float] = {}
    watcher = threading.Thread(target=_watch, args=(process.pid, cpu_s))
    watcher.start()
    ends_s: dict[str, float] = {}
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        for phase, pattern in PHASES[name].items():
            if phase not in ends_s and pattern and re.search(pattern, line):
                ends_s[phase] = time.monotonic() - begun_s
    if process.wait():
        raise SystemExit(f"error: agr-ray {name} failed:\n{''.join(lines[-20:])}")
    ends_s[list(PHASES[name])[-1]] = time.monotonic() - begun_s
    watcher.join()
    return Measured(ends_s, sum(cpu_s.values()))


def _watch(root: int, cpu_s: dict[int, float]) -> None:
    """Keep the CPU seconds of a process and its descendants, by id, until it ends."""
    parent = psutil.Process(root)
    while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
        for process in [parent, *parent.children(recursive=True)]:
            try:
                times = process.cpu_times()
                cpu_s[process.pid] = times.user + times.system
            except psutil.NoSuchProcess:  # it has ended
                continue
        time.sleep(1.0)


if __name__ == "__main__":
    main()

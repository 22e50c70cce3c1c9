"""Memory of a process and of all that it started (Linux)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLE_S = 5.0


@contextmanager
def watched_memory(root: int) -> Iterator[list[float]]:
    """Yield a growing list: every five seconds the MiB of a process and all below it, proportional set sizes summed.

    Shared pages, such as Ray's object store, count once.
    """
    samples_mib: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            samples_mib.append(sum(map(pss_mib, descendants(root))))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples_mib
    finally:
        done.set()
        thread.join()


def descendants(root: int) -> list[int]:
    """Return the ids of a process and of all below it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def pss_mib(process: int) -> float:
    """Return the proportional set size of a process, 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024

"""Memory of a process and its descendants (Linux)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SAMPLE_S = 5.0


@contextmanager
def watched_memory(root: int) -> Iterator[list[Counter[str]]]:
    """Yield a growing list: every five seconds the MiB of a process and its descendants, by their names.

    Proportional set sizes are summed, so shared pages, such as Ray's object store, count once.
    """
    samples_mib: list[Counter[str]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            sample: Counter[str] = Counter()
            for process in descendants(root):
                sample[title(process)] += pss_mib(process)
            samples_mib.append(sample)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples_mib
    finally:
        done.set()
        thread.join()


def peak(samples_mib: Sequence[Counter[str]]) -> Counter[str]:
    """Return the largest sample."""
    return max(samples_mib, key=Counter.total, default=Counter())


def described(sample_mib: Counter[str]) -> str:
    """Return the total, and the processes that use most of it."""
    largest = ", ".join(f"{name} {mib:,.0f}" for name, mib in sample_mib.most_common(6))
    return f"{sample_mib.total():,.0f} MiB: {largest}"


def title(process: int) -> str:
    """Return the name of a process: for Ray's workers their task, for others their program."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended
        return ""
    if words[0].startswith("ray::"):
        return words[0].partition("(")[0].strip()
    scripts = [word for word in words[1:3] if word.endswith(".py")]
    return Path(scripts[0] if scripts else words[0]).name


def descendants(root: int) -> list[int]:
    """Return the ids of a process and its descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(folder.name))
    processes = [root]
    for process in processes:
        processes += children.get(process, [])
    return processes


def pss_mib(process: int) -> float:
    """Return the proportional set size of a process, 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024

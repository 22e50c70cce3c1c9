"""Feed mutated and generated inputs to everything that reads what others wrote, and report what should not happen.

    python benchmarks/fuzz.py --inputs 1000000
    python benchmarks/fuzz.py --inputs 1000000 --seconds 150 --state fuzz.json    # again and again, until it is done

Input number N of a target depends on N alone, so a run continues where another one ended, and a finding is repeated by
its number: `--target decoder --first N --inputs 1`. A finding is an error that the target does not document, more than
5 s of processor time, 60 s without an end, more than 512 MiB of memory, or the death of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fuzz_targets import TARGETS

MAX_CPU_S: Final = 5.0
MAX_S: Final = 60.0
MAX_MIB: Final = 512
"""Growth of the process's memory, MiB."""
NUM_ROUNDS: Final = 100
"""Each target gets its inputs in this many turns, so that a run that is stopped early has tried all targets."""

NUM_WARM_UPS: Final = 20
ROOT: Final = Path(__file__).resolve().parents[1]

Block = tuple[str, int, int]
"""A target, and the first and the last number, exclusive, of some of its inputs."""


def blocks(target: str, first: int, num_inputs: int) -> list[Block]:
    """Return the work of a run: every target (empty) or one of them, in turns."""
    named = {target: 1.0} if target else {name: each.share for name, each in TARGETS.items()}
    rounds = []
    for turn in range(NUM_ROUNDS):
        for name, share in named.items():
            start, end = (first + round(share * num_inputs * each / NUM_ROUNDS) for each in (turn, turn + 1))
            if end > start:
                rounds.append((name, start, end))
    return rounds


def run(work: Sequence[Block], seconds: float | None = None) -> tuple[list[dict[str, Any]], list[Block]]:
    """Feed inputs, in a process that is started again after each death.

    Returns:
        One row for each block that was begun: target, number of inputs, seconds, findings. And the work that is left
        when the time is over.
    """
    until_s = None if seconds is None else time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    left = list(work)
    while left and (until_s is None or time.monotonic() < until_s):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, "place")
            command = [sys.executable, __file__, "--place", str(place)]
            if until_s is not None:
                command += ["--seconds", str(until_s - time.monotonic())]
            done = subprocess.run(command, input=json.dumps(left), stdout=subprocess.PIPE, text=True, cwd=folder)
            found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            rows += found
            left = left[len(found) :]
            if done.returncode:
                if not place.exists():
                    raise SystemExit(f"the process that feeds inputs did not start: status {done.returncode}")
                name, number = place.read_text().split()[:2]
                (target, start, end), left = left[0], left[1:]
                assert (target, True) == (name, start <= int(number) < end)
                finding = {"number": int(number), "error": death(done.returncode)}
                rows.append({"target": name, "inputs": int(number) + 1 - start, "seconds": 0.0, "findings": [finding]})
                left = [(name, int(number) + 1, end), *left] if int(number) + 1 < end else left
            elif left and not found and until_s is None:
                raise SystemExit("no progress")
    return rows, left


def death(status: int) -> str:
    """Return how a process ended."""
    if status == -signal.SIGPROF:
        return f"took more than {MAX_CPU_S:g} s of processor time"
    if status == -signal.SIGALRM:
        return f"took more than {MAX_S:g} s"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def feed(work: Sequence[Block], place: Path, seconds: float | None) -> None:
    """Feed inputs in this process, and print a line of JSON for each block."""
    until_s = None if seconds is None else time.monotonic() + seconds
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT)
    printed = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # help texts, and what libraries print
    os.dup2(1, 2)
    for name in {each[0] for each in work}:
        TARGETS[name].warm_up()
        for number in range(NUM_WARM_UPS):  # imports, and memory that is kept
            with contextlib.suppress(*TARGETS[name].documented):
                TARGETS[name].feed(random.Random(number))
    before_mib = peak_mib()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, size + 2**32))
    for name, start, end in work:
        if until_s is not None and time.monotonic() > until_s:
            break
        target, findings, began_s = TARGETS[name], [], time.monotonic()
        for number in range(start, end):
            os.pwrite(descriptor, f"{name} {number} {'':20}".encode(), 0)
            signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
            signal.setitimer(signal.ITIMER_REAL, MAX_S)
            try:
                target.feed(random.Random(f"{name} {number}"))
            except target.documented:
                pass
            except (Exception, SystemExit) as error:
                frames = traceback.extract_tb(error.__traceback__)
                where = [frame for frame in frames if str(ROOT) in frame.filename and ".venv" not in frame.filename][-1]
                text = f"{type(error).__name__}: {str(error)[:200]} at {Path(where.filename).name}:{where.lineno}"
                findings.append({"number": number, "error": text})
            if peak_mib() > before_mib + MAX_MIB:
                findings.append({"number": number, "error": f"took more than {MAX_MIB} MiB"})
                before_mib = peak_mib()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        spent_s = time.monotonic() - began_s
        row = {"target": name, "inputs": end - start, "seconds": spent_s, "findings": findings}
        print(json.dumps(row), file=printed, flush=True)


def peak_mib() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Return the number of inputs, the pace and the findings of each target as text."""
    lines = []
    for name in TARGETS:
        own = [row for row in rows if row["target"] == name]
        inputs, spent_s = sum(row["inputs"] for row in own), sum(row["seconds"] for row in own)
        findings = [each for row in own for each in row["findings"]]
        pace = f"{inputs / spent_s:,.0f} inputs/s" if spent_s else ""
        lines.append(f"{name:14} {inputs:>9,} inputs {pace:>16} {len(findings):>5} findings")
        for error, count in Counter(each["error"] for each in findings).most_common(10):
            number = next(each["number"] for each in findings if each["error"] == error)
            lines.append(f"  {count} x {error} (the first is --target {name} --first {number} --inputs 1)")
    return "\n".join([*lines, f"{sum(row['inputs'] for row in rows):,} inputs"])


def main() -> int:
    """Run the command; return 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all targets together (10000)")
    parser.add_argument("--target", choices=[*TARGETS], default="", help="only this one")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each target (0)")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--state", type=Path, help="file that keeps what was done, for the same command to continue")
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.place:  # this is the process that feeds inputs
        feed(json.load(sys.stdin), options.place, options.seconds)
        return 0
    rows, left = [], blocks(options.target, options.first, options.inputs)
    if options.state and options.state.exists():
        rows, left = json.loads(options.state.read_text())
    more, left = run(left, options.seconds)
    rows += more
    if options.state:
        options.state.write_text(json.dumps([rows, left]))
    print(report(rows) + (f"; {sum(end - start for _, start, end in left):,} are left" if left else ""))
    return int(any(row["findings"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

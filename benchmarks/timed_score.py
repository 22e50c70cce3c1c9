"""`jobs/score.py` that also notes when each step begins.

    python benchmarks/timed_score.py MARKS.json OPTIONS-OF-SCORE

MARKS.json then holds the run's record, the driver's peak memory, and marks: the name of a step, the time, and the CPU
seconds of the whole machine since it started. `scale_runs.py` turns them into costs.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agr_ray.cli import run
from agr_ray.config import ScoreJob
from agr_ray.console import make_console
from agr_ray.runtime.score_on_ray import RayWorkers
from agr_ray.scoring.driver import score_input
from agr_ray.scoring.publish import Counts, Publication
from agr_ray.scoring.scorer import Scoring


def main() -> None:
    """Score, and write the marks."""
    path, *options = sys.argv[1:]

    def score(job: ScoreJob) -> None:
        workers = TimedWorkers(job)
        record = score_input(job, workers, make_console())
        driver_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        Path(path).write_text(json.dumps({"record": record, "driver_mib": driver_mib, "marks": workers.marks}))

    run(ScoreJob, score, options)


class TimedWorkers(RayWorkers):
    """Ray's workers, with a mark when scoring begins, when a part arrives, and when staging begins and ends."""

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        self.marks: list[tuple[str, float, float]] = []

    def score(self, scoring: Scoring, parts: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """Score the parts."""
        self._mark("score")
        for summary in super().score(scoring, parts):
            self._mark("part")
            yield summary

    def stage(self, publication: Publication) -> Iterator[Counts]:
        """Write the files to publish."""
        self._mark("stage")
        yield from super().stage(publication)
        self._mark("staged")

    def _mark(self, name: str) -> None:
        self.marks.append((name, time.time(), machine_cpu_s()))


def machine_cpu_s() -> float:
    """Return the CPU seconds of all processes of this machine (Linux) since it started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()

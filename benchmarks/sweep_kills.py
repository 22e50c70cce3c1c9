"""Run a submitted sweep of a dozen trials, kill its driver, a worker and a trial, and check all records.

    python benchmarks/sweep_kills.py --data data/utkface3000 [--trials 12] [--page report.html]

Submits `jobs/tune.py` with `ray job submit` to a cluster of three node processes, with data and sweep in a bucket of a
real S3 server. Trial 1 raises an error, because its weights do not exist. Trial 2 diverges. When five trials have ended
and two are running, the driver is killed. The same command, now with one trial at a time, retries trial 1, which had
not finished an epoch, and resumes the two. Of the trials that then start, a worker of the first is killed after an
epoch, which the trial survives. The own process of the next is killed twice, which it does not survive. Then the
benchmark checks that no other ended trial was repeated, and that the table has each trial once, with its outcome.
Prints a log of events, and the table.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from agr_ray.console import make_console

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "system"))
from commands import (  # noqa: E402
    TRAIN_WORKER,
    TRIAL,
    Cluster,
    job_command,
    run_cluster,
    start_command,
    submit_command,
    titled_processes,
    wait_until,
)
from seaweedfs import Bucket, run_seaweedfs  # noqa: E402

RECIPE: Final = "tune_lite"
RAISES, DIVERGES = 1, 2
ENDED_BEFORE_KILL: Final = 5
TIMEOUT_S: Final = 2400.0
NAME: Final = "killed"
WEIGHTS: Final = "no-weights.pt"


def main() -> None:
    """Submit, kill, submit again, kill more, check and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of a prepared set")
    parser.add_argument("--trials", type=int, default=12, help="at least 9 (%(default)s)")
    parser.add_argument("--page", type=Path, help="copy the sweep's page here")
    arguments = parser.parse_args()
    if arguments.trials < ENDED_BEFORE_KILL + 4:
        parser.error(f"--trials {arguments.trials}: at least 9 are needed, or none starts after the driver was killed")
    console = make_console()
    with tempfile.TemporaryDirectory(prefix="sweep-") as temporary, run_seaweedfs(Path(temporary)) as server:
        bucket = Bucket.create(server, "sweeps")
        bucket.upload(arguments.data, "data")
        with run_cluster(server.environment(), num_cpus=(2, 4, 4)) as cluster:
            KilledSweep(console, bucket, cluster, arguments.trials, Path(temporary) / "log").run()
        if arguments.page:
            arguments.page.write_bytes(bucket.get(f"sweeps/{NAME}/report.html"))


class KilledSweep:
    """One sweep with all disturbances."""

    def __init__(self, console: Console, bucket: Bucket, cluster: Cluster, trials: int, log: Path) -> None:
        self._console, self._bucket, self._cluster, self._trials, self._log = console, bucket, cluster, trials, log
        self._started = time.monotonic()

    def run(self) -> None:
        """Submit the job twice, and check the results of the second."""
        self._say("submitted")
        with start_command(self._command(max_concurrent=2), self._cluster.environment, self._log) as process:
            wait_until(self._is_in_the_middle, process, self._log, TIMEOUT_S, pause_s=0.5)
            for driver in titled_processes(self._cluster.nodes, "jobs/tune.py"):
                driver.kill()
            self._say("driver killed")
            wait_until(lambda: process.poll() is not None, process, self._log, TIMEOUT_S, pause_s=0.5)
        before = self._records()
        with start_command(self._command(max_concurrent=1), self._cluster.environment, self._log) as process:

            def wait(when: Callable[[], bool]) -> None:
                wait_until(when, process, self._log, TIMEOUT_S)

            wait(lambda: self._running() >= len(before) and self._has_epoch(self._running()))
            survivor = self._running()
            titled_processes(self._cluster.nodes, TRAIN_WORKER)[0].kill()
            self._say(f"worker of trial {survivor} killed")
            wait(lambda: self._running() != survivor and self._has_epoch(self._running()))
            victim = self._running()
            self._kill_trial(victim)
            wait(lambda: f"trial {victim} resumes" in self._log.read_text() and self._has_processes(TRIAL))
            self._kill_trial(victim)
            wait(lambda: process.poll() is not None)
            if process.returncode:
                raise SystemExit(f"the sweep ended with {process.returncode}: {self._log.read_text()[-3000:]}")
        self._say("ended")
        self._check(before, survivor, victim)

    def _command(self, **tune: object) -> list[str]:
        space = {
            "loss.age_weight": {"log_uniform": [0.05, 2.0]},
            "loss.gender_weight": {"log_uniform": [0.1, 4.0]},
            "loss.race_weight": {"log_uniform": [0.1, 4.0]},
            "train.lr": {"log_uniform": [1e-4, 1e30]},
            "model.pretrained": {"choice": ["none", f"{self._bucket.uri}/{WEIGHTS}"]},
        }
        points: list[dict[str, Any]] = [{"train.lr": 3e-3, "model.pretrained": "none"} for _ in range(self._trials)]
        points[RAISES]["model.pretrained"] = f"{self._bucket.uri}/{WEIGHTS}"
        points[DIVERGES]["train.lr"] = 1e30
        options = {
            "--config": RECIPE,
            "--train.data": f"{self._bucket.uri}/data",
            "--train.out": f"{self._bucket.uri}/runs",
            "--tune.out": f"{self._bucket.uri}/sweeps",
            "--tune.name": NAME,
            "--tune.trials": self._trials,
            "--tune.space": json.dumps(space),
            "--tune.points_to_evaluate": json.dumps(points),
            "--tune.paper_first": "false",
            "--train.lock_expiry_s": 10,
        } | {f"--tune.{key}": value for key, value in tune.items()}
        command = job_command("tune", *(word for option in options.items() for word in option))
        return submit_command(self._cluster, command)

    def _records(self) -> list[dict[str, Any]]:
        prefix = f"sweeps/{NAME}/records/"
        return [self._bucket.json(key) for key in sorted(self._bucket.keys(prefix)) if key.endswith(".json")]

    def _is_in_the_middle(self) -> bool:
        unfinished = [record["number"] for record in self._records() if record["state"] == "unfinished"]
        ended = len(self._records()) - len(unfinished)
        return ended >= ENDED_BEFORE_KILL and len(unfinished) == 2 and all(map(self._has_epoch, unfinished))

    def _has_epoch(self, trial: int) -> bool:
        return bool(self._bucket.keys(f"sweeps/{NAME}/trials/{trial:04d}/history.parquet"))

    def _running(self) -> int:
        """Return the last trial that began or resumed; -1: none has."""
        numbers = re.findall(r"trial (\d+) (?:begins|resumes)", self._log.read_text(errors="replace"))
        return int(numbers[-1]) if numbers else -1

    def _has_processes(self, title: str) -> bool:
        return bool(titled_processes(self._cluster.nodes, title))

    def _kill_trial(self, number: int) -> None:
        for process in titled_processes(self._cluster.nodes, TRIAL):
            process.kill()
            process.wait(60)
        self._say(f"trial {number} killed")

    def _check(self, before: list[dict[str, Any]], survivor: int, victim: int) -> None:
        """Print the table, and raise unless each trial is accounted for."""
        rows = pq.read_table(io.BytesIO(self._bucket.get(f"sweeps/{NAME}/trials.parquet"))).to_pylist()
        table = Table("trial", "state", "epochs", "objective", "failures", "why", "before the driver was killed")
        states = {record["number"]: record["state"] for record in before}
        for row in rows:
            objective = "" if row["objective"] is None else f"{row['objective']:.4f}"
            words = [row["number"], row["state"], row["epochs"], objective, row["num_failures"], row["why"]]
            table.add_row(*map(str, words), states.get(row["number"], ""))
        self._console.print(table)
        ended = [record for record in before if record["state"] != "unfinished" and record["number"] != RAISES]
        now = self._records()
        why = {row["number"]: row["why"] for row in rows}
        failed = [row["number"] for row in rows if row["state"] == "failed"]
        checks = {
            "each trial has one row": [row["number"] for row in rows] == list(range(self._trials)),
            "all have ended": all(row["state"] != "unfinished" for row in rows),
            "ended trials were not repeated": all(record == now[record["number"]] for record in ended),
            "two were resumed": sum(record["state"] == "unfinished" for record in before) == 2,
            "one raised an error": why[RAISES].startswith("raised: ") and WEIGHTS in why[RAISES],
            "one diverged": why[DIVERGES].startswith("diverged: "),
            "one was killed": why[victim] == "killed: its process died",
            "one survived": rows[survivor]["num_failures"] == 1,
            "no other failed": failed == [RAISES, DIVERGES, victim],
            "there is a best trial": sum(row["is_best"] for row in rows) == 1,
            "and its recipe": f"sweeps/{NAME}/best.toml" in self._bucket.keys(f"sweeps/{NAME}/best"),
        }
        for what, is_so in checks.items():
            self._console.print(f"{what}: {'yes' if is_so else 'NO'}")
        if not all(checks.values()):
            raise SystemExit("a trial was lost, repeated, or failed for another reason")

    def _say(self, what: str) -> None:
        ended = sum(record["state"] != "unfinished" for record in self._records())
        self._console.print(f"{time.monotonic() - self._started:5.0f} s, {ended:2d} trials ended: {what}")


if __name__ == "__main__":
    main()

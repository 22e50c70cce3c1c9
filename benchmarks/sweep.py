"""Time that ASHA saves on the same trials, and whether training with the best recipe reproduces its trial.

    python benchmarks/sweep.py --data data/utkface3000 --work FOLDER [--recipe RECIPE] [--trials 12]

Runs two sweeps of one recipe, one after the other on the same machine: with ASHA, then without. All values are drawn at
random with one seed (`tune.random_trials`), so both have the same trials, whatever the results of earlier ones. Then
trains with the first sweep's best.toml, unchanged and with other seeds. The spread between seeds is the noise to
compare the trial's figures with. The report is at FOLDER/sweeps/asha/report.html.

Prints the wall time of each command, epochs, the best trial of each sweep with its objective (see `tune.mode`), and the
same figures of the trainings. Nothing else should run on the machine: on two cores, two trials run at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.table import Table

from agr_ray.console import make_console

ROOT = Path(__file__).parents[1]
COLUMNS = ("val_balanced_objective", "val_age_mae_years", "val_gender_balanced_accuracy", "val_race_balanced_accuracy")


@dataclass(frozen=True)
class Sweep:
    """Results of one sweep."""

    wall_s: float
    trials: list[dict[str, Any]]

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best trial."""
        return next(row for row in self.trials if row["is_best"])

    def count(self, state: str) -> int:
        """Return how many trials ended in this state."""
        return sum(row["state"] == state for row in self.trials)


def main() -> None:
    """Run both sweeps and the trainings, and print times and results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared set, or as train.data takes it")
    parser.add_argument("--work", required=True, type=Path, help="folder for sweeps and runs, without any yet")
    parser.add_argument("--recipe", default="tune_lite", help="(%(default)s)")
    parser.add_argument("--trials", type=int, default=12, help="trials of each sweep (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="seeds of further trainings (1 2)")
    arguments, more = parser.parse_known_args()
    console = make_console()

    sweeps = {name: sweep(arguments, name, more) for name in ("asha", "whole")}
    table = Table("", "wall time, s", "epochs", "complete", "stopped", "failed", "best trial", "its objective")
    for name, done in sweeps.items():
        table.add_row(
            {"asha": "with ASHA", "whole": "without"}[name],
            f"{done.wall_s:.0f}",
            str(sum(row["epochs"] for row in done.trials)),
            *(str(done.count(state)) for state in ("complete", "pruned", "failed")),
            str(done.best["number"]),
            f"{done.best['objective']:.4f}",
        )
    console.print(table)
    halved, whole = sweeps["asha"], sweeps["whole"]
    console.print(f"ASHA took {halved.wall_s / whole.wall_s:.2f} of the time")
    theirs = {row["number"]: row for row in whole.trials}
    same = all(theirs[row["number"]][key] == row[key] for row in halved.trials for key in row if "." in key)
    console.print(f"the trials have the same values: {'yes' if same else 'NO'}")

    recipe = arguments.work / "sweeps" / "asha" / "best.toml"
    table = Table("trained", "epoch", "objective", "age MAE, years", "gender, balanced", "race, balanced")
    best = halved.best
    table.add_row(
        "trial",
        str(best["best_epoch"]),
        *figures([best["objective"], best["age_mae_years"]]),
        *figures([1 - best["gender_error"], 1 - best["race_error"]]),
    )
    again = [train(arguments, recipe, "as-it-is", [])]
    table.add_row("best.toml", str(again[0]["epoch"]), *figures([again[0][name] for name in COLUMNS]))
    for seed in arguments.seeds:
        again.append(train(arguments, recipe, f"seed-{seed}", ["--train.seed", str(seed)]))
        table.add_row(f"with seed {seed}", str(again[-1]["epoch"]), *figures([again[-1][name] for name in COLUMNS]))
    console.print(table)
    objectives = [row["val_balanced_objective"] for row in again]
    spread = max(objectives) - min(objectives)
    console.print(f"best.toml is {abs(objectives[0] - best['objective']):.4f} off its trial; seeds spread {spread:.4f}")
    results = {
        name: {"wall_s": done.wall_s, "best": done.best["number"], "objective": done.best["objective"]}
        for name, done in sweeps.items()
    }
    print(json.dumps(results | {"retrained": objectives}))


def sweep(arguments: argparse.Namespace, name: str, more: list[str]) -> Sweep:
    """Run one of the sweeps."""
    options = {
        "--train.data": arguments.data,
        "--train.out": arguments.work / "runs",
        "--tune.out": arguments.work / "sweeps",
        "--tune.name": name,
        "--tune.asha": "true" if name == "asha" else "false",
        "--tune.trials": arguments.trials,
        "--tune.random_trials": arguments.trials,
    }
    wall_s = run("tune", "--config", arguments.recipe, *(word for pair in options.items() for word in pair), *more)
    return Sweep(wall_s, pq.read_table(arguments.work / "sweeps" / name / "trials.parquet").to_pylist())


def train(arguments: argparse.Namespace, recipe: str | Path, name: str, more: list[str]) -> dict[str, Any]:
    """Train a recipe, and return the epoch of its history that is kept."""
    run("train", "--config", recipe, "--train.name", name, *more)
    rows = pq.read_table(arguments.work / "runs" / name / "history.parquet").to_pylist()
    best: dict[str, Any] = min(rows, key=lambda row: row["val_objective"])
    return best


def run(job: str, *words: object) -> float:
    """Run a job and return its seconds; its output goes to stderr."""
    start = time.monotonic()
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(command, cwd=Path.cwd(), check=True, stdout=sys.stderr, env=environment)
    return time.monotonic() - start


def figures(values: list[float]) -> list[str]:
    """Return figures as a table shows them."""
    return [f"{value:.4f}" for value in values]


if __name__ == "__main__":
    main()

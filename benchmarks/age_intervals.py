"""Compare age intervals by the spread of the predicted distribution with those by predicted age group.

    python benchmarks/age_intervals.py --calibration EVAL/predictions.parquet --test EVAL/predictions.parquet
    python benchmarks/age_intervals.py --simulated 934 --rounds 20

jobs/evaluate.py writes both files, for the same model and for splits that it was not trained on; the model needs an age
head that predicts a distribution. With --rounds, calibration and test images are mixed and split again each time.
--simulated needs no files: in each round it draws so many calibration images, and 4,000 test images.

Prints the coverage of 90 % intervals, overall and by true age group, and their mean width. Expected by spread: 88 to
92 % overall, at least 86 % in every group of 100 images or more, and a smaller mean width.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.table import Table
from shares import NUM_SIMULATED, Scored, read
from simulated_faces import simulated_faces

from agr_ray.config import EvaluateConfig
from agr_ray.console import make_console
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.coverage import coverage_report
from agr_ray.labels import UTKFACE, Labels

COVERAGE: Final = 0.9


def main() -> None:
    """Read or draw the images, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="predictions.parquet of the calibration split")
    parser.add_argument("--test", type=Path, help="predictions.parquet of another split")
    parser.add_argument("--simulated", type=int, metavar="N", help="draw N calibration images, and test images")
    parser.add_argument("--rounds", type=int, default=1, help="sets of images (1)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.simulated is None) == (arguments.calibration is None or arguments.test is None):
        parser.error("expected --calibration and --test, or --simulated")
    console = make_console()
    reports: dict[str, list[dict[str, Any]]] = {"by predicted age group": [], "by spread": []}
    for number, (calibration_set, test) in enumerate(rounds(arguments)):
        if not number:
            console.print(f"{len(calibration_set.labels):,} calibration and {len(test.labels):,} test images")
            error = np.abs(test.predictions["age"] - test.labels.age).mean()
            console.print(f"age MAE {error:.2f} years; mean spread {test.predictions['age_spread'].mean():.2f} years")
        reports["by predicted age group"].append(report(without_spread(calibration_set), without_spread(test)))
        reports["by spread"].append(report(calibration_set, test))
    console.print(table_of(reports))


def rounds(arguments: argparse.Namespace) -> Iterator[tuple[Scored, Scored]]:
    """Yield calibration and test images."""
    if arguments.simulated is not None:
        for number in range(arguments.rounds):
            seed = 1000 * arguments.seed + 2 * number
            drawn = simulated_faces(arguments.simulated, seed), simulated_faces(NUM_SIMULATED, seed + 1)
            yield Scored(*drawn[0]), Scored(*drawn[1])
        return
    calibration_set, test = read(arguments.calibration), read(arguments.test)
    for each in (calibration_set, test):
        if "age_spread" not in each.predictions:
            raise SystemExit("no age_spread: a model whose age head predicts a distribution is needed")
    yield calibration_set, test
    num = len(calibration_set.labels)
    labels = {
        name: np.concatenate([each.labels.arrays[name] for each in (calibration_set, test)])
        for name in calibration_set.labels.arrays
    }
    both = Scored(
        Labels.from_arrays(UTKFACE, labels),
        {
            name: np.concatenate([values, test.predictions[name]])
            for name, values in calibration_set.predictions.items()
        },
    )
    rng = np.random.default_rng(arguments.seed)
    for _ in range(1, arguments.rounds):
        order = rng.permutation(len(both.labels))
        yield taken(both, order[:num]), taken(both, order[num:])


def taken(images: Scored, rows: np.ndarray[Any, Any]) -> Scored:
    """Return some of the images."""
    return Scored(images.labels.take(rows), {name: values[rows] for name, values in images.predictions.items()})


def without_spread(images: Scored) -> Scored:
    """Return the images as a network without a distribution would predict them."""
    return Scored(images.labels, {"age": images.predictions["age"]})


def report(calibration_set: Scored, test: Scored) -> dict[str, Any]:
    """Return the part `age` of the coverage report."""
    calibration = Calibration.fit(*calibration_set, coverage=COVERAGE, risk=EvaluateConfig().abstain_risk)
    measured: dict[str, Any] = coverage_report(*test, calibration)["age"]
    return measured


def table_of(reports: dict[str, list[dict[str, Any]]]) -> Table:
    """Return the means over all rounds."""
    table = Table("", *reports, "test images", title=f"coverage of {COVERAGE:.0%} intervals, mean over rounds")
    first = next(iter(reports.values()))
    table.add_row(
        "mean width, years",
        *(f"{mean(each, 'mean_width_years'):.2f}" for each in reports.values()),
        f"{first[0]['n']:,}",
    )
    table.add_row("all", *(f"{100 * mean(each, 'coverage'):.1f} %" for each in reports.values()), f"{first[0]['n']:,}")
    for group in UTKFACE.age_groups:
        of_group = {
            name: [one["groups"]["age_group"][group] for one in each if group in one["groups"]["age_group"]]
            for name, each in reports.items()
        }
        cells = [f"{100 * mean(each, 'coverage'):.1f} %" for each in of_group.values()]
        table.add_row(group, *cells, f"{mean(next(iter(of_group.values())), 'n'):,.0f}")
    return table


def mean(parts: list[dict[str, Any]], name: str) -> float:
    """Return the mean of a figure over all rounds."""
    return float(np.mean([part[name] for part in parts]))


if __name__ == "__main__":
    main()

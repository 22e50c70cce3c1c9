"""Measure whether rendered faces help a network for photographs: mixed into training, and as a second domain.

    python benchmarks/domains.py --chips UTKFACE --work FOLDER [--sample 4000] [--epochs 3] [--seeds 2]

Prepares a sample of UTKFace's aligned chips and a third as many rendered ones, both also without labels, and trains a
ResNet18 at 64 px from random weights on the same number of samples each time:

    real             UTKFace
    real + rendered  both, three UTKFace images for each rendered one
    rendered, beside real        rendered faces with labels and UTKFace without labels
    rendered, adapted to real    the same with a domain head behind gradient reversal
    real, beside rendered        the other way round, without the domain head
    real, adapted to rendered    and with it

Each is measured on the test split of the set that it is meant for, which no training saw. The unlabelled images reach
only the batch norms and the domain head, so the runs of a pair have the same labels in the same steps. Differences are
paired by image; their 95 % intervals hold the variance between seeds. Rendered faces that are mixed into training are
not in validation, which chooses the best epoch.
Every step is kept in --work, so the same command resumes after a kill; other arguments need another folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow.parquet as pq
from rich.console import Console

from agr_ray.config import (
    ClusterConfig,
    EvaluateConfig,
    EvaluateJob,
    LossConfig,
    ModelConfig,
    PredictConfig,
    PrepareConfig,
    PrepareJob,
    RenderConfig,
    RenderJob,
    SourceConfig,
    SplitConfig,
    TrainConfig,
    TrainJob,
)
from agr_ray.console import make_console, make_table
from agr_ray.data.crops import read_labels
from agr_ray.data.prepared import open_prepared
from agr_ray.device import cpu_name
from agr_ray.evaluation.comparison import Estimate, compare
from agr_ray.labels import UTKFACE
from agr_ray.learn.run import is_finished
from agr_ray.predict.prediction_rows import read_predictions
from agr_ray.report.comparison_rows import difference_text, text
from agr_ray.runtime.cluster import cluster
from agr_ray.runtime.evaluate import evaluate
from agr_ray.runtime.prepare import prepare
from agr_ray.runtime.render import render
from agr_ray.runtime.run_matrix import check_record
from agr_ray.runtime.train import train
from agr_ray.storage import Storage

SIDE_PX: Final = 64
CROP_PX: Final = 80
BATCH: Final = 32
SPLIT: Final = {"val": 0.05, "test": 0.2}
METRICS: Final = ("age_mae_years", "gender_accuracy", "race_accuracy")
TASKS: Final = ("age", "gender", "race")
STORAGE: Final = Storage()


class Variant(NamedTuple):
    """One way to train."""

    name: str
    sets: Sequence[str]
    shares: Sequence[float] = ()
    tasks: Sequence[str] = TASKS


VARIANTS: Final = (
    Variant("real", ["real"]),
    Variant("real + rendered", ["real", "rendered-training"], [3.0, 1.0]),
    Variant("rendered, beside real", ["rendered", "real-unlabelled"]),
    Variant("rendered, adapted to real", ["rendered", "real-unlabelled"], tasks=(*TASKS, "domain")),
    Variant("real, beside rendered", ["real", "rendered-unlabelled"]),
    Variant("real, adapted to rendered", ["real", "rendered-unlabelled"], tasks=(*TASKS, "domain")),
)
COMPARISONS: Final = (
    ("real", ("real", "real + rendered")),
    ("real", ("rendered, beside real", "rendered, adapted to real")),
    ("rendered", ("real, beside rendered", "real, adapted to rendered")),
)
"""The set whose test split is measured, and the variants; the first is the reference."""


def main() -> None:
    """Prepare, train, evaluate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=Path, required=True, help="folder of UTKFace's aligned chips")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--sample", type=int, default=4000, help="UTKFace images to use (4000)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of a training on both sets (3)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each variant (2)")
    arguments = parser.parse_args()
    console = make_console()
    check_arguments(arguments)
    with cluster(ClusterConfig()):
        num_rows = prepare_sets(arguments.chips.resolve(), arguments.work.resolve(), arguments.sample)
        for seed in range(arguments.seeds):
            for variant in VARIANTS:
                run(arguments.work.resolve(), variant, seed, arguments.epochs, num_rows, console)
    report(arguments.work.resolve(), arguments.seeds, num_rows, console)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Store the arguments in --work, or check that it was made with the same ones; more seeds add runs.

    Raises:
        ConfigError: it was made with other ones.
    """
    decisive = {"chips": str(arguments.chips.resolve()), "sample": arguments.sample, "epochs": arguments.epochs}
    uri = str(arguments.work.resolve() / "arguments.json")
    check_record(STORAGE, uri, {"arguments": decisive}, f"--work {arguments.work}", "measurements")


def prepare_sets(chips: Path, work: Path, sample: int) -> dict[str, int]:
    """Make the sets; return the number of training images of each."""
    render(RenderJob(render=RenderConfig(out=str(work / "faces"), num_chips=sample // 3, num_photographs=0)))
    drawn = work / "faces" / "chips"
    prepare_set(work / "real", SourceConfig(kind="utkface", uri=str(chips)), SplitConfig(**SPLIT, sample=sample))
    faces = SourceConfig(uri=str(drawn), name="rendered")
    prepare_set(work / "rendered", faces, SplitConfig(**SPLIT))
    prepare_set(work / "rendered-training", faces, SplitConfig(val=0.0, test=0.0, sample=sample // 4))
    for name, folder in (("real", chips), ("rendered", drawn)):
        copy_without_labels(work / name, folder, work / "unlabelled" / name)
        source = SourceConfig(uri=str(work / "unlabelled" / name), name=f"{name}, unlabelled")
        prepare_set(work / f"{name}-unlabelled", source, SplitConfig(val=0.0, test=0.0))
    sets = [name for variant in VARIANTS for name in variant.sets]
    return {name: open_prepared(STORAGE, str(work / name), "--work").splits["train"] for name in dict.fromkeys(sets)}


def prepare_set(out: Path, source: SourceConfig, split: SplitConfig) -> None:
    """Prepare a set, unless it is complete."""
    if not (out / "prepare.json").exists():
        prepare(PrepareJob(source=source, split=split, prepare=PrepareConfig(out=str(out), crop_side_px=CROP_PX)))


def copy_without_labels(prepared: Path, images: Path, folder: Path) -> None:
    """Copy the images of a set's training split, with a table that labels none of them."""
    if (folder / "labels.csv").exists():
        return
    rows = pq.read_table(prepared / "crops", columns=["key", "split", "status"]).to_pylist()
    keys = [row["key"] for row in rows if row["split"] == "train" and row["status"] in ("ok", "fallback")]
    for key in keys:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images / key, folder / key)
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("key", "age", "split"), *((key, "", "train") for key in keys)])


def run(work: Path, variant: Variant, seed: int, epochs: int, num_rows: dict[str, int], console: Console) -> None:
    """Train a variant and evaluate it on the test splits that it is compared on, unless that is done."""
    name = run_name(variant.name, seed)
    num_samples = epochs * (num_rows["real"] + num_rows["rendered-training"])
    job = TrainJob(
        model=ModelConfig(backbone="resnet18", image_size=SIDE_PX, tasks=tuple(variant.tasks)),
        loss=LossConfig(age_scale_years=10, race_weight=1.0),
        train=TrainConfig(
            data=json.dumps([str(work / each) for each in variant.sets]),
            data_shares=tuple(variant.shares),
            out=str(work / "runs"),
            name=name,
            epochs=round(num_samples / sum(num_rows[each] for each in variant.sets)),
            batch_size=BATCH,
            lr=1e-3,
            schedule="one_cycle",
            early_stopping_patience=0,
            precision="auto",
            seed=seed,
        ),
    )
    if not is_finished(STORAGE, f"{job.train.out}/{name}"):
        console.print(f"training {name}")
        train(job, quiet=True)
    for tested in tests_of(variant.name):
        out = work / "evaluations" / tested / name
        if not (out / "metrics.json").exists():
            config = EvaluateConfig(
                checkpoint=f"{job.train.out}/{name}/best", data=str(work / tested), out=str(out), num_workers=1
            )
            evaluate(EvaluateJob(evaluate=config, predict=PredictConfig(precision="auto")), quiet=True)


def tests_of(variant: str) -> Iterator[str]:
    """Yield the sets that a variant is measured on."""
    yield from dict.fromkeys(tested for tested, names in COMPARISONS if variant in names)


def run_name(variant: str, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"{variant.replace(' + ', '-and-').replace(', ', '-').replace(' ', '-')}-{seed}"


def report(work: Path, seeds: int, num_rows: dict[str, int], console: Console) -> None:
    """Print the figures of all comparisons."""
    prepared = open_prepared(STORAGE, str(work / "real"), "--work")
    console.print(
        f"{num_rows['real']:,} UTKFace and {num_rows['rendered']:,} rendered training images, {seeds} seeds, "
        f"split manifest {prepared.split_manifest_sha256[:8]}, {cpu_name()}"
    )
    for tested, names in COMPARISONS:
        table = make_table(f"test split of {tested}", "age MAE, years", "difference", "gender, %", "", "race, %", "")
        found = estimates(work, tested, names, seeds)
        for name in names:
            cells = []
            for metric in METRICS:
                estimate = found[name].get(metric)
                cells += [text(metric, estimate), difference_text(metric, estimate)]
            table.add_row(name, *cells)
        console.print(table)


def estimates(work: Path, tested: str, names: Sequence[str], seeds: int) -> dict[str, dict[str, Estimate]]:
    """Return the estimates of variants on one test split; differences are from the first variant."""
    folder = work / "evaluations" / tested
    tables = {
        name: [
            pq.read_table(folder / run_name(name, seed) / "predictions.parquet").sort_by("image_id")
            for seed in range(seeds)
        ]
        for name in names
    }
    runs = {name: [read_predictions(table, TASKS, UTKFACE) for table in each] for name, each in tables.items()}
    first = tables[names[0]][0]  # all are of the same images
    return compare(runs, read_labels(first, UTKFACE), first["group_id"].to_numpy(), names[0])


if __name__ == "__main__":
    main()

"""The whole way, once, on faces drawn for it: render, prepare, train, evaluate, score.

The README gives the same as separate commands. Here all of them share one small cluster.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import torch
from torchvision.ops import box_iou

from agr_ray.config import ClusterConfig, EvaluateJob, PrepareJob, RenderJob, ScoreJob, TrainJob, parse
from agr_ray.console import make_console, make_table
from agr_ray.runtime.cluster import cluster
from agr_ray.runtime.evaluate import evaluate
from agr_ray.runtime.prepare import prepare
from agr_ray.runtime.render import render
from agr_ray.runtime.score import score
from agr_ray.runtime.train import train
from agr_ray.storage import Storage

RECIPE = ("--config", "demo")
MIN_IOU = 0.5


def demo(out: str) -> None:
    """Run every job in turn, then print where everything is and how well it went."""
    console = make_console()
    started = time.perf_counter()

    def step(title: str, job_class: Any, work: Callable[[Any], Any], *arguments: str) -> Any:
        console.print(f"--- {title} ({time.perf_counter() - started:.0f} s)")
        return work(parse(job_class, arguments))

    with cluster(ClusterConfig()):
        step("render", RenderJob, render, *RECIPE, "--render.out", f"{out}/faces")
        step(
            "prepare",
            PrepareJob,
            prepare,
            *(*RECIPE, "--source.uri", f"{out}/faces/chips", "--prepare.out", f"{out}/prepared"),
        )
        checkpoint = step(
            "train",
            TrainJob,
            train,
            *(*RECIPE, "--train.data", f"{out}/prepared", "--train.out", f"{out}/runs", "--new-run"),
        )
        # A checkpoint needs no recipe.
        metrics = step(
            "evaluate",
            EvaluateJob,
            evaluate,
            *("--evaluate.checkpoint", checkpoint, "--evaluate.data", f"{out}/prepared"),
        )
        scored = step(
            "score",
            ScoreJob,
            score,
            *("--score.checkpoint", checkpoint, "--score.input", f"{out}/faces/photographs"),
            *("--score.out", f"{out}/scored"),
        )
    images = f"{out}/scored/images/run={scored['run_id']}"
    console.print("--- result")
    found, drawn = _found_faces(
        Storage().read_table(images), Storage().read_table(f"{out}/faces/photographs/faces.parquet")
    )
    table = make_table("on faces not seen in training", "model", "baseline")
    for label, task, name, scale, unit in (
        ("age MAE", "age", "mae_years", 1, "years"),
        ("gender accuracy", "gender", "accuracy", 100, "%"),
        ("race accuracy", "race", "accuracy", 100, "%"),
    ):
        value, guess = metrics[task][name] * scale, metrics["baseline"][task][name] * scale
        table.add_row(label, f"{value:.1f} {unit}", f"{guess:.1f} {unit}")
    table.add_row("faces found in the photographs", f"{found} of {drawn}", "")
    console.print(table)
    for label, path in (
        ("checkpoint", checkpoint),
        ("metrics", f"{checkpoint}-eval-*/metrics.json"),
        ("scores", images),
    ):
        console.print(f"{label}: {path}")
    console.print(f"{time.perf_counter() - started:.0f} s in total")


def _found_faces(images: pa.Table, truth: pa.Table) -> tuple[int, int]:
    """Count the drawn faces that have a scored box of IoU >= 0.5, and all drawn faces."""
    boxes: dict[str, list[list[float]]] = {}
    for row in truth.to_pylist():
        boxes.setdefault(row["key"], []).append(row["box"])
    found = 0
    for row in images.to_pylist():
        drawn = boxes.get(row["uri"].rpartition("/")[2], [])
        if row["faces"] and drawn:
            overlaps = box_iou(torch.tensor(drawn), torch.tensor([face["box"] for face in row["faces"]]))
            found += int((overlaps.amax(dim=1) >= MIN_IOU).sum())
    return found, sum(map(len, boxes.values()))


def main(argv: Sequence[str]) -> None:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(
        prog="agr-ray demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="demo-out", help="folder of everything that the demo makes (demo-out)")
    demo(parser.parse_args(argv).out)

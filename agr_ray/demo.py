"""The demo: render, prepare, train, calibrate, evaluate and score on synthetic faces.

The README gives the same as separate commands. Here all of them share one small cluster.
"""

import math
import shlex
import time
import warnings
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from torchvision.ops import box_iou

from agr_ray.cli import COMMANDS
from agr_ray.config import RenderJob, ReportJob, parse
from agr_ray.console import make_console, make_table
from agr_ray.predict.face_model import FaceModel
from agr_ray.report.report import report
from agr_ray.runtime.cluster import cluster
from agr_ray.storage import Storage

MIN_IOU = 0.5
NUM_SHOWN = 9
TILE_PX = 480


_NEXT = """
This model has seen only drawings, so its predictions for real people mean nothing. Next:
  source .venv/bin/activate
  agr-ray predict {out}/faces/photographs/photograph-000000.jpg --checkpoint {checkpoint}
  agr-ray prepare --help    begin with your own photographs: a folder and a table of labels
"""


def demo(out: str) -> None:
    """Run every job in turn, then print the metrics and the paths of the results."""
    console = make_console()
    started = time.perf_counter()

    def step(name: str, *options: str) -> Any:
        console.print(f"--- {time.perf_counter() - started:.0f} s: agr-ray {name} {shlex.join(options)}")
        command = COMMANDS[name]
        return resolve_name(command.work)(parse(command.job, options))

    rendering = ("--config", "demo", "--out", f"{out}/faces")
    with cluster(parse(RenderJob, rendering).cluster, trains=True):
        step("render", *rendering)
        step("prepare", "--config", "demo", "--source.uri", f"{out}/faces/chips", "--out", f"{out}/prepared")
        named = ("--out", f"{out}/runs", "--name", "first", "--new-run")
        checkpoint = step("train", "--config", "demo", "--data", f"{out}/prepared", *named)
        measured = ("--checkpoint", checkpoint, "--data", f"{out}/prepared")
        step("evaluate", *measured, "--split", "val", "--calibrate")
        metrics = step("evaluate", *measured)
        photographs = ("--input", f"{out}/faces/photographs", "--out", f"{out}/scored")
        console.print("These photographs are drawings, too, and differ from the chips: expect a warning of each kind.")
        scored = step("score", "--checkpoint", checkpoint, *photographs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the same warning again
        model = FaceModel.load(checkpoint)
    evaluation = str(next(Path(checkpoint).parent.glob("*-eval-test-*")))
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
        value, baseline = metrics[task][name] * scale, metrics["baseline"][task][name] * scale
        table.add_row(label, f"{value:.1f} {unit}", f"{baseline:.1f} {unit}")
    table.add_row("faces found in the photographs", f"{found} of {drawn}", "")
    console.print(table)
    for label, path in (
        ("annotated photographs", _contact_sheet(model, Path(out))),
        ("checkpoint, with a model card", checkpoint),
        ("tables of faces and demographics", f"{out}/scored"),
        ("report on the photographs", report(ReportJob(folders=[f"{out}/scored"]), quiet=True)),
        ("report on the model", report(ReportJob(folders=[evaluation]), quiet=True)),
    ):
        console.print(f"{label}: {path}")
    console.print(_NEXT.format(out=out, checkpoint=checkpoint))
    console.print(f"{time.perf_counter() - started:.0f} s in total")


def _contact_sheet(model: FaceModel, out: Path) -> str:
    """Write one picture of several annotated photographs; return its path."""
    paths = sorted((out / "faces" / "photographs").glob("*.jpg"))[:NUM_SHOWN]
    tiles = [photo.draw() for photo in model.predict([*paths])]
    columns = math.ceil(math.sqrt(len(tiles)))
    sheet = Image.new("RGB", (TILE_PX * columns, TILE_PX * math.ceil(len(tiles) / columns)), "white")
    for index, tile in enumerate(tiles):
        tile.thumbnail((TILE_PX, TILE_PX))
        sheet.paste(tile, (TILE_PX * (index % columns), TILE_PX * (index // columns)))
    path = out / "annotated.jpg"
    sheet.save(path, quality=90)
    return str(path)


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

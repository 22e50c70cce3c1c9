"""Compare the speed of `jobs/score.py` on this machine's CPUs with a loop that a user would write.

    python benchmarks/score_throughput.py --photographs FOLDER [--seconds 300] [--workers 2] [--int8]
                                          [--checkpoint FOLDER]

Both process the same photographs with the same network: ResNet50 at 224 px with random weights. With --int8, (b) has an
int8 network of it, and the detector `mtcnn_int8`. With --checkpoint, (b) scores with that checkpoint, whatever its
network is; (a) stays the same.

(a) facenet-pytorch's MTCNN(keep_all=True) with its defaults, then torchvision's ResNet50 in float32 on its faces,
    one photograph at a time, on all cores. It runs before and after (b), because the machine's speed may drift.
(b) `jobs/score.py` with the preset `paper`, which starts Ray on this machine; photographs are repeated under other
    names until it runs for --seconds. Two times do not count, and are printed separately: its start-up, until the first
    batch has been read, and its finish, from when all photographs are scored until the process ends, which includes
    publishing. The start and end of (a)'s process do not count, either.

Also prints (b)'s time by stage, its peak memory (proportional set sizes of all processes, summed), how its attributes
agree with plain float32 on the same crops, and how its faces agree with those of (a). Random weights, whose outputs
are spread out, exaggerate differences of attributes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch
import torchvision
from facenet_scorer import FacenetScorer
from memory import described, peak, watched_memory
from numpy.typing import NDArray
from PIL import Image
from random_network import save_random_network
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import nn

from agr_ray.config import ModelConfig, VisionConfig
from agr_ray.console import make_console
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.models.checkpoint_network import load_network
from agr_ray.models.transform import Transform
from agr_ray.predict.attributes import AttributePredictor
from agr_ray.predict.forward import predict
from agr_ray.predict.quantize import difference_rows
from agr_ray.scoring.publish import published_runs
from agr_ray.storage import Storage
from agr_ray.vision.align import align
from agr_ray.vision.decode import decode_image
from agr_ray.vision.detect import make_detector

T = TypeVar("T")

TRANSFORM: Final = Transform(image_size=224, crop_side_px=224)
STAGES: Final = ("decode", "detect", "align", "predict")
JOB: Final = Path(__file__).parents[1] / "jobs" / "score.py"
ROWS_PER_PART: Final = 128
"""Half the default, so that the workers end together."""
MIN_OVERLAP: Final = 0.5
MIN_REFERENCE_SCORE: Final = 0.95
MIN_REFERENCE_SIDE_PX: Final = 40.0
MIN_REFERENCE_SHARE: Final = 0.04
"""Share of the photograph's shorter side: smaller faces of (a) need not be found."""


@dataclass(frozen=True)
class Reference:
    """Results of the user's loop."""

    seconds: float
    faces: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    """Boxes (n, 4) and scores (n,) by the photograph's file name."""
    shorter_sides_px: Mapping[str, int]

    @property
    def num_faces(self) -> int:
        """Return how many faces were found."""
        return sum(len(boxes) for boxes, _ in self.faces.values())


def main() -> None:
    """Run both and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--seconds", type=float, default=300.0, help="approximate duration of (b)")
    parser.add_argument("--workers", type=int, default=2, help="processes of (b)")
    parser.add_argument("--int8", action="store_true", help="let (b) score with an int8 network")
    parser.add_argument("--checkpoint", type=Path, help="folder of the checkpoint of (b), with its own precision")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.photographs.iterdir() if path.is_file())
    console = make_console()
    with tempfile.TemporaryDirectory(prefix="score-") as temporary:
        folder = Path(temporary)
        checkpoint = arguments.checkpoint or folder / "checkpoint"
        if not arguments.checkpoint:
            in_new_process(make_checkpoint, paths, checkpoint, "int8" if arguments.int8 else "auto")
        agreement, one_thread_s = in_new_process(attribute_agreement, paths, checkpoint)
        reference = in_new_process(user_loop, paths)
        num_copies = max(1, round(arguments.seconds * arguments.workers / one_thread_s / len(paths)))
        repeat(paths, num_copies, folder / "photographs")
        out = str(folder / "scored")
        command = [sys.executable, JOB, "--checkpoint", checkpoint, "--out", out]
        command += ["--input", folder / "photographs", "--num_workers", str(arguments.workers)]
        command += ["--vision.detector", "mtcnn_int8"] if arguments.int8 else []
        command += ["--rows_per_file", str(ROWS_PER_PART), "--cluster.address", "local"]
        started = time.time()
        process = subprocess.Popen(command)
        with watched_memory(process.pid) as samples_mib:
            if process.wait():
                raise SystemExit(process.returncode)
            exited = time.time()
        (record,) = published_runs(Storage(), out)
        ended = datetime.fromisoformat(record["published_at"]).timestamp() - record["timings"]["publish_s"]
        images = pa.dataset.dataset(folder / "scored" / "images", format="parquet").to_table()
    first_read = min(images["scored_at"].to_pylist()).timestamp()
    loop_s = [reference.seconds, in_new_process(user_loop, paths).seconds]
    show_speed(
        console,
        reference.num_faces,
        loop_s,
        len(paths),
        record,
        first_read - started,
        exited - ended,
        ended - first_read,
        arguments.workers,
    )
    console.print(f"peak memory of (b), {described(peak(samples_mib))}")
    console.print(agreement)
    show_faces(console, reference, images)


def in_new_process(work: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a new process, so that parts share neither memory nor threads."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def user_loop(paths: list[Path]) -> Reference:
    """Run (a)."""
    standardise = torchvision.transforms.Normalize([127.5] * 3, [128.0] * 3)
    scorer = FacenetScorer(nn.Sequential(standardise, torchvision.models.resnet50()).eval(), TRANSFORM.image_size)
    faces, sides = {}, {}

    def score_one(path: Path) -> None:
        image = Image.open(path).convert("RGB")
        sides[path.name] = min(image.size)
        boxes, scores, _ = scorer(image)
        faces[path.name] = (boxes, scores)

    score_one(paths[0])  # the first takes longer
    started = time.perf_counter()
    for path in paths:
        score_one(path)
    return Reference(time.perf_counter() - started, faces, sides)


def cut_faces(paths: list[Path], transform: Transform) -> NDArray[np.uint8]:
    """Return the aligned crops of all faces, as scoring cuts them, on one thread."""
    torch.set_num_threads(1)
    vision = VisionConfig()
    detector = make_detector("mtcnn", min_face_px=vision.min_face_px, min_score=vision.min_score)
    crops = []
    for path in paths:
        rgb = decode_image(path.read_bytes(), max_side_px=vision.max_side_px).rgb
        (faces,) = detector.detect([rgb])
        for box, landmarks in zip(faces.boxes_xyxy, faces.landmarks, strict=True):
            crops.append(align(rgb, box, landmarks, transform.crop_side_px, transform.margin))
    return np.stack(crops)


def make_checkpoint(paths: list[Path], directory: Path, precision: str) -> None:
    """Save a network of random weights, fitted to the faces of these photographs."""
    crops = cut_faces(paths, TRANSFORM)
    save_random_network(ModelConfig(preset="paper"), crops, TRANSFORM, directory, precision=precision)


def attribute_agreement(paths: list[Path], directory: Path) -> tuple[Table, float]:
    """Compare our predictions with the same network in plain float32 torch, on the same crops and mirror images.

    Returns:
        A table, and the seconds that a photograph takes on one thread, model loading apart.
    """
    loaded = read_checkpoint(directory)
    network = load_network(loaded)
    predictor = AttributePredictor.load(directory, loaded.pipeline.predict)
    predictor.predict(cut_faces(paths[:8], loaded.transform))  # the first takes longer
    started = time.perf_counter()
    crops = cut_faces(paths, loaded.transform)
    ours = predictor.predict(crops)
    seconds = (time.perf_counter() - started) / len(paths)
    plain_config = loaded.pipeline.predict.model_copy(update={"precision": "float32"})
    plain = predict(network, crops, loaded.transform, plain_config)
    title = f"(b), {predictor.precision}, against plain float32, {len(crops)} faces"
    table = Table("attribute", "mean difference", "largest", "same class", title=title)
    for row in difference_rows(plain, ours):
        table.add_row(*row)
    return table, seconds


def repeat(paths: list[Path], num_copies: int, folder: Path) -> None:
    """Link each photograph into the folder under several names."""
    folder.mkdir()
    for path in paths:
        first = folder / f"00000-{path.name}"
        shutil.copyfile(path, first)
        for copy in range(1, num_copies):
            os.link(first, folder / f"{copy:05d}-{path.name}")


def show_speed(
    console: Console,
    num_faces_of_loop: int,
    loop_s: Sequence[float],
    num_photographs: int,
    record: Mapping[str, Any],
    startup_s: float,
    finish_s: float,
    seconds: float,
    num_workers: int,
) -> None:
    """Print the speed of both, and (b)'s time by stage."""
    num_images, num_faces = record["num_images"], record["num_faces"]
    loop_speed, speed = num_photographs * len(loop_s) / sum(loop_s), num_images / seconds
    table = Table("", "photographs", "s", "images/s", "faces/s", title=f"{os.cpu_count()} CPUs")
    for name, each_s in zip(("(a) loop, before (b)", "(a) loop, after (b)"), loop_s, strict=True):
        speeds = (f"{num_photographs / each_s:.2f}", f"{num_faces_of_loop / each_s:.2f}")
        table.add_row(name, f"{num_photographs}", f"{each_s:.1f}", *speeds)
    row = (f"{num_images:,}", f"{seconds:.1f}", f"{speed:.2f}", f"{num_faces / seconds:.2f}")
    table.add_row(f"(b) score, {num_workers} workers", *row)
    console.print(table)
    console.print(f"(b) is {speed / loop_speed:.1f} times as fast as (a)")
    console.print(f"not counted in (b): start-up {startup_s:.1f} s; publishing and shutdown {finish_s:.1f} s")
    available_s = num_workers * seconds
    spent: dict[str, float] = record["timings"]["worker_s"]
    table = Table("(b) by stage", "ms an image", "share of the workers' time")
    for stage, stage_s in sorted(spent.items(), key=lambda item: -item[1]):
        table.add_row(stage, f"{stage_s / num_images * 1e3:.1f}", f"{stage_s / available_s:.1%}")
    rest_s = available_s - sum(spent.values())
    table.add_row("outside all stages", f"{rest_s / num_images * 1e3:.1f}", f"{rest_s / available_s:.1%}")
    compute_s = sum(spent.get(stage, 0.0) for stage in STAGES)
    table.add_row(f"sum of {', '.join(STAGES)}", "", f"{compute_s / available_s:.1%}")
    console.print(table)


def show_faces(console: Console, reference: Reference, images: pa.Table) -> None:
    """Print how (b)'s faces agree with those of (a); list those that only one of them has."""
    num_wanted = num_found = num_ours = 0
    missed, unmatched = [], []
    for uri, faces in zip(images["uri"].to_pylist(), images["faces"].to_pylist(), strict=True):
        copy, _, name = uri.rpartition("/")[2].partition("-")
        if int(copy):
            continue
        boxes, scores = reference.faces[name]
        ours = np.array([face["box"] for face in faces], np.float64).reshape(-1, 4)
        overlaps = intersection_over_union(boxes, ours)
        min_side_px = max(MIN_REFERENCE_SIDE_PX, MIN_REFERENCE_SHARE * reference.shorter_sides_px[name])
        sides_px = (boxes[:, 2:] - boxes[:, :2]).min(axis=1)
        wanted = (scores >= MIN_REFERENCE_SCORE) & (sides_px >= min_side_px)
        theirs, mine = linear_sum_assignment(overlaps, maximize=True)  # one to one: a face found twice is unmatched
        same = overlaps[theirs, mine] >= MIN_OVERLAP
        is_found, is_known = np.zeros(len(boxes), bool), np.zeros(len(ours), bool)
        is_found[theirs[same]], is_known[mine[same]] = True, True
        num_wanted += int(wanted.sum())
        num_found += int((wanted & is_found).sum())
        num_ours += len(ours)
        missed += [f"{name} {box.round().astype(int).tolist()}" for box in boxes[wanted & ~is_found]]
        unmatched += [
            f"{name} {box.round().astype(int).tolist()} score {face['detector_score']:.3f}"
            for box, face, known in zip(ours, faces, is_known, strict=True)
            if not known
        ]
    console.print(f"faces of (a) that (b) also finds: {share(num_found, num_wanted)}")
    for line in missed:
        console.print(f"  missed: {line}")
    console.print(f"faces of (b) that (a) does not find: {share(len(unmatched), num_ours)}")
    for line in unmatched:
        console.print(f"  only in (b): {line}")


def share(part: int, whole: int) -> str:
    """Return a part and its share of the whole as text."""
    return f"{part} of {whole}" + (f" ({part / whole:.1%})" if whole else "")


def intersection_over_union(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the overlap of each of n boxes with each of m others, (n, m)."""
    return np.asarray(torchvision.ops.box_iou(torch.from_numpy(boxes), torch.from_numpy(others)).numpy())


if __name__ == "__main__":
    main()

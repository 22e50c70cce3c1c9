"""Check that scoring counts distinct faces and notices photographs that differ from the calibration images.

    python benchmarks/bucket_audit.py --checkpoint RUN/best --chips UTKFACE --work FOLDER [--num 5000]

Pastes UTKFace chips onto coloured backgrounds. A third as many photographs as --num are labelled, and a copy of the
checkpoint is calibrated on them. Then three buckets are scored. In each, every tenth photograph is a near-duplicate of
another one: re-encoded, and in up to two ways resized, cropped at its borders, brightened, or turned by a few degrees.

1. `fair`: photographs made like the labelled ones;
2. `shifted`: the same, but each face was shrunk to a quarter and enlarged again, as by a poor camera;
3. `both`: all of these, --num photographs.

Chips that show the same picture as another one are left out first, by the correlation of their pixels.

Prints distinct faces as counted and in truth, the verdicts and the quantities that shifted. Fails if a number of
distinct faces is off by more than 2 %, if the fair bucket triggers the alarm, or if one of the others does not.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from agr_ray.config import EvaluateJob, PrepareJob, ScoreJob, parse
from agr_ray.console import make_console
from agr_ray.labels import GENDERS, UTKFACE
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.scoring.scores import open_scores
from agr_ray.vision.decode import decode_image, encode_jpeg

Image = NDArray[np.uint8]
WIDTH_PX, HEIGHT_PX = 320, 280
CHIP_PX: Final = (80, 240)
"""Smallest and largest side of a pasted chip: by far more than a factor of two, as in photographs."""
SHRINK: Final = 0.25
"""Size of a shifted photograph's chip before it is enlarged again."""
COPIES: Final = 10
"""One photograph in this many is a near-duplicate."""
SAME_PICTURE: Final = 0.98
"""Correlation of the pixels of two chips that show the same picture."""
MAX_ERROR: Final = 0.02


class Commands(NamedTuple):
    """The steps, on Ray or in this process."""

    prepare: Callable[[PrepareJob], Any]
    evaluate: Callable[[EvaluateJob], Any]
    score: Callable[[ScoreJob], dict[str, Any]]


def main() -> None:
    """Run on Ray."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--chips", type=Path, required=True, help="folder of UTKFace's chips")
    parser.add_argument("--work", type=Path, required=True, help="new folder for photographs and results")
    parser.add_argument("--num", type=int, default=5000, help="photographs in the bucket (5000)")
    arguments = parser.parse_args()
    from agr_ray.runtime.cluster import cluster
    from agr_ray.runtime.evaluate import evaluate
    from agr_ray.runtime.prepare import prepare
    from agr_ray.runtime.score import score

    commands = Commands(prepare, evaluate, score)
    with cluster(ScoreJob().cluster):
        failures = audit(arguments.checkpoint, arguments.chips, arguments.work, arguments.num, commands)
    if failures:
        raise SystemExit("; ".join(failures))


def audit(checkpoint: Path, chips: Path, work: Path, num: int, commands: Commands) -> list[str]:
    """Make the photographs, calibrate, score, print; return what is wrong."""
    console = make_console()
    model, rng = work / "model", np.random.default_rng(0)
    shutil.copytree(checkpoint, model)
    num_labelled, num_originals = num // 3, num - num // COPIES
    paths = different_chips(chips, num_labelled + num_originals)
    console.print(f"{num_labelled:,} labelled photographs, {num_originals:,} others, {num // COPIES:,} near-duplicates")
    write_labelled(work / "labelled", paths[:num_labelled], rng)
    sources: dict[str, int] = {}
    for name, part in (("fair", paths[num_labelled::2]), ("shifted", paths[num_labelled + 1 :: 2])):
        sources |= write_bucket(work / "photographs" / name, part, num // COPIES // 2, rng, shifted=name == "shifted")
    calibrate(model, work, commands)
    table = Table("bucket", "faces", "distinct", "in truth", "error", "verdict", "shifted")
    failures = []
    for name, expects_alarm in (("fair", False), ("shifted", True), ("both", True)):
        photographs = work / "photographs" / ("" if name == "both" else name)
        out = work / f"scored-{name}"
        options = ["--checkpoint", str(model), "--input", str(photographs), "--out", str(out)]
        record = commands.score(parse(ScoreJob, [*options, "--score.rows_per_file", "64"]))
        truth, shift = count_truth(out, sources), record["shift"]
        error = record["num_unique"] / truth - 1.0
        fired = [each["quantity"] for each in shift["quantities"] if each["verdict"] == "shifted"]
        numbers = (f"{record['num_faces']:,}", f"{record['num_unique']:,}", f"{truth:,}", f"{error:+.2%}")
        table.add_row(name, *numbers, shift["verdict"], ", ".join(fired))
        if abs(error) > MAX_ERROR:
            failures.append(f"{name}: {record['num_unique']:,} distinct faces counted, {truth:,} in truth")
        if bool(fired) != expects_alarm:
            failures.append(f"{name}: the alarm {'fired' if fired else 'was silent'}: {shift['sentence']}")
    console.print(table)
    return failures


def different_chips(folder: Path, num: int) -> list[Path]:
    """Return chips in random order, none of which shows the same picture as another."""
    paths = sorted(folder.glob("*.jpg"))
    random.Random(0).shuffle(paths)
    paths = paths[: num + num // 10]
    small = [cv2.resize(decode_image(path.read_bytes()).rgb, (24, 24), interpolation=cv2.INTER_AREA) for path in paths]
    pixels = np.stack(small).reshape(len(paths), -1).astype(np.float32)
    pixels -= pixels.mean(axis=1, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    repeats = np.zeros(len(paths), bool)
    for row in range(1, len(paths)):
        repeats[row] = (pixels[:row] @ pixels[row]).max() > SAME_PICTURE
    chosen = [path for path, repeat in zip(paths, repeats, strict=True) if not repeat][:num]
    if len(chosen) < num:
        raise SystemExit(f"--chips {folder}: {len(chosen):,} different chips, but {num:,} are needed; lower --num")
    return chosen


def photograph(path: Path, rng: np.random.Generator, *, shifted: bool = False) -> Image:
    """Return a photograph of a chip's face."""
    colours = rng.integers(0, 256, (*rng.integers(2, 9, 2), 3)).astype(np.uint8)
    image = cv2.resize(colours, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_CUBIC)
    side = int(rng.integers(*CHIP_PX))
    chip = decode_image(path.read_bytes()).rgb
    if shifted:
        small = max(round(side * SHRINK), 1)
        chip = cv2.resize(chip, (small, small), interpolation=cv2.INTER_AREA)
    shrinks = side < chip.shape[0]
    chip = cv2.resize(chip, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    x, y = (int(rng.integers(10, length - side - 10)) for length in (WIDTH_PX, HEIGHT_PX))
    image[y : y + side, x : x + side] = chip
    return image


def near_duplicate(image: Image, rng: np.random.Generator) -> Image:
    """Return a copy that was changed in up to two ways."""
    for name in rng.choice(["crop", "resize", "brightness", "contrast", "turn"], rng.integers(0, 3), replace=False):
        height, width = image.shape[:2]
        if name == "crop":
            top, bottom, left, right = rng.integers(0, 9, 4).tolist()
            image = image[top : height - bottom, left : width - right]
        elif name == "resize":
            factor = rng.uniform(0.6, 0.95)
            image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        elif name == "brightness":
            image = np.clip(image * rng.uniform(0.85, 1.15) + rng.uniform(-12, 12), 0, 255).astype(np.uint8)
        elif name == "contrast":
            image = np.clip((image - 128.0) * rng.uniform(0.8, 1.2) + 128.0, 0, 255).astype(np.uint8)
        else:
            turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-3, 3), 1.0)
            image = cv2.warpAffine(image, turn, (width, height), borderMode=cv2.BORDER_REFLECT)
    return np.ascontiguousarray(image)


def write_labelled(folder: Path, paths: Sequence[Path], rng: np.random.Generator) -> None:
    """Write photographs with the labels of their chips, for calibration."""
    folder.mkdir(parents=True)
    lines = ["key,age,gender,race,split"]
    for number, path in enumerate(paths):
        age, gender, race = path.name.split("_")[:3]
        (folder / f"{number:05d}.jpg").write_bytes(encode_jpeg(photograph(path, rng)))
        # UTKFace's genders are male, female.
        lines.append(f"{number:05d}.jpg,{age},{GENDERS[1 - int(gender)]},{UTKFACE.races[int(race)]},val")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_bucket(
    folder: Path, paths: Sequence[Path], num_copies: int, rng: np.random.Generator, *, shifted: bool
) -> dict[str, int]:
    """Write a photograph of each chip, and near-duplicates of some; return the number of each file's chip."""
    folder.mkdir(parents=True)
    originals = [photograph(path, rng, shifted=shifted) for path in paths]
    copied = rng.choice(len(paths), num_copies, replace=False)
    images = [*enumerate(originals), *((number, near_duplicate(originals[number], rng)) for number in copied)]
    sources = {}
    for place, name in enumerate(rng.permutation(len(images)).tolist()):
        number, image = images[place]
        path = folder / f"{name:05d}.jpg"
        quality = 92 if place < len(originals) else int(rng.integers(35, 92))
        path.write_bytes(encode_jpeg(image, quality))
        sources[str(path)] = 2 * number + shifted
    return sources


def calibrate(model: Path, work: Path, commands: Commands) -> None:
    """Calibrate the checkpoint on the labelled photographs, with its own settings."""
    checkpoint = read_checkpoint(model)
    detector = checkpoint.pipeline.vision.detector
    options = ["--source.kind", "folder", "--source.uri", str(work / "labelled"), "--out", str(work / "prepared")]
    options += ["--prepare.crop_side_px", str(checkpoint.transform.crop_side_px)]
    options += ["--vision.detector", "mtcnn" if detector == "none" else detector]
    commands.prepare(parse(PrepareJob, options))
    options = ["--checkpoint", str(model), "--data", str(work / "prepared"), "--split", "val", "--calibrate"]
    commands.evaluate(parse(EvaluateJob, [*options, "--evaluate.allow_overlap", "true"]))


def count_truth(out: Path, sources: dict[str, int]) -> int:
    """Return the number of distinct faces: of each chip, the most that were found in one of its photographs."""
    most: dict[int, int] = {}
    for uri, num_faces in open_scores(out).query("SELECT uri, len(faces) FROM images").fetchall():
        most[sources[uri]] = max(most.get(sources[uri], 0), num_faces)
    return sum(most.values())


if __name__ == "__main__":
    main()

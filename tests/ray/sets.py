"""Folders of rendered faces, prepared sets and checkpoints, made without Ray."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from agr_ray.config import ModelConfig
from agr_ray.config.pipeline import DEFAULT_PIPELINE, Pipeline
from agr_ray.data.manifest import labels_digest
from agr_ray.data.prepared import FORMAT_VERSION, PreparedSet
from agr_ray.data.rendered import RenderedChip, render_chip
from agr_ray.data.splits import split_digest, split_manifest_text
from agr_ray.labels import UTKFACE
from agr_ray.models.checkpoint import WEIGHTS
from agr_ray.models.checkpoint_network import content_codes, save_checkpoint
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.transform import Transform
from agr_ray.schema import CROPS, TEMPLATE
from agr_ray.storage import Storage
from agr_ray.vision.align import align_chip
from agr_ray.vision.decode import encode_jpeg

SIDE_PX = 32


@functools.cache
def drawn_chip(index: int, seed: int = 0, side_px: int = 200) -> RenderedChip:
    """Render a chip, once in each process."""
    return render_chip(seed, index, side_px)


@functools.cache
def chip_jpeg(index: int, seed: int = 0, side_px: int = 100) -> bytes:
    """Return the file of a rendered chip. Haar finds the face at 100 pixels in a fifth of the time of 200."""
    return encode_jpeg(drawn_chip(index, seed, side_px).image_rgb)


def with_other_weights(model: Path, folder: Path) -> Path:
    """Copy a checkpoint, and give it weights that do not fit its network."""
    shutil.copytree(model, folder)
    weights = load_file(folder / WEIGHTS)
    weights["heads.race.layer.bias"] = torch.zeros(7)
    save_file(weights, folder / WEIGHTS)
    return folder


def write_chips(folder: Path, indices: range) -> dict[str, RenderedChip]:
    """Write rendered chips and return them by key."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in indices:
        (folder / f"chip-{index:03d}.jpg").write_bytes(chip_jpeg(index, side_px=200))
    return {f"chip-{index:03d}.jpg": drawn_chip(index) for index in indices}


def write_labels(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write labels.csv; what a row leaves out is blank."""
    columns = ["key", "age", "gender", "race", "subject"]
    lines = [",".join(str(row.get(column, "")) for column in columns) for row in rows]
    (folder / "labels.csv").write_text("\n".join([",".join(columns), *lines]) + "\n", encoding="utf-8")


def chip_label(key: str, chip: RenderedChip, **others: Any) -> dict[str, Any]:
    """Return a chip's row of labels.csv."""
    return {"key": key, "age": chip.age_years, "gender": chip.gender, "race": chip.race, **others}


def prepared_set(folder: Path, splits: dict[str, int], *, first_index: int = 0, has_race: bool = True) -> Path:
    """Write a prepared set of rendered crops in two parts.

    Every third row lacks one label, each in turn; every fifth is a fallback. Two rows of no split are rejects. Without
    `has_race`, no row has that label.
    """
    rows: list[dict[str, Any]] = []
    for split, num_rows in splits.items():
        for _ in range(num_rows):
            index = first_index + len(rows)
            chip = drawn_chip(index)
            row: dict[str, Any] = {
                "age": chip.age_years,
                "gender": chip.gender,
                "race": chip.race if has_race else None,
                "split": split,
                "status": "fallback" if index % 5 == 0 else "ok",
                "crop": encode_jpeg(align_chip(chip.image_rgb, SIDE_PX)),
                "template": TEMPLATE,
                "detector": "none",
                "num_faces": 0 if index % 5 == 0 else 1,
            }
            if index % 3 == 0:
                row[("age", "gender", "race")[index // 3 % 3]] = None
            if row["age"] is None:
                row |= {"age_low": 20.0, "age_high": 29.0}
            rows.append(row)
    rows += [{"status": "unreadable", "error": "cut short"}, {"status": "bad_label", "error": "age 130"}]
    for number, row in enumerate(rows):
        key = f"chip-{first_index + number:03d}.jpg"
        row |= {"image_id": f"{folder.name}-{key}", "uri": f"/{folder.name}/{key}", "key": key, "source": "rendered"}
        if row.get("split"):
            row["content_hash"] = hashlib.sha256(key.encode()).hexdigest()
            row["group_id"] = f"subject:{folder.name}-{number}"
    table = pa.Table.from_pylist(rows, schema=CROPS)
    (folder / "crops").mkdir(parents=True)
    half = table.num_rows // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, folder / "crops" / f"part-{number}.parquet")
    PreparedSet(
        format_version=FORMAT_VERSION,
        finished=True,
        settings={
            "source": {"kind": "folder", "name": "rendered"},
            "label_space": UTKFACE.to_json(),
            "vision": {"detector": "none"},
            "crop_side_px": SIDE_PX,
            "template": TEMPLATE,
        },
        split_manifest_sha256=split_digest(split_manifest_text(table)),
        labels_sha256=labels_digest(table),
        splits={"train": 0, "val": 0, "test": 0} | splits,
        counts=dict(Counter(row["status"] for row in rows)),
        uri=str(folder),
    ).write(Storage())
    return folder


@functools.cache
def _random_network() -> MultiTaskNet:
    torch.manual_seed(9)
    model = MultiTaskNet(ModelConfig(backbone="plain_cnn", image_size=SIDE_PX), UTKFACE)
    model.initialise({"age": np.array([20.0, 60.0])})
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # running statistics are the mean of all batches
    with torch.no_grad():
        model.train()(torch.randn(8, 3, SIDE_PX, SIDE_PX))
        for name in ("gender", "race"):
            model.get_parameter(f"heads.{name}.layer.weight").mul_(100.0)
    return model


def checkpoint(
    folder: Path,
    *,
    train_images: list[str] | None = None,
    data: dict[str, Any] | None = None,
    pipeline: Pipeline = DEFAULT_PIPELINE,
) -> Path:
    """Write a checkpoint of random weights that claims to have been trained on images of these content hashes.

    Its batch norms have seen noise, and its heads are steep, so that its predictions differ between images.
    """
    save_checkpoint(
        folder,
        _random_network(),
        Transform(SIDE_PX, SIDE_PX),
        train_images=None if train_images is None else content_codes(train_images),
        data=data,
        pipeline=pipeline,
    )
    return folder


def iou(one: Any, other: Any) -> float:
    """Return the overlap of two boxes, xyxy."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(np.maximum(sides, 0.0)))
    return shared / float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared)

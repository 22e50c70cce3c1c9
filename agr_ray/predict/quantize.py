"""`agr-ray quantize`: a checkpoint -> one whose network computes in int8 on CPUs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from rich.console import Console

from agr_ray.config import PredictConfig, QuantizeJob
from agr_ray.config.pipeline import DEFAULT_PIPELINE, Pipeline
from agr_ray.console import make_console, make_table, print_next
from agr_ray.data.crops import decoded_crops, read_pose, select_crops, usable_statuses
from agr_ray.data.prepared import PreparedSet, open_prepared
from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint import Checkpoint, CheckpointError
from agr_ray.models.checkpoint_files import local_checkpoint, publish_checkpoint
from agr_ray.models.checkpoint_network import given_network, load_train_state, save_checkpoint
from agr_ray.models.int8 import Int8Files
from agr_ray.models.int8_network import quantize as quantize_network
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.network_input import prepare_eval, to_nchw
from agr_ray.models.predictions import Predictions
from agr_ray.models.transform import Transform
from agr_ray.openvino_extra import check_installed
from agr_ray.predict.attributes import AttributePredictor, int8_batch_size
from agr_ray.predict.checkpoint_on_set import check_compatible
from agr_ray.predict.resolve import resolve
from agr_ray.storage import Storage
from agr_ray.storage.scratch import scratch_folder

_NUM_COMPARED: Final = 1000
"""Maximum number of validation images whose predictions are compared."""


def quantize(job: QuantizeJob) -> None:
    """Make an int8 network of a checkpoint, print how far its predictions are from the original's, and publish it.

    Raises:
        ConfigError: OpenVINO or NNCF is not installed, the checkpoint or the set can't be used, the set has too few
            training images, or `out` holds other files.
    """
    check_installed("agr-ray quantize", "openvino", "nncf")
    storage, console = Storage.from_config(job.storage), make_console()
    for uri, key in ((job.checkpoint, "checkpoint"), (job.data, "data")):
        storage.probe(uri, key)
    prepared = open_prepared(storage, job.data, "data")
    out = job.out or f"{job.checkpoint.rstrip('/')}-int8"
    storage.probe(out, "out", write=True)
    if storage.exists(storage.absolute(out)):
        raise ConfigError(f"out {out}: exists; give a new folder or prefix")
    with local_checkpoint(storage, job.checkpoint, "checkpoint") as checkpoint, scratch_folder() as folder:
        if checkpoint.int8 is not None:
            raise ConfigError(f"checkpoint {job.checkpoint}: has an int8 network already; give the one of before")
        model, transform = given_network(checkpoint, job.checkpoint, "checkpoint"), checkpoint.transform
        pipeline = resolve(checkpoint, DEFAULT_PIPELINE, key="checkpoint").pipeline
        check_compatible(transform, prepared, job.checkpoint, "data")
        images = _read(storage, prepared, "train", job.images)
        size = int8_batch_size(transform.image_size)
        if images.num_rows < size:
            raise ConfigError(f"data {job.data}: {images.num_rows} training images; at least {size} are needed")
        images = images.slice(0, images.num_rows // size * size)  # whole batches
        console.print(f"measuring the ranges of int8 on {images.num_rows:,} training images")
        crops = decoded_crops(images, prepared.crop_side_px)
        files = quantize_network(model, _batches(transform, crops, size))
        compared = _read(storage, prepared, "val", _NUM_COMPARED)
        if compared.num_rows:
            _compare(model, transform, pipeline.predict, files, compared, prepared.crop_side_px, console)
        _save(checkpoint, model, pipeline, files, Path(folder))
        try:
            publish_checkpoint(storage, Path(folder), storage.absolute(out), replace=False)
        except FileExistsError as error:
            raise ConfigError(f"out {out}: {error}; give a new folder or prefix") from None
    console.print(f"{out}: the checkpoint with an int8 network; no calibration yet")
    print_next(
        console, "calibrate it", "evaluate", "--checkpoint", out, "--data", job.data, "--split", "val", "--calibrate"
    )


def _read(storage: Storage, prepared: PreparedSet, split: str, num_images: int) -> pa.Table:
    """Return crop rows of a split; the same ones each time."""
    tables, num_rows = [], 0
    for uri in sorted(prepared.parts(storage)):
        rows = storage.read_table(uri, columns=["crop", "yaw", "pitch", "roll", "status", "split"])
        tables.append(select_crops(rows, split, usable_statuses(use_fallback=True)))
        num_rows += tables[-1].num_rows
        if num_rows >= num_images:
            break
    return pa.concat_tables(tables).slice(0, num_images)


def _batches(transform: Transform, crops_u8: NDArray[np.uint8], batch_size: int) -> Iterator[NDArray[np.float32]]:
    """Yield the network's input in batches."""
    for start in range(0, len(crops_u8), batch_size):
        images = to_nchw(crops_u8[start : start + batch_size], torch.device("cpu"))
        yield prepare_eval(images, transform).contiguous().numpy()


def _compare(
    model: MultiTaskNet,
    transform: Transform,
    before: PredictConfig,
    files: Int8Files,
    rows: pa.Table,
    side_px: int,
    console: Console,
) -> None:
    """Print how far the predictions are from the original's, and the speed of both."""
    torch.set_num_threads(1)  # as each worker of scoring
    crops, pose = decoded_crops(rows, side_px), read_pose(rows)
    predicted: dict[str, Predictions] = {}
    speeds: dict[str, float] = {}
    for precision in (before.precision, "int8"):
        config = before.model_copy(update={"precision": precision})
        predictor = AttributePredictor(model, transform, config, None, files)
        predictor.predict(crops[:1])  # compiles kernels
        started = time.perf_counter()
        predicted[predictor.precision] = predictor.predict(crops, pose)
        speeds[predictor.precision] = len(crops) / (time.perf_counter() - started)
    first = next(iter(predicted))
    console.print(f"int8 against {first} on {len(crops):,} validation images:")
    table = make_table("", "mean difference", "largest", "same class")
    for row in difference_rows(predicted[first], predicted["int8"]):
        table.add_row(*row)
    console.print(table)
    times = speeds["int8"] / speeds[first]
    console.print(
        f"{speeds['int8']:,.0f} instead of {speeds[first]:,.0f} crops/s on one CPU: {times:.1f} times as fast"
    )


def difference_rows(before: Predictions, after: Predictions) -> list[tuple[str, str, str, str]]:
    """Return, for each task, how far two networks' predictions for the same faces are apart.

    The texts are: the quantity, the mean and the largest absolute difference, and the share with the same class.
    """
    rows = []
    for task in before:
        difference = np.abs(after[task] - before[task])
        mean, largest = f"{difference.mean():.4f}", f"{difference.max():.3f}"
        match task:
            case "age":
                rows.append(("age, years", mean, largest, ""))
            case "gender":
                same = np.mean((after[task] > 0.5) == (before[task] > 0.5))
                rows.append(("gender, probability", mean, largest, f"{same:.1%}"))
            case "race":
                same = np.mean(after[task].argmax(axis=1) == before[task].argmax(axis=1))
                rows.append(("race, probability", mean, largest, f"{same:.1%}"))
    return rows


def _save(checkpoint: Checkpoint, model: MultiTaskNet, pipeline: Pipeline, files: Int8Files, folder: Path) -> None:
    """Write the new checkpoint: the same with other [predict] settings, without calibration, optimiser and errors."""
    predict = PredictConfig(**pipeline.predict.model_dump() | {"precision": "int8"})
    meta, train_images = checkpoint.meta, None
    with contextlib.suppress(CheckpointError):
        train_images = load_train_state(checkpoint.directory).get("train_images")
    save_checkpoint(
        folder,
        model,
        checkpoint.transform,
        pipeline=Pipeline(vision=pipeline.vision, predict=predict),
        train_images=train_images,
        data=meta["data"],
        config=meta["config"],
        git_commit=meta["git_commit"],
        created=meta["created"],
        int8_files=files,
    )

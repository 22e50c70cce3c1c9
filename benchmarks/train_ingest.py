"""Compare training with the same steps without a data pipeline, and with a loop that a user would write.

    python benchmarks/train_ingest.py --data PREPARED [--backbone resnet18] [--side 88] [--batch-size 64] [--epochs 3]
    python benchmarks/train_ingest.py --data PREPARED --backbone resnet50 --side 224 --batch-size 256 \
        --steps 200 --use-gpu

Measures samples per second with the same network, loss, optimiser, batch, arithmetic (bfloat16 if the device supports
it) and strength of augmentation, on all CPUs or one GPU:

(a) the training loop on one batch that is already on the device: the device's maximum.
(b) `jobs/train.py` on the prepared set, one worker, on an embedded local cluster. The first epoch, which streams and
    decodes, is reported separately from later ones, which read from memory: the set must fit `train.cache_mib`.
(c) the loop that a user would write: torch's DataLoader with a persistent worker for each CPU, JPEGs in memory, PIL and
    torchvision's transforms, pinned memory, no waiting for the device. The first epoch is a warm-up.

They run one after the other, each in its own processes, in the order (a) (c) (b) (c) (a), because the machine's speed
may drift; ratios use the means. Only steps are timed: no start-up, validation or checkpoint. Ray starts workers at a
low priority; here they have that of (a) and (c). Fails if (b) after its first epoch is slower than 0.9 of (a), or not
faster than (c).
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from agr_ray.config import AugmentConfig, ClusterConfig, ModelConfig, PredictConfig, TrainConfig, TrainJob
from agr_ray.console import make_console
from agr_ray.data.crops import decoded_crops, read_labels, select_crops, usable_statuses
from agr_ray.data.prepared import open_prepared
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import Labels
from agr_ray.learn.batches import Batch
from agr_ray.learn.context import LocalContext
from agr_ray.learn.loop import train as train_loop
from agr_ray.learn.losses import label_counts, multi_task_loss
from agr_ray.learn.optimise import build_optimizer
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.precision import autocast, compute_dtype
from agr_ray.models.transform import Transform
from agr_ray.runtime.ray_compat import machine_cpus
from agr_ray.runtime.train import train
from agr_ray.schema import LABEL_COLUMNS
from agr_ray.storage import Storage
from agr_ray.vision.align import DEFAULT_MARGIN

T = TypeVar("T")

MIN_SHARE: Final = 0.9
LABELS: Final = ("age", "gender", "race")
TIMED_EPOCHS: Final = 2
"""Epochs of (c), after the warm-up."""
AUGMENT: Final = AugmentConfig(scale=0.1, brightness=0.3, contrast=0.3, saturation=0.3)


def main() -> None:
    """Measure all three and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of a prepared set (jobs/prepare.py)")
    parser.add_argument("--backbone", default="resnet18", help="backbone of the network (resnet18)")
    parser.add_argument("--side", type=int, default=88, help="side of the network's input, pixels (88)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (64)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of (b), at least two (3)")
    parser.add_argument("--steps", type=int, default=40, help="steps in an epoch of (a) and (c) (40)")
    parser.add_argument("--use-gpu", action="store_true", help="one GPU; else all CPUs")
    arguments = parser.parse_args()
    console = make_console()
    with tempfile.TemporaryDirectory(prefix="ingest-") as out:
        job = TrainJob(
            cluster=ClusterConfig(address="local"),
            model=ModelConfig(backbone=arguments.backbone, image_size=arguments.side),
            augment=AUGMENT,
            predict=PredictConfig(precision="auto"),
            train=TrainConfig(
                data=str(Path(arguments.data).resolve()),
                out=out,
                name="ingest",
                epochs=arguments.epochs,
                batch_size=arguments.batch_size,
                precision="auto",
                early_stopping_patience=0,
                use_gpu=arguments.use_gpu,
            ),
        )
        device_speeds = [in_new_process(one_batch, job, arguments.steps).samples_per_s]
        user_speeds = [in_new_process(user_loop, job, arguments.steps).samples_per_s]
        ours = in_new_process(our_path, job)
        user_speeds.append(in_new_process(user_loop, job, arguments.steps).samples_per_s)
        device_speeds.append(in_new_process(one_batch, job, arguments.steps).samples_per_s)
    device_speed, user_speed = float(np.mean(device_speeds)), float(np.mean(user_speeds))
    table = Table("", "samples/s", "of (a)", "of (c)", title=title(job), title_justify="left")
    for label, speed in (
        ("(a) one batch on the device, before", device_speeds[0]),
        ("(a) after", device_speeds[1]),
        ("(b) jobs/train.py, first epoch", ours.first),
        ("(b) jobs/train.py, later epochs", ours.later),
        ("(c) DataLoader, PIL, torchvision, before", user_speeds[0]),
        ("(c) after", user_speeds[1]),
    ):
        table.add_row(label, f"{speed:,.1f}", f"{speed / device_speed:.1%}", f"{speed / user_speed:.1%}")
    console.print(table)
    console.print(f"(b) by epoch: {', '.join(f'{speed:,.1f}' for speed in ours.by_epoch)} samples/s")
    console.print(f"(b) waits for data {ours.wait_share:.2%} of the time after the first epoch")
    if ours.later < MIN_SHARE * device_speed or ours.later <= user_speed:
        raise SystemExit(f"(b) after its first epoch must make {MIN_SHARE:.0%} of (a), and more than (c)")


def in_new_process(work: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a new process, so that parts share neither memory nor threads."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def title(job: TrainJob) -> str:
    """Return the title: network, input, batch, arithmetic and device."""
    device = device_of(job)
    name = torch.cuda.get_device_name() if job.train.use_gpu else f"{machine_cpus()} CPUs"
    arithmetic = str(compute_dtype(device, job.train.precision)).removeprefix("torch.")
    return f"{job.model.backbone} at {job.model.image_size} px, batches of {job.train.batch_size}, {arithmetic}, {name}"


# What (a) and (c) share


@dataclass(frozen=True)
class Speed:
    """Result of (a) or (c)."""

    samples_per_s: float
    wait_share: float
    """Share of time spent waiting for data."""


@dataclass(frozen=True)
class Setup:
    """A prepared set's training rows, and the network and settings."""

    jpegs: list[bytes]
    labels: Labels
    batch: Batch
    """The first rows, decoded."""
    transform: Transform
    device: torch.device


def device_of(job: TrainJob) -> torch.device:
    """Return the device on which the job trains."""
    return torch.device("cuda" if job.train.use_gpu else "cpu")


def set_up(job: TrainJob) -> Setup:
    """Read the prepared set, and compute with as many threads as one worker of `jobs/train.py`."""
    torch.set_num_threads(machine_cpus())
    storage = Storage()
    prepared = open_prepared(storage, job.train.data, "--data")
    columns = ["crop", "split", "status", *LABEL_COLUMNS]
    rows = storage.read_table(prepared.crops(storage), columns=columns)
    rows = select_crops(rows, "train", usable_statuses(use_fallback=True))
    first = rows.slice(0, job.train.batch_size)
    batch = {"crop": decoded_crops(first, prepared.crop_side_px), **read_labels(first, prepared.label_space).arrays}
    transform = Transform(job.model.image_size, prepared.crop_side_px, DEFAULT_MARGIN)
    return Setup(rows["crop"].to_pylist(), read_labels(rows, prepared.label_space), batch, transform, device_of(job))


# (a)


class SameBatch(LocalContext):
    """Repeats one batch."""

    num_steps: int

    def train_batches(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:  # noqa: ARG002  # the protocol's
        """Yield the batch once per step."""
        for _ in range(self.num_steps):
            yield self.train


def one_batch(job: TrainJob, num_steps: int) -> Speed:
    """Return the speed of (a), in its second epoch."""
    setup = set_up(job)
    nothing = {name: values[:0] for name, values in setup.batch.items()}
    batch = {**setup.batch, "crop": torch.from_numpy(setup.batch["crop"]).to(setup.device)}
    job = job.model_copy(update={"train": job.train.model_copy(update={"epochs": 2})})
    context = SameBatch(batch, nothing, job.train.batch_size, setup.device)
    context.num_steps = num_steps
    baseline = Baseline.fit(setup.labels)
    num_rows = num_steps * job.train.batch_size
    rows = train_loop(context, MultiTaskNet(job.model, setup.labels.space), setup.transform, job, baseline, num_rows)
    return Speed(rows[-1]["samples_per_s"], rows[-1]["data_wait_share"])


# (b)


@dataclass(frozen=True)
class OurPath:
    """Results of (b)."""

    by_epoch: list[float]
    """Samples per second of each epoch."""
    later: float
    """Samples per second of all epochs except the first."""
    wait_share: float
    """Share of time spent waiting for data in the same epochs."""

    @property
    def first(self) -> float:
        """Return the first epoch's samples per second."""
        return self.by_epoch[0]


def our_path(job: TrainJob) -> OurPath:
    """Train, and read the history."""
    os.environ.update(RAY_worker_niceness="0")
    train(job)
    history = Storage().read_table(f"{job.train.out}/{job.train.name}/history.parquet").to_pylist()
    later = history[1:]
    seconds = np.array([row["num_train_rows"] / row["samples_per_s"] for row in later])
    return OurPath(
        [row["samples_per_s"] for row in history],
        float(sum(row["num_train_rows"] for row in later) / seconds.sum()),
        float(np.average([row["data_wait_share"] for row in later], weights=seconds)),
    )


# (c)


class Crops(Dataset[tuple[Any, ...]]):
    """JPEG crops, decoded and changed one by one."""

    def __init__(self, setup: Setup, config: AugmentConfig) -> None:
        self.setup = setup
        transform = setup.transform
        side = transform.image_size
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(config.flip_probability),
                transforms.RandomAffine(
                    config.rotation_degrees,
                    (config.shift, config.shift),
                    (1 - config.scale, 1 + config.scale),
                    interpolation=transforms.InterpolationMode.BILINEAR,
                ),
                transforms.CenterCrop(transform.crop_side_px),
                *([transforms.Resize(side)] if side != transform.crop_side_px else []),
                transforms.ColorJitter(config.brightness, config.contrast, config.saturation),
                transforms.ToTensor(),
                transforms.Normalize(transform.mean, transform.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.setup.jpegs)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image = Image.open(io.BytesIO(self.setup.jpegs[index])).convert("RGB")
        return self.transform(image), *(getattr(self.setup.labels, name)[index] for name in LABELS)


def user_loop(job: TrainJob, num_steps: int) -> Speed:
    """Return the speed of (c), in the epochs after the first."""
    setup = set_up(job)
    device = setup.device
    crops = Crops(setup, job.augment)
    chosen = np.random.default_rng(0).permutation(len(crops))[: num_steps * job.train.batch_size]
    loader = DataLoader(
        Subset(crops, chosen.tolist()),
        job.train.batch_size,
        shuffle=True,
        num_workers=machine_cpus(),
        persistent_workers=True,
        pin_memory=job.train.use_gpu,
        drop_last=True,
    )
    model = MultiTaskNet(job.model, setup.labels.space).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if job.train.compile:
        model.compile()
    heads = model.heads_by_task
    optimizer = build_optimizer(model, job.train)
    started, num_samples, wait_s = 0.0, 0, 0.0
    for epoch in range(1 + TIMED_EPOCHS):
        if epoch == 1:
            started, num_samples, wait_s = now(device), 0, 0.0
        total_loss = torch.zeros((), device=device)
        asked = time.perf_counter()
        for images, *labels in loader:
            wait_s += time.perf_counter() - asked
            images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            targets = {name: values.to(device, non_blocking=True) for name, values in zip(LABELS, labels, strict=True)}
            with autocast(device, job.train.precision):
                outputs = model(images)
            loss, _ = multi_task_loss(heads, outputs, targets, job.loss, label_counts(heads, targets))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
            optimizer.step()
            total_loss += loss.detach()
            num_samples += len(images)
            asked = time.perf_counter()
        float(total_loss)
    seconds = now(device) - started
    return Speed(num_samples / seconds, wait_s / seconds)


def now(device: torch.device) -> float:
    """Return the time, of a clock in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()

"""The measurements of gpu.py: `python benchmarks/gpu_measures.py NAME FOLDER DEVICE SIZE` writes FOLDER/NAME.json.

prepare             renders faces, and writes a prepared set, photographs, a network of random weights, and what it
                    predicts on the CPU in float32
train_one_batch     the training loop on one batch that is already on the device: the most that it can reach
train_pipeline      `runtime.train` on the prepared set: Ray Train with one worker, and the crops in memory after the
                    first epoch, which streams and decodes them and is reported apart
train_reference     the loop of torchvision's references: DataLoader with a worker for each CPU, PIL, transforms and
                    autocast; but with our network, loss and optimiser, channels last, no waiting for the device
..._compiled        the same with torch.compile
predict_...         crops per second of `AttributePredictor`, from arrays to predictions, and the largest differences
                    from the CPU's; fails above `LIMITS`. float16 and torch.compile are not options of it: they are
                    added here
decode              photographs per second that all cores decode
score               photographs per second of `runtime.score`: all cores decode, detect and align, the device predicts

All use the same network at the same side. Training computes in bfloat16 (on a CPU only if it has instructions for it).
The data that training waits for is counted where the loop waits, so a GPU may still have work meanwhile. Peak memory is
sampled: of the whole GPU, and of this process and its descendants.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from memory import descendants, pss_mib

from agr_ray.config import (
    AugmentConfig,
    ClusterConfig,
    ModelConfig,
    PredictConfig,
    ScoreConfig,
    ScoreJob,
    TrainConfig,
    TrainJob,
    VisionConfig,
)
from agr_ray.data.prepared import FORMAT_VERSION, PreparedSet
from agr_ray.data.rendered import render_chip, render_photograph
from agr_ray.labels import UTKFACE
from agr_ray.schema import CROPS, TEMPLATE
from agr_ray.storage import Storage
from agr_ray.vision.align import stored_side_px
from agr_ray.vision.decode import decode_crop, decode_image, encode_jpeg

Result = dict[str, Any]

LIMITS: Final[Mapping[str, tuple[float, float]]] = {
    "float32": (1.0, 0.05),
    "float16": (1.0, 0.05),
    "bfloat16": (5.0, 0.25),
}
"""Largest differences of an age, years, and of a probability, from the CPU's in float32. They are large because random
weights make rounding matter: the ages have a standard deviation of 15 years, and a wrong network misses them by tens.
For float32, a GPU may compute convolutions in TF32, which rounds like float16."""
AUGMENT: Final = AugmentConfig(scale=0.1, brightness=0.3, contrast=0.3, saturation=0.3)
PHOTOGRAPH_PX: Final = (1280, 960)
SAMPLE_S: Final = 1.0
ROWS_PER_PART: Final = 64


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    backbone: str
    side_px: int
    batch_size: int
    num_steps: int
    """Steps of a training epoch."""
    num_epochs: int
    """Of the pipeline; the first is not timed."""
    num_faces: int
    """Faces that differ; the prepared set repeats them."""
    num_compared: int
    """Faces that the CPU predicts, too."""
    num_photographs: int
    num_copies: int
    """Of each photograph, to score."""
    min_s: float
    """Least duration of the measurements that only repeat something."""

    @property
    def model(self) -> ModelConfig:
        """Return the network."""
        return ModelConfig(backbone=self.backbone, image_size=self.side_px, age_head="linear")


SIZES: Final = {
    "full": Size("resnet50", 224, 256, 80, 4, 1024, 256, 64, 80, 5.0),
    "smoke": Size("plain_cnn", 32, 8, 4, 2, 32, 32, 4, 3, 0.2),
}


@dataclass(frozen=True)
class Setting:
    """Where and how much to measure."""

    folder: Path
    """Of all measurements; `prepare` fills it."""
    device: str
    size: Size

    @property
    def use_gpu(self) -> bool:
        """Return whether the device is a GPU."""
        return self.device == "cuda"


def main() -> None:
    """Measure, write the result, and fail if something is wrong with it."""
    name, folder, device, size = sys.argv[1:]
    with peak_memory(device) as peak:
        result = MEASURES[name](Setting(Path(folder), device, SIZES[size]))
    Path(folder, f"{name}.json").write_text(json.dumps(result | peak, allow_nan=False))
    if result.get("wrong"):
        sys.exit(result["wrong"])


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """Yield a dictionary that holds the peaks in MiB once the block has ended."""
    import torch

    peak: dict[str, float] = {"peak_host_mib": 0.0}
    done = threading.Event()

    def sample() -> None:
        peak["peak_host_mib"] = max(peak["peak_host_mib"], sum(map(pss_mib, descendants(os.getpid()))))
        if device == "cuda":
            free, total = torch.cuda.mem_get_info()  # of the GPU, so Ray's workers are included
            peak["peak_gpu_mib"] = max(peak.get("peak_gpu_mib", 0.0), (total - free) / 2**20)

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()
    sample()


def num_cpus() -> int:
    """Return the CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


# Prepare


def prepare(setting: Setting) -> Result:
    """Fill the folder, and describe the machine."""
    import torch
    import torchvision
    from random_network import save_random_network

    from agr_ray.device import cpu_name
    from agr_ray.models.transform import Transform
    from agr_ray.predict.attributes import AttributePredictor

    if setting.use_gpu and not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} finds no GPU")
    size, folder = setting.size, setting.folder
    (folder / "photographs").mkdir()
    with multiprocessing.get_context("spawn").Pool(num_cpus()) as pool:
        chips = pool.map(functools.partial(chip_row, stored_side_px(size.side_px)), range(size.num_faces))
        draw = functools.partial(draw_photograph, folder / "photographs", size.num_copies)
        pool.map(draw, range(size.num_photographs))
    write_prepared_set(folder / "prepared", chips, size)
    crops = np.stack([decode_crop(chip["crop"]) for chip in chips])
    transform = Transform(size.side_px, size.side_px)
    save_random_network(size.model, crops[: size.num_compared], transform, folder / "checkpoint", residual_scale=0.2)
    on_cpu = AttributePredictor.load(folder / "checkpoint", PredictConfig(precision="float32"))
    np.save(folder / "crops.npy", crops)
    np.savez(folder / "expected.npz", **on_cpu.predict(crops[: size.num_compared]))
    machine = {
        "gpu": torch.cuda.get_device_name() if setting.use_gpu else "",
        "cpu": cpu_name(),
        "cpus": num_cpus(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": (torch.version.cuda or "") if setting.use_gpu else "",
    }
    return {"machine": machine, "size": asdict(size)}


def chip_row(side_px: int, index: int) -> Result:
    """Render a face as columns of schema.CROPS."""
    chip = render_chip(0, index, side_px)
    labels = {"age": chip.age_years, "gender": chip.gender, "race": chip.race}
    return {**labels, "crop": encode_jpeg(chip.image_rgb)}


def draw_photograph(folder: Path, num_copies: int, index: int) -> None:
    """Render a photograph of one to four faces, under several names."""
    image = render_photograph(0, index, *PHOTOGRAPH_PX, num_faces=1 + index % 4).image_rgb
    first = folder / f"{index:04d}-0000.jpg"
    first.write_bytes(encode_jpeg(image))
    for copy in range(1, num_copies):
        os.link(first, folder / f"{index:04d}-{copy:04d}.jpg")


def write_prepared_set(folder: Path, chips: list[Result], size: Size) -> None:
    """Write a set of whole batches, so that no smaller one is compiled for, and one batch of validation."""
    splits = {"train": size.batch_size * size.num_steps, "val": size.batch_size, "test": 0}
    (folder / "crops").mkdir(parents=True)
    start = 0
    for split, num in splits.items():
        for first in range(start, start + num, size.batch_size):
            numbers = range(first, first + size.batch_size)
            rows = [crop_row(number, split) | chips[number % len(chips)] for number in numbers]
            pq.write_table(pa.Table.from_pylist(rows, CROPS), folder / "crops" / f"part-{first:08d}.parquet")
        start += num
    settings = {
        "source": {"kind": "folder", "name": "rendered"},
        "label_space": UTKFACE.to_json(),
        "vision": {"detector": "none"},
        "crop_side_px": size.side_px,
        "template": TEMPLATE,
    }
    digest = hashlib.sha256(str(start).encode()).hexdigest()
    PreparedSet(
        format_version=FORMAT_VERSION,
        finished=True,
        settings=settings,
        split_manifest_sha256=digest,
        labels_sha256=digest,
        splits=splits,
        counts={"ok": start},
        uri=str(folder),
    ).write(Storage())


def crop_row(number: int, split: str) -> Result:
    """Return the columns of schema.CROPS that name an image."""
    key = f"{number:08d}.jpg"
    content = hashlib.sha256(key.encode()).hexdigest()
    names = {"image_id": key, "uri": f"/rendered/{key}", "key": key, "source": "folder", "content_hash": content}
    return {**names, "group_id": f"sha256:{content}", "split": split, "status": "ok"}


# Training


def train_job(setting: Setting, *, is_compiled: bool) -> TrainJob:
    """Return what all three train."""
    size = setting.size
    return TrainJob(
        cluster=ClusterConfig(address="local", include_dashboard=False, object_store_mib=2048),
        model=size.model,
        augment=AUGMENT,
        train=TrainConfig(
            data=str(setting.folder / "prepared"),
            out=str(setting.folder / "runs"),
            name=f"compiled-{is_compiled}",
            epochs=size.num_epochs,
            batch_size=size.batch_size,
            precision="bfloat16" if setting.use_gpu else "auto",
            compile=is_compiled,
            early_stopping_patience=0,
            use_gpu=setting.use_gpu,
            cache_mib=32768,
        ),
    )


def train_one_batch(setting: Setting, *, is_compiled: bool) -> Result:
    """Measure the training loop alone."""
    from train_ingest import one_batch

    speed = one_batch(train_job(setting, is_compiled=is_compiled), setting.size.num_steps)
    return {"images_per_s": speed.samples_per_s, "wait_share": speed.wait_share}


def train_pipeline(setting: Setting, *, is_compiled: bool) -> Result:
    """Measure `runtime.train`."""
    from train_ingest import our_path

    found = our_path(train_job(setting, is_compiled=is_compiled))
    return {
        "images_per_s": found.later,
        "wait_share": found.wait_share,
        "first_epoch_images_per_s": found.first,
        "images_per_s_by_epoch": found.by_epoch,
    }


def train_reference(setting: Setting, *, is_compiled: bool) -> Result:
    """Measure the loop of torchvision's references."""
    from train_ingest import user_loop

    speed = user_loop(train_job(setting, is_compiled=is_compiled), max(setting.size.num_steps // 2, 1))
    return {"images_per_s": speed.samples_per_s, "wait_share": speed.wait_share}


# Scoring


def predict(setting: Setting, *, precision: str, is_compiled: bool = False) -> Result:
    """Measure the predictor, and compare its predictions with the CPU's."""
    from agr_ray.predict.attributes import AttributePredictor

    config = PredictConfig.model_construct(precision=precision)  # not validated, because it has no float16
    predictor = AttributePredictor.load(setting.folder / "checkpoint", config, device=setting.device)
    if is_compiled:
        predictor._model.compile()
    crops = np.load(setting.folder / "crops.npy")
    expected = np.load(setting.folder / "expected.npz")
    predictions = predictor.predict(crops)  # takes longer, because it is the first
    started, num_rounds = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < setting.size.min_s or not num_rounds:
        predictor.predict(crops)
        num_rounds += 1
    largest = {
        task: float(np.abs(predictions[task][: len(values)] - values).max()) for task, values in expected.items()
    }
    age, probability = largest["age"], np.max([largest["gender"], largest["race"]])
    limits = LIMITS[precision]
    is_right = age <= limits[0] and probability <= limits[1]  # not with NaN
    told = f"age differs from the CPU's by up to {age:.3f} years, a probability by {probability:.4f}; limits {limits}"
    return {
        "images_per_s": num_rounds * len(crops) / seconds,
        "largest_difference": {name: value if np.isfinite(value) else None for name, value in largest.items()},
        "wrong": "" if is_right else told,
    }


def decode(setting: Setting) -> Result:
    """Decode all photographs on all cores, several times."""
    paths = sorted((setting.folder / "photographs").iterdir())
    with multiprocessing.get_context("spawn").Pool(num_cpus()) as pool:
        pool.map(decode_file, paths, chunksize=1)  # imports, too
        started, num_rounds = time.perf_counter(), 0
        while (seconds := time.perf_counter() - started) < setting.size.min_s or not num_rounds:
            pool.map(decode_file, paths, chunksize=4)
            num_rounds += 1
    return {"images_per_s": num_rounds * len(paths) / seconds}


def decode_file(path: Path) -> None:
    """Decode a photograph as scoring does."""
    decode_image(path.read_bytes(), max_side_px=VisionConfig().max_side_px)


def score(setting: Setting) -> Result:
    """Score all photographs."""
    from agr_ray.runtime.score import score as score_photographs

    os.environ.update(RAY_worker_niceness="0")
    out = setting.folder / "scored"
    job = ScoreJob(
        cluster=ClusterConfig(address="local", include_dashboard=False),
        predict=PredictConfig(precision="bfloat16" if setting.use_gpu else "auto"),
        score=ScoreConfig(
            checkpoint=str(setting.folder / "checkpoint"),
            input=str(setting.folder / "photographs"),
            out=str(out),
            use_gpu=setting.use_gpu,
            rows_per_file=ROWS_PER_PART,
        ),
    )
    record = score_photographs(job)
    ended = datetime.fromisoformat(record["published_at"]).timestamp() - record["timings"]["publish_s"]
    begun = pyarrow.dataset.dataset(out / "images", format="parquet").to_table(columns=["scored_at"])["scored_at"]
    # Without the first quarter, during which the workers start.
    times = sorted(each.timestamp() for each in begun.to_pylist())
    first = len(times) // 4
    return {
        "images_per_s": (len(times) - first) / (ended - times[first]),
        "num_images": record["num_images"],
        "num_faces": record["num_faces"],
        "num_workers": record["timings"]["num_workers"],
        "worker_s": record["timings"]["worker_s"],
    }


_TRAINING: Final = {
    "train_one_batch": train_one_batch,
    "train_pipeline": train_pipeline,
    "train_reference": train_reference,
}
MEASURES: Final[Mapping[str, Callable[[Setting], Result]]] = {
    "prepare": prepare,
    **{name: functools.partial(measure, is_compiled=False) for name, measure in _TRAINING.items()},
    **{f"{name}_compiled": functools.partial(measure, is_compiled=True) for name, measure in _TRAINING.items()},
    **{f"predict_{kind}": functools.partial(predict, precision=kind) for kind in LIMITS},
    **{
        f"predict_{kind}_compiled": functools.partial(predict, precision=kind, is_compiled=True)
        for kind in ("bfloat16", "float16")
    },
    "decode": decode,
    "score": score,
}


if __name__ == "__main__":
    main()

"""Draw synthetic faces with known labels into a folder: chips to train on, photographs to score.

OUT/chips/*.jpg, labels.parquet         one face each; `agr-ray prepare --source.uri OUT/chips` reads it
OUT/photographs/*.jpg, faces.parquet    one to six faces each, with their true boxes
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any, Final

import cv2
import numpy as np
import pyarrow as pa
import ray
from ray.data import TaskPoolStrategy

from agr_ray.config import RenderJob
from agr_ray.console import make_console
from agr_ray.data.rendered import chip_labels_table, photograph_labels_table, render_chip, render_photograph
from agr_ray.errors import ConfigError
from agr_ray.progress_bar import progress
from agr_ray.runtime.cluster import cluster, configure_ray_data, worker_count
from agr_ray.storage import Storage
from agr_ray.storage.lock import run_lock
from agr_ray.vision.decode import encode_jpeg

MAX_FACES: Final = 6
SIZES_PX: Final = ((960, 640), (1280, 960), (800, 1000), (1600, 1200))
BATCH: Final = 20
LOCK: Final = "lock.json"


def render(job: RenderJob) -> str:
    """Draw the faces, unless all are there already, and return the folder.

    Raises:
        ConfigError: the folder holds faces of another seed or number, or other files.
        StorageUnavailable: it can't be written.
    """
    console = make_console()
    config, storage = job.render, Storage.from_config(job.storage)
    out = storage.absolute(config.out).rstrip("/")
    marker, settings = (
        storage.join(out, "render.json"),
        config.model_dump(mode="json", exclude={"out", "lock_expiry_s"}),
    )
    if storage.exists(marker):
        record = json.loads(storage.read(marker))
        if record.get("settings") != settings:
            raise ConfigError(f"render.out {out}: holds faces drawn with other settings; choose another folder")
        if record["finished"]:
            console.print(f"{out} already exists")
            return out
    elif storage.exists(out) and any(info.key != LOCK for info in storage.list(out)):
        raise ConfigError(f"render.out {out}: exists and holds no rendered faces; choose another folder")
    with (
        run_lock(
            storage, storage.join(out, LOCK), f"rendering {out}", expiry_s=config.lock_expiry_s, console=console
        ) as lock,
        cluster(job.cluster),
    ):
        _mark(storage, marker, settings, finished=False)
        for folder, num, draw, table_name in (
            ("chips", config.num_chips, partial(_draw_chips, seed=config.seed), "labels.parquet"),
            ("photographs", config.num_photographs, partial(_draw_photographs, seed=config.seed), "faces.parquet"),
        ):
            if not num:
                continue
            target = storage.join(out, folder)
            configure_ray_data()
            tables = (
                ray.data.range(num, override_num_blocks=-(-num // BATCH))
                .map_batches(
                    partial(draw, storage=storage, folder=target),
                    batch_format="pyarrow",
                    batch_size=None,
                    compute=TaskPoolStrategy(size=worker_count(None)),
                )
                .iter_batches(batch_size=None, batch_format="pyarrow")
            )
            drawn, keys = [], set()
            with progress(console, f"drawing {folder}", num) as update:
                for table in tables:
                    assert isinstance(table, pa.Table)
                    lock.check()
                    drawn.append(table)
                    keys.update(table["key"].to_pylist())  # a photograph has a row for each face
                    update(len(keys), "")
            lock.check()
            storage.write_table(pa.concat_tables(drawn).sort_by("key"), storage.join(target, table_name))
        lock.check()
        _mark(storage, marker, settings, finished=True)
    console.print(f"{config.num_chips:,} chips and {config.num_photographs:,} photographs in {out}")
    return out


def _mark(storage: Storage, marker: str, settings: dict[str, Any], *, finished: bool) -> None:
    storage.write(marker, json.dumps({"settings": settings, "finished": finished}, indent=2).encode())


def _draw_chips(batch: pa.Table, seed: int, storage: Storage, folder: str) -> pa.Table:
    cv2.setNumThreads(1)
    indices = batch["id"].to_pylist()
    chips = [render_chip(seed, index) for index in indices]
    keys = [f"chip-{index:06d}.jpg" for index in indices]
    for key, chip in zip(keys, chips, strict=True):
        storage.write(storage.join(folder, key), encode_jpeg(chip.image_rgb))
    return chip_labels_table(keys, chips)


def _draw_photographs(batch: pa.Table, seed: int, storage: Storage, folder: str) -> pa.Table:
    cv2.setNumThreads(1)
    indices = batch["id"].to_pylist()
    photographs = []
    for index in indices:
        rng = np.random.default_rng([seed, index])
        width_px, height_px = SIZES_PX[rng.integers(len(SIZES_PX))]
        photographs.append(render_photograph(seed, index, width_px, height_px, int(rng.integers(1, MAX_FACES + 1))))
    keys = [f"photograph-{index:06d}.jpg" for index in indices]
    for key, photograph in zip(keys, photographs, strict=True):
        storage.write(storage.join(folder, key), encode_jpeg(photograph.image_rgb))
    return photograph_labels_table(keys, photographs)

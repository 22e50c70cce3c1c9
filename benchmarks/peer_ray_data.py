"""Peer (b): Ray Data as its guide to images teaches it: `read_images -> map_batches -> write_parquet`.

    python benchmarks/peer_ray_data.py PHOTOGRAPHS CHECKPOINT OUT WORKERS [--tolerant]

`read_images` raises on the first file that does not decode. With --tolerant, the two settings that `ray.data` documents
for faults are on: `max_errored_blocks` drops the blocks in which a function raises, and `CheckpointConfig` records the
rows that are written, which the next run skips.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pyarrow as pa
import ray
from facenet_scorer import PHOTOGRAPH, CheckpointScorer
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig


class FaceClassifier:
    """Loads the models once for each actor."""

    def __init__(self, checkpoint: str) -> None:
        self._score = CheckpointScorer(checkpoint)

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """Return a row for each photograph of a batch."""
        rows = []
        for path, image in zip(batch["path"], batch["image"], strict=True):
            rows.append({"path": path, "faces": self._score(image), "scored_at": time.time()})
        return pa.Table.from_pylist(rows, PHOTOGRAPH)


def main(photographs: str, checkpoint: str, out: str, workers: str, *options: str) -> None:
    """Score the photographs of a folder."""
    # As many logical CPUs as `agr-ray score` declares: actors that hold all of them would leave none to read with.
    ray.init(address="local", num_cpus=max(8, os.cpu_count() or 1), include_dashboard=False)
    if "--tolerant" in options:
        context = DataContext.get_current()
        context.max_errored_blocks = -1
        context.checkpoint_config = CheckpointConfig(id_column="path", checkpoint_path=f"{out}-checkpoint")
    dataset = ray.data.read_images(photographs, mode="RGB", include_paths=True)
    dataset = dataset.map_batches(
        FaceClassifier,
        fn_constructor_args=(checkpoint,),
        compute=ActorPoolStrategy(size=int(workers)),
        batch_size=16,
    )
    dataset.write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

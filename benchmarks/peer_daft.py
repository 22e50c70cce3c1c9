"""Peer (c): Daft as its guides to images and to classes teach it, on its native runner.

    PYTHONPATH=benchmarks python benchmarks/peer_daft.py PHOTOGRAPHS CHECKPOINT OUT WORKERS [--bytes]

Daft downloads and decodes, both with `on_error="null"`: a file that does not decode gets a row without faces. Daft 0.7
runs a class that takes decoded images in its own process, whatever `use_process` says. So with --bytes the class takes
bytes and decodes them with Pillow, the guide's other way: in WORKERS processes, with one thread of PyTorch each.

Daft's checkpoints (`daft.CheckpointConfig`) are left out: 0.7 has them only on its Ray runner, which needs Ray < 2.60.
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any

import daft
import numpy as np
import torch
from daft import DataType, Series, col
from facenet_scorer import PHOTOGRAPH, CheckpointScorer
from numpy.typing import NDArray
from PIL import Image

ROW = DataType.struct({name: DataType.from_arrow_type(PHOTOGRAPH.field(name).type) for name in ("faces", "scored_at")})


@daft.cls
class ImageClassifier:
    """Takes decoded images."""

    def __init__(self, checkpoint: str) -> None:
        self._score = CheckpointScorer(checkpoint)

    @daft.method(return_dtype=ROW, unnest=True)
    def __call__(self, image: NDArray[np.uint8] | None) -> dict[str, Any]:
        """Return the columns of one photograph."""
        return {"faces": None if image is None else self._score(image), "scored_at": time.time()}


class BytesClassifier:
    """Takes the bytes of files, in a process of its own."""

    def __init__(self, checkpoint: str) -> None:
        torch.set_num_threads(1)
        self._score = CheckpointScorer(checkpoint)

    @daft.method.batch(return_dtype=ROW, unnest=True, batch_size=16)
    def __call__(self, files: Series) -> list[dict[str, Any]]:
        """Return the columns of a batch of photographs."""
        rows = []
        for data in files.to_pylist():
            try:
                faces = None if data is None else self._score(Image.open(io.BytesIO(data)).convert("RGB"))
            except OSError:
                faces = None
            rows.append({"faces": faces, "scored_at": time.time()})
        return rows


def main(photographs: str, checkpoint: str, out: str, workers: str, *options: str) -> None:
    """Score the photographs of a folder."""
    frame = daft.from_glob_path(f"{photographs}/*")
    frame = frame.with_column("file", col("path").download(on_error="null"))
    if "--bytes" in options:
        classify = daft.cls(BytesClassifier, use_process=True, max_concurrency=int(workers))(checkpoint)
        frame = frame.select("path", classify(col("file")))
    else:
        frame = frame.with_column("image", col("file").decode_image(on_error="null"))
        frame = frame.select("path", ImageClassifier(checkpoint)(col("image")))
    frame.write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Peer (a): a loop over the photographs on all cores that writes one table at its end.

    python benchmarks/peer_loop.py PHOTOGRAPHS CHECKPOINT OUT

A file that does not decode gets a row without faces: OSError is caught as in Pillow's tutorial.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from facenet_scorer import PHOTOGRAPH, CheckpointScorer
from PIL import Image


def main(photographs: str, checkpoint: str, out: str) -> None:
    """Score the photographs of a folder."""
    score = CheckpointScorer(checkpoint)
    rows = []
    for path in sorted(Path(photographs).iterdir()):
        try:
            faces = score(Image.open(path).convert("RGB"))
        except OSError:
            faces = None
        rows.append({"path": str(path), "faces": faces, "scored_at": time.time()})
    Path(out).mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, PHOTOGRAPH), Path(out) / "photographs.parquet")


if __name__ == "__main__":
    main(*sys.argv[1:])

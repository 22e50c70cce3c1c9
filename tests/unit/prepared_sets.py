"""A small prepared set, made without preparing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agr_ray.runtime.prepared import FORMAT_VERSION, PreparedSet
from agr_ray.schema import CROPS, TEMPLATE
from agr_ray.storage import Storage
from agr_ray.vision.align import crop_side_px
from agr_ray.vision.decode import encode_jpeg

SIDE_PX = 32


def prepared_set(
    folder: Path,
    *,
    side_px: int = SIDE_PX,
    template: str = TEMPLATE,
    finished: bool = True,
    copied: bool = False,
    detector: str = "none",
) -> Path:
    """Write a prepared set of three crops, in which no label has a race.

    With `copied`, the image of the test split is one of training's too.
    """
    side = crop_side_px(side_px)
    rows = [
        {
            "image_id": key,
            "uri": f"/faces/{key}",
            "key": key,
            "source": "folder",
            "content_hash": hashlib.sha256(b"a.jpg" if copied and key == "b.jpg" else key.encode()).hexdigest(),
            "group_id": f"sha256:{key}",
            "split": split,
            "age": age,
            "gender": gender,
            "status": "ok",
            "crop": encode_jpeg(np.full((side, side, 3), 128, np.uint8)),
        }
        for key, split, age, gender in (
            ("a.jpg", "train", 20.0, "male"),
            ("b.jpg", "test", 30.0, "female"),
            ("c.jpg", "train", 40.0, "female"),
        )
    ]
    (folder / "crops").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=CROPS), folder / "crops" / "part-0.parquet")
    settings = {
        "source": {"kind": "folder", "name": ""},
        "vision": {"detector": detector},
        "crop_side_px": side_px,
        "template": template,
    }
    PreparedSet(
        format_version=FORMAT_VERSION,
        finished=finished,
        settings=settings,
        split_manifest_sha256="0" * 64,
        labels_sha256="0" * 64,
        splits={"train": 2, "val": 0, "test": 1},
        counts={"ok": 3},
        uri=str(folder),
    ).write(Storage())
    return folder

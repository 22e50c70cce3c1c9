"""A small prepared set, written without running `prepare`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agr_ray.data.prepared import FORMAT_VERSION, PreparedSet
from agr_ray.labels import UTKFACE
from agr_ray.schema import CROPS, TEMPLATE
from agr_ray.storage import Storage
from agr_ray.vision.align import stored_side_px
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
    keys: tuple[str, str, str] = ("a.jpg", "b.jpg", "c.jpg"),
    race: str | None = None,
) -> Path:
    """Write a prepared set of three crops, of train, test and train, whose content is their key, all of one race.

    With `copied`, the image of the test split is the first of training's too.
    """
    side = stored_side_px(side_px)
    first, second, third = keys
    rows = [
        {
            "image_id": key,
            "uri": f"/faces/{key}",
            "key": key,
            "source": "folder",
            "content_hash": hashlib.sha256((first if copied and key == second else key).encode()).hexdigest(),
            "group_id": f"sha256:{key}",
            "split": split,
            "age": age,
            "gender": gender,
            "race": race,
            "status": "ok",
            "crop": encode_jpeg(np.full((side, side, 3), 128, np.uint8)),
        }
        for key, split, age, gender in (
            (first, "train", 20.0, "male"),
            (second, "test", 30.0, "female"),
            (third, "train", 40.0, "female"),
        )
    ]
    (folder / "crops").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=CROPS), folder / "crops" / "part-0.parquet")
    settings = {
        "source": {"kind": "folder", "name": folder.name},
        "label_space": UTKFACE.to_json(),
        "vision": {"detector": detector},
        "crop_side_px": side_px,
        "template": template,
    }
    PreparedSet(
        format_version=FORMAT_VERSION,
        finished=finished,
        settings=settings,
        split_manifest_sha256="0" * 64,
        labels_sha256=hashlib.sha256(" ".join(keys).encode()).hexdigest(),
        splits={"train": 2, "val": 0, "test": 1},
        counts={"ok": 3},
        uri=str(folder),
    ).write(Storage())
    return folder

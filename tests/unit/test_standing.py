"""Existing crop rows: which are kept, changed or removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agr_ray.data.standing import find_standing
from agr_ray.schema import CROPS, MANIFEST
from agr_ray.storage import Storage


def test_rows_of_images_that_were_not_read_are_kept(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = [
        {"image_id": "1", "status": "ok", "etag": "1", "content_hash": "1", "error": "age 'x' is not a number"},
        {"image_id": "2", "status": "bad_label", "error": "no label row in labels.csv"},
        {"image_id": "3", "status": "missing", "error": "c.jpg is labelled but does not exist"},
    ]
    rows = pa.Table.from_pylist(
        [{"uri": row["image_id"], "key": row["image_id"], "source": "folder"} | row for row in said], schema=CROPS
    )
    pq.write_table(rows, tmp_path / "part-0.parquet")

    listing = rows.select(MANIFEST.names)
    (part,) = find_standing(Storage(), listing, [str(tmp_path / "part-0.parquet")])

    assert part.keeps.tolist() == [True, True, True]
    assert part.differs(listing).tolist() == [False, False, False]

"""Planning a scoring run from a real S3 server (SeaweedFS): a prefix, an inventory, a manifest, published runs."""

from __future__ import annotations

import sys

import pyarrow as pa
import pytest
from commands import ROOT

from agr_ray.config import ScoreConfig
from agr_ray.errors import ConfigError
from agr_ray.scoring.planning import plan, read_counts, scored_ids
from agr_ray.storage import Connection, Storage, StorageUnavailable
from agr_ray.storage.parts import read_rows

sys.path.append(str(ROOT / "tests" / "unit"))
from inventories import entry, write_inventory

pytestmark = pytest.mark.timeout(120)

KEYS = ["a b.jpg", "e=1/f+g.jpg", "p%20q%.jpg", "ünï/日本.jpg"]


def published(rows: pa.Table, statuses: list[str]) -> pa.Table:
    return rows.slice(0, len(statuses)).append_column("status", pa.array(statuses))


def test_a_prefix_is_planned_and_then_only_what_is_not_scored(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agr_ray.storage.s3._KEYS_PER_PAGE", 3)
    storage = Storage(Connection(timeout_s=5, max_attempts=2))
    for key in [*KEYS, "notes.txt"]:
        storage.write(f"{s3_root}/in/{key}", key.encode())
    config = ScoreConfig(input=f"{s3_root}/in", rows_per_file=3)

    first = plan(storage, config, f"{s3_root}/out-work/1/manifest")
    rows = pa.concat_tables([read_rows(storage, f"{s3_root}/out-work/1/manifest", number) for number in range(2)])
    storage.write_table(published(rows, ["ok", "failed", "no_face"]), f"{s3_root}/out/images/run=1/part.parquet")
    scored = scored_ids(storage, [f"{s3_root}/out/images", f"{s3_root}/out/none"])
    second = plan(storage, config, f"{s3_root}/out-work/2/manifest", scored)

    assert rows["uri"].to_pylist() == [f"{s3_root}/in/{key}" for key in KEYS]
    listed = rows.select(["uri", "etag"]).to_pylist()
    assert [storage.read(row["uri"], etag=row["etag"]).decode() for row in listed] == KEYS
    assert (first.num_listed, first.num_parts, second.num_scored) == (5, 2, 2)
    assert read_counts(storage, f"{s3_root}/out-work/2/manifest") == second
    assert read_rows(storage, f"{s3_root}/out-work/2/manifest", 0)["uri"].to_pylist() == [
        f"{s3_root}/in/{KEYS[index]}" for index in (1, 3)
    ]


@pytest.mark.parametrize("file_format", ["CSV", "Parquet"])
def test_an_inventory_and_a_manifest_are_read_from_a_bucket(s3_root: str, file_format: str) -> None:
    storage = Storage(Connection(timeout_s=5, max_attempts=2))
    bucket = s3_root.rpartition("/")[0]
    inventory = write_inventory(storage, bucket, [[entry(key) for key in KEYS]], file_format)

    plan(storage, ScoreConfig(input=inventory), f"{s3_root}/manifest")
    again = ScoreConfig(input=f"{s3_root}/manifest", input_kind="manifest")
    made = plan(storage, again, f"{s3_root}/again")

    assert made.num_to_do == len(KEYS)
    assert read_rows(storage, f"{s3_root}/again", 0) == read_rows(storage, f"{s3_root}/manifest", 0)


def test_missing_inputs_are_distinguished(s3_root: str) -> None:
    storage = Storage(Connection(timeout_s=5, max_attempts=2))

    assert plan(storage, ScoreConfig(input=f"{s3_root}/none"), f"{s3_root}/out").num_parts == 0
    for name in ("none.parquet", "none/manifest.json"):
        with pytest.raises(ConfigError, match=f"{name}: there is no such"):
            plan(storage, ScoreConfig(input=f"{s3_root}/{name}"), f"{s3_root}/other")
    with pytest.raises(StorageUnavailable, match="bucket 'no-such-bucket'"):
        plan(storage, ScoreConfig(input="s3://no-such-bucket/in"), f"{s3_root}/other")

"""The fuzzer runs, notices what goes wrong, and what it has found stays fixed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bad_images
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_inventory import objects

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import fuzz
import fuzz_targets

from agr_ray.config import ScoreConfig, TrainJob, parse
from agr_ray.data.inventory import InventoryError
from agr_ray.data.sources.label_table import LabelTableError, read_labels
from agr_ray.errors import ConfigError
from agr_ray.schema import Status
from agr_ray.scoring.listing import Listing
from agr_ray.storage import Storage
from agr_ray.vision.decode import ImageError, decode_image

NUM_INPUTS = 2_000
NOT_UTF8 = b"\xff\xfe"


def test_no_input_of_a_short_run_is_a_finding() -> None:
    rows, left = fuzz.run(fuzz.blocks("", 5_000_000, NUM_INPUTS))

    assert [each for row in rows for each in row["findings"]] == []
    assert left == []
    assert sum(row["inputs"] for row in rows) == NUM_INPUTS
    assert {row["target"] for row in rows} == set(fuzz_targets.TARGETS)


BAD_TARGET = """
import os, sys, types

def feed(number):
    if number == 1:
        raise KeyError("undocumented")
    if number == 2:
        raise ValueError("documented")
    if number == 3:
        os.abort()
    if number == 4:
        while True:
            pass
    if number == 5:
        big.append(b"x" * (600 * 2**20))

class Bad:
    share, documented = 1.0, (ValueError,)
    warm_up = staticmethod(lambda: None)
    feed = staticmethod(feed)

big = []
sys.modules["fuzz_targets"] = types.ModuleType("fuzz_targets")
sys.modules["fuzz_targets"].TARGETS = {"bad": Bad}
import fuzz
fuzz.MAX_CPU_S = 3.0
fuzz.random.Random = lambda seed: int(seed.split()[1]) if isinstance(seed, str) else 0
fuzz.__file__ = fuzz.ROOT = __file__
sys.exit(fuzz.main())
"""
"""A target that misbehaves in its own way for each of its inputs, and runs it."""


def test_every_kind_of_finding_is_noticed_and_the_run_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text(f"import sys\nsys.path.append({str(Path(fuzz.__file__).parent)!r})\n{BAD_TARGET}")
    command = [sys.executable, str(script), "--inputs", "8", "--state", str(tmp_path / "state.json")]

    done = subprocess.run(command, capture_output=True, text=True, timeout=200)

    assert done.returncode == 1, done.stderr
    rows, left = json.loads((tmp_path / "state.json").read_text())
    findings = [(each["number"], each["error"]) for row in rows for each in row["findings"]]
    assert [(number, error.partition(" at ")[0]) for number, error in findings] == [
        (1, "KeyError: 'undocumented'"),
        (3, "killed by SIGABRT"),
        (4, "took more than 3 s of processor time"),
        (5, "took more than 512 MiB"),
    ]
    assert (sum(row["inputs"] for row in rows), left) == (8, [])
    assert "8 inputs" in done.stdout


def test_a_run_that_is_stopped_continues_where_it_was() -> None:
    work = fuzz.blocks("glob", 0, 300)

    rows, left = fuzz.run(work, seconds=0.0)

    assert (rows, left) == ([], work)
    assert [end - start for _, start, end in work] == [3] * 100


# What it found


def with_raw_bytes(table: pa.Table, path: Path) -> None:
    """Write a Parquet file in which every `??` is two bytes that are not UTF-8."""
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"??", NOT_UTF8))


@pytest.mark.parametrize(("column", "value"), [("key", "??.jpg"), ("??", "a.jpg")])
def test_text_in_parquet_that_is_not_utf8_is_an_error(tmp_path: Path, column: str, value: str) -> None:
    others = {"size": [1], "e_tag": ["x"], "key": ["a.jpg"], "uri": ["/a.jpg"], "age": ["1"]}
    table = pa.table(others | {column: [value]} | ({"uri": [value]} if column == "key" else {}))
    for name in ("m.parquet", "l.parquet", "data"):
        with_raw_bytes(table, tmp_path / name)
    manifest = {"sourceBucket": "b", "fileFormat": "Parquet", "fileSchema": "", "files": [{"key": "data"}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(ConfigError, match=r"^score\.input"):
        list(Listing(Storage(), ScoreConfig(input=str(tmp_path / "m.parquet"))).kept())
    with pytest.raises(LabelTableError, match=r"not UTF-8|UTF8"):
        read_labels(Storage(), str(tmp_path / "l.parquet"), {})
    with pytest.raises(InventoryError, match=r"^data file data can't be read as Parquet: "):
        objects(str(tmp_path / "manifest.json"))


@pytest.mark.parametrize("latest", ["true", 7, 0.5, {"a": 1}])
def test_an_inventory_with_columns_of_other_types_is_an_error(tmp_path: Path, latest: Any) -> None:
    pq.write_table(pa.table({"key": ["a"], "size": [1], "e_tag": ["x"], "is_latest": [latest]}), tmp_path / "data")
    manifest = {"sourceBucket": "b", "fileFormat": "Parquet", "fileSchema": "", "files": [{"key": "data"}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(InventoryError, match=r"^data file data can't be read as Parquet: "):
        objects(str(tmp_path / "manifest.json"))


def test_a_deeply_nested_inventory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"[" * 100_000)

    with pytest.raises(InventoryError, match="not valid JSON"):
        objects(str(tmp_path / "manifest.json"))


def test_a_palette_image_without_a_palette_is_unreadable() -> None:
    with pytest.raises(ImageError) as raised:
        decode_image(bad_images.png(4, 4, 8, 3, b"\0\1\2\3\4" * 4))

    assert raised.value.status is Status.UNREADABLE


@pytest.mark.parametrize("words", [["--storage", "true"], ["--model", "1"], ["--train", "[1]"]])
def test_a_section_that_is_no_table_is_one_line(words: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{words[0][2:]}: .* is not allowed: {words[0]}\.KEY sets one of its keys$"
    ):
        parse(TrainJob, [*words, "--config", "utkface_lite", "--data", "set"], {})


@pytest.mark.parametrize("key", ["", "`"])
def test_an_unknown_key_of_a_whole_section_is_one_line(key: str) -> None:
    environ = {"AGR_RAY_STORAGE": json.dumps({key: 1})}

    with pytest.raises(ConfigError, match=rf"^storage\.{key}: there is no such key; allowed: endpoint_url, "):
        parse(TrainJob, ["--config", "utkface_lite", "--data", "set"], environ)


@pytest.mark.parametrize("bucket", ["\ud800", "a/b", "me:key@b", "", 7, None])
def test_the_bucket_of_an_inventory_has_a_bucket_s_name(bucket: object, tmp_path: Path) -> None:
    manifest = {"sourceBucket": bucket, "fileFormat": "Parquet", "fileSchema": "", "files": [{"key": "data"}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(InventoryError, match=r"^not an S3 Inventory: its sourceBucket is "):
        objects(str(tmp_path / "manifest.json"))

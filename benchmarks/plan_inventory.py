"""Time and memory to plan a scoring run from an S3 Inventory, most of which is already scored.

    python benchmarks/plan_inventory.py --work FOLDER [--rows 10000000] [--format Parquet]

Generates an inventory and the published ids of nine in ten of its objects below --work (once: 10 million rows take
1.5 GB and some minutes). Then plans in a separate process, whose peak memory is measured. The table shows each figure
beside its limit for 10 million rows.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import resource
import subprocess
import sys
import time
import urllib.parse
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from agr_ray.config import ScoreConfig
from agr_ray.console import make_console
from agr_ray.scoring.planning import photograph_id, plan, scored_ids
from agr_ray.storage import Storage

LIMIT_S = 180
LIMIT_MIB = 2048
ROWS_PER_DATA_FILE = 1_000_000
ROWS_PER_PUBLISHED_FILE = 65_536
"""256 parts of 256 rows, as scoring publishes them."""


def main() -> None:
    """Generate the missing files, plan in a child process, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the generated files")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--format", choices=["Parquet", "CSV"], default="Parquet")
    parser.add_argument("--plan-only", action="store_true", help="what the child process does")
    arguments = parser.parse_args()
    folder = arguments.work / f"{arguments.rows}-{arguments.format.lower()}"
    if arguments.plan_only:
        print(json.dumps(measure(folder)))
        return
    if not (folder / "inventory" / "manifest.json").exists():
        generate(folder, arguments.rows, arguments.format)
    command = [sys.executable, __file__, "--plan-only", "--work", str(arguments.work)]
    command += ["--rows", str(arguments.rows), "--format", arguments.format]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(done.stdout)
    show(measured, arguments.rows, arguments.format)
    if measured["elapsed_s"] > LIMIT_S or measured["peak_mib"] > LIMIT_MIB:
        raise SystemExit("over the limit")


def measure(folder: Path) -> dict[str, float]:
    """Plan once and return the counts, seconds and peak memory of this process."""
    storage = Storage()
    out = folder / "manifests" / f"{time.time_ns()}"
    started = time.perf_counter()
    planned = plan(
        storage,
        ScoreConfig(input=str(folder / "inventory" / "manifest.json")),
        str(out),
        scored_ids(storage, [str(folder / "images")]),
    )
    elapsed_s = time.perf_counter() - started
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    storage.delete_tree(str(out))
    return asdict(planned) | {"elapsed_s": elapsed_s, "peak_mib": peak_kib / 1024}


def show(measured: dict[str, float], num_rows: int, file_format: str) -> None:
    """Print the figures beside their limits."""
    table = Table("", "measured", "limit", title=f"planning from an inventory of {num_rows:,} rows ({file_format})")
    table.add_row("time, s", f"{measured['elapsed_s']:.1f}", f"{LIMIT_S}")
    table.add_row("peak memory, MiB", f"{measured['peak_mib']:.0f}", f"{LIMIT_MIB}")
    for name in ("num_listed", "num_excluded", "num_scored", "num_duplicates", "num_to_do", "num_parts"):
        table.add_row(name.replace("_", " ").removeprefix("num "), f"{measured[name]:,.0f}", "")
    make_console().print(table)


def generate(folder: Path, num_rows: int, file_format: str) -> None:
    """Write the inventory, its manifest last, and the published ids of nine in ten of its objects."""
    files = []
    for first in range(0, num_rows, ROWS_PER_DATA_FILE):
        keys = [key_of(number) for number in range(first, min(first + ROWS_PER_DATA_FILE, num_rows))]
        etags = [hashlib.md5(key.encode(), usedforsecurity=False).hexdigest() for key in keys]
        sizes = [200_000 + int(etag[:5], 16) for etag in etags]
        name = f"{first // ROWS_PER_DATA_FILE:04d}"
        published = [
            photograph_id(f"s3://photos/{key}", etag)
            for number, (key, etag) in enumerate(zip(keys, etags, strict=True))
            if number % 10 != 9
        ]
        write_published(folder / "images" / "run=1", name, published)
        body = csv_body(keys, etags, sizes) if file_format == "CSV" else parquet_body(keys, etags, sizes)
        path = folder / "inventory" / "data" / f"{name}.{file_format.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
        files.append({"key": f"data/{path.name}", "size": len(body), "MD5checksum": md5})
        print(f"generated {first + len(keys):,} of {num_rows:,} rows", file=sys.stderr)
    schema = "Bucket, Key, Size, ETag" if file_format == "CSV" else "message s3.inventory {}"
    manifest = {"sourceBucket": "photos", "fileFormat": file_format, "fileSchema": schema, "files": files}
    (folder / "inventory" / "manifest.json").write_text(json.dumps(manifest))


def key_of(number: int) -> str:
    """Return a key like those of a camera's uploads; keys are in the order in which buckets are listed."""
    return f"uploads/2026/{number // 50_000:04d}/camera {number // 500 % 100:02d}/IMG_{number:09d}_é.jpg"


def write_published(folder: Path, name: str, ids: list[str]) -> None:
    """Write the two columns of image rows that planning reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(ids), ROWS_PER_PUBLISHED_FILE):
        part = ids[start : start + ROWS_PER_PUBLISHED_FILE]
        rows = pa.table({"image_id": part, "status": ["ok"] * len(part)})
        pq.write_table(rows, folder / f"{name}-{start:09d}.parquet", compression="zstd")


def parquet_body(keys: list[str], etags: list[str], sizes: list[int]) -> bytes:
    """Return a data file as S3 writes it in Parquet."""
    buffer = io.BytesIO()
    columns = {"bucket": ["photos"] * len(keys), "key": keys, "size": sizes, "e_tag": etags}
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def csv_body(keys: list[str], etags: list[str], sizes: list[int]) -> bytes:
    """Return a data file as S3 writes it in CSV: quoted, URL-encoded, without header, compressed."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows(
        ("photos", urllib.parse.quote_plus(key, safe="/"), size, etag)
        for key, etag, size in zip(keys, etags, sizes, strict=True)
    )
    return gzip.compress(text.getvalue().encode(), 6)


if __name__ == "__main__":
    main()

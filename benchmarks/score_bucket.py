"""Score a bucket of small photographs repeatedly on a real S3 server, and measure whether memory grows.

    python benchmarks/score_bucket.py --checkpoint RUN/best --chips UTKFACE --photographs FOLDER [--num 20000]

Fills a bucket of SeaweedFS: labelled chips, press photographs shrunk to 480 px, rendered photographs, and one bad
object in a hundred; objects of the same picture differ in trailing bytes. Then runs `jobs/score.py`

1. on a quarter of the objects, for its peak memory, into an output of its own;
2. on all of them; 3. again; 4. once more after 100 were added and 50 replaced.

After 2, 3 and 4, DuckDB checks that each object has one row, and that exactly the bad objects have reject statuses.
Prints counts, images/s and, for 1 and 2, the peak of the summed proportional set sizes of all processes: that of 2 may
be a fifth larger. Parts and files are small, so that a quarter has several files, too.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.dataset
from memory import described, peak, watched_memory
from rich.table import Table

from agr_ray.console import make_console
from agr_ray.data.rendered import render_photograph
from agr_ray.scoring.publish import published_runs
from agr_ray.storage import Storage
from agr_ray.vision.decode import decode_image, encode_jpeg

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / name) for name in ("system", "unit")]
import bad_images  # noqa: E402
from seaweedfs import S3Server, run_seaweedfs  # noqa: E402

BUCKET, TABLES = "photographs", "tables"
NUM_CHIPS, NUM_RENDERED = 2000, 20
SIDE_PX = 480
ADDED, REPLACED = 100, 50
BAD = {
    bad_images.empty: "not_an_image",
    bad_images.text: "not_an_image",
    bad_images.corrupt_jpeg: "unreadable",
    bad_images.truncated_jpeg: "unreadable",
}
BAD_EVERY, FIRST_BAD = 100, 7
"""Every hundredth object is bad."""
ROWS_PER_PART = 16
"""A published file has 256 parts."""
MAX_GROWTH = 0.2


def main() -> None:
    """Fill, score four times, check and print."""
    arguments = parse_arguments(__doc__)
    console = make_console()
    pictures = make_pictures(arguments.chips, arguments.photographs)
    started = time.perf_counter()
    with filled_server(pictures, arguments.num) as server:
        console.print(f"{arguments.num:,} objects put in {time.perf_counter() - started:.0f} s")
        table = Table("run", "to score", "scored", "s", "images/s", "peak MiB", "by status")
        quarter = ("--score.limit", arguments.num // 4, "--score.out", f"s3://{TABLES}/quarter")
        small = run(arguments.checkpoint, *quarter)
        add_row(table, "a quarter", arguments.num // 4, small)
        whole = ("--score.out", f"s3://{TABLES}/all")
        first = run(arguments.checkpoint, *whole)
        add_row(table, "all", arguments.num, first)
        check(range(arguments.num), range(0))
        add_row(table, "again", 0, run(arguments.checkpoint, *whole))
        check(range(arguments.num), range(0))
        put_all(server, pictures, range(arguments.num, arguments.num + ADDED))
        put_all(server, pictures, range(REPLACED), version=1)
        changed = run(arguments.checkpoint, *whole)
        add_row(table, f"{ADDED} added, {REPLACED} replaced", ADDED + REPLACED, changed)
        check(range(arguments.num + ADDED), range(REPLACED))
        console.print(table)
        growth = first["peak"].total() / small["peak"].total() - 1
        console.print(f"a quarter at its peak, {described(small['peak'])}")
        console.print(f"all at its peak, {described(first['peak'])}")
        console.print(f"peak memory of all against a quarter: {growth:+.1%}")
        if growth > MAX_GROWTH:
            raise SystemExit(f"memory grew by more than {MAX_GROWTH:.0%}")


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Return the arguments for model, pictures and bucket."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--chips", type=Path, required=True, help="folder of face chips (.jpg)")
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--num", type=int, default=20_000, help="objects in the bucket")
    return parser.parse_args()


@contextmanager
def filled_server(pictures: list[bytes], num: int) -> Iterator[S3Server]:
    """Run an S3 server with this many objects and an empty bucket for tables; set the environment to it."""
    with tempfile.TemporaryDirectory(prefix="bucket-") as temporary, run_seaweedfs(Path(temporary)) as server:
        os.environ.update(server.environment())
        for bucket in (BUCKET, TABLES):
            server.client().create_bucket(Bucket=bucket)
        put_all(server, pictures, range(num))
        yield server


def make_pictures(chips: Path, photographs: Path) -> list[bytes]:
    """Return the different pictures, in random order."""
    pictures = [path.read_bytes() for path in random.Random(0).sample(sorted(chips.glob("*.jpg")), NUM_CHIPS)]
    for path in sorted(photographs.iterdir()):
        pictures += [encode_jpeg(decode_image(path.read_bytes(), max_side_px=SIDE_PX).rgb)] * 5
    pictures += [encode_jpeg(render_photograph(0, i, SIDE_PX, 360, 1 + i % 4).image_rgb) for i in range(NUM_RENDERED)]
    random.Random(0).shuffle(pictures)
    return pictures


def is_bad(number: int) -> bool:
    """Return whether the object of this number is bad, until it is replaced."""
    return number % BAD_EVERY == FIRST_BAD


def bad_body(number: int) -> Callable[[], bytes]:
    """Return the function that makes the body of a bad object."""
    return list(BAD)[number // BAD_EVERY % len(BAD)]


def put_all(server: S3Server, pictures: list[bytes], numbers: range, version: int = 0) -> None:
    """Put the objects of these numbers; each version has different content."""
    client = server.client()

    def put(number: int) -> None:
        body = pictures[number % len(pictures)] + f"{number} {version}".encode()  # after the end of the picture
        if is_bad(number) and not version:
            body = bad_body(number)()
        client.put_object(Bucket=BUCKET, Key=f"uploads/{number // 1000:03d}/{number:06d}.jpg", Body=body)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, numbers))


def run(checkpoint: Path, *options: object) -> dict[str, Any]:
    """Run the job; return the seconds, peak memory and the record of the run that it published."""
    out = str(options[options.index("--score.out") + 1])
    before = {record["run_id"] for record in published_runs(Storage(), out)}
    command = [sys.executable, str(ROOT / "jobs" / "score.py"), "--score.checkpoint", str(checkpoint)]
    command += ["--score.input", f"s3://{BUCKET}/uploads", "--score.rows_per_file", str(ROWS_PER_PART)]
    command += map(str, options)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with watched_memory(process.pid) as samples_mib:
        returned = process.wait()
    if returned:
        raise SystemExit(f"{' '.join(command)} ended with {returned}")
    seconds = time.perf_counter() - started
    (record,) = [record for record in published_runs(Storage(), out) if record["run_id"] not in before]
    return record | {"seconds": seconds, "peak": peak(samples_mib)}


def add_row(table: Table, name: str, expected: int, measured: Mapping[str, Any]) -> None:
    """Add a run to the table."""
    if measured["num_images"] != expected:
        raise SystemExit(f"{name}: {measured['num_images']:,} rows, expected {expected:,}")
    score_s = measured["timings"]["score_s"]
    speed = f"{expected / score_s:.1f}" if score_s else ""
    statuses = ", ".join(f"{status} {count:,}" for status, count in measured["counts"].items())
    numbers = (f"{expected:,}", f"{measured['num_images']:,}", f"{measured['seconds']:.0f}", speed)
    table.add_row(name, *numbers, f"{measured['peak'].total():,.0f}", statuses)


def check(numbers: range, replaced: range) -> None:
    """Check all rows with DuckDB: each key exists, no image id occurs twice, bad objects have their statuses."""
    fs, path = Storage().arrow_filesystem(f"s3://{TABLES}/all/images")
    images = pyarrow.dataset.dataset(path, filesystem=fs, format="parquet")  # noqa: F841  # DuckDB finds it by name
    counted = duckdb.sql("SELECT count(DISTINCT uri), count(DISTINCT image_id), count(*) FROM images").fetchall()
    if counted != [(len(numbers), len(numbers) + len(replaced), len(numbers) + len(replaced))]:
        raise SystemExit(f"{len(numbers):,} keys, {len(replaced)} of them replaced, but (URIs, ids, rows) {counted}")
    newest = "SELECT status FROM images QUALIFY row_number() OVER (PARTITION BY uri ORDER BY scored_at DESC) = 1"
    sql = f"SELECT status, count(*) FROM ({newest}) WHERE status NOT IN ('ok', 'no_face') GROUP BY status"
    rejected = dict(duckdb.sql(sql).fetchall())
    expected = Counter(BAD[bad_body(number)] for number in numbers if is_bad(number) and number not in replaced)
    if rejected != expected:
        raise SystemExit(f"rejects {rejected}, expected {dict(expected)}")


if __name__ == "__main__":
    main()

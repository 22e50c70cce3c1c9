"""Prepare from a bucket: one download of each image, compared with two, as in an earlier version of `prepare`.

    python benchmarks/prepare_downloads.py --images UTKFACE [--num 1000] [--latency_ms 20] [--detector none]

Puts labelled chips into a bucket of SeaweedFS and prepares them in this process, without Ray, twice from scratch:

- before: eight threads read and hash every image first, as the driver did; then the images are prepared;
- now: the images are prepared, which hashes them.

Each request takes `latency_ms` longer than the local server needs, to simulate a bucket in the same region. Prints
downloads and seconds. The order is now, before, now, before, now, because other processes may disturb a run; the first
is a warm-up.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

from agr_ray.config import PrepareConfig, PrepareJob, SourceConfig, VisionConfig
from agr_ray.console import make_console
from agr_ray.data.manifest import content_hash
from agr_ray.data.preparation import prepare_set
from agr_ray.storage import Storage
from agr_ray.vision.detect import DETECTORS

sys.path += [str(Path(__file__).parents[1] / "tests" / name) for name in ("system", "unit")]
from cropping_here import CroppingHere
from seaweedfs import run_seaweedfs

NUM_DRIVER_THREADS = 8


class Requests:
    """Counts and delays reads of the bucket's images."""

    def __init__(self, latency_s: float) -> None:
        self.count = 0
        read = Storage.read

        def delayed(storage: Storage, uri: str, **options: Any) -> bytes:
            if uri.endswith(".jpg"):
                self.count += 1
                time.sleep(latency_s)
            return read(storage, uri, **options)

        Storage.read = delayed  # type: ignore[method-assign]


def main() -> None:
    """Fill the bucket, prepare five times, the first as a warm-up, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of UTKFace chips")
    parser.add_argument("--num", type=int, default=1000, help="images")
    parser.add_argument("--latency_ms", type=float, default=20.0, help="added to each request")
    parser.add_argument("--detector", default="none", choices=DETECTORS)
    arguments = parser.parse_args()
    console = make_console()
    with tempfile.TemporaryDirectory(prefix="bucket-") as temporary, run_seaweedfs(Path(temporary)) as server:
        os.environ.update(server.environment())
        for bucket in ("faces", "sets"):
            server.client().create_bucket(Bucket=bucket)
        for path in sorted(arguments.images.glob("*.jpg"))[: arguments.num]:
            server.client().put_object(Bucket="faces", Key=path.name, Body=path.read_bytes())
        requests = Requests(arguments.latency_ms / 1000)
        table = Table("way", "downloads", "s", "of which hashing first")
        seconds: dict[str, list[float]] = {"warm-up": [], "before": [], "now": []}
        for number, way in enumerate(("warm-up", "before", "now", "before", "now")):
            requests.count, started = 0, time.perf_counter()
            if way == "before":
                hash_all(Storage())
            hashed_s = time.perf_counter() - started
            job = PrepareJob(
                source=SourceConfig(kind="utkface", uri="s3://faces"),
                vision=VisionConfig(detector=arguments.detector),
                prepare=PrepareConfig(out=f"s3://sets/{number}"),
            )
            prepare_set(job, CroppingHere(job), make_console(quiet=True))
            seconds[way].append(time.perf_counter() - started)
            table.add_row(way, f"{requests.count:,}", f"{seconds[way][-1]:.1f}", f"{hashed_s:.1f}")
        console.print(table)
        console.print(f"before / now: {sum(seconds['before']) / sum(seconds['now']):.2f} times the time")


def hash_all(storage: Storage) -> None:
    """Read and hash every image."""
    infos = list(storage.list("s3://faces", (".jpg",)))
    with ThreadPoolExecutor(NUM_DRIVER_THREADS) as pool:
        list(pool.map(lambda info: content_hash(storage.read(info.uri, etag=info.etag)), infos))


if __name__ == "__main__":
    main()

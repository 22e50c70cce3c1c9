"""Runs on this machine: those that give `scale_model.py` its costs, and those that its prediction is compared with.

The photographs are in SeaweedFS on this machine. A node is a process of `ray start` with one logical CPU, for one
worker; the first node has a second one, for Ray Data's own tasks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from botocore.client import BaseClient
from plan_inventory import generate
from score_bucket import BUCKET, NUM_CHIPS, ROOT, TABLES, filled_server

# isort: split
# score_bucket has put the tests' folders on the path.
from commands import Cluster, run_cluster
from seaweedfs import S3Server
from this_process import ThisProcess

from agr_ray.config import ClusterConfig, ScoreConfig, ScoreJob, parse
from agr_ray.console import make_console
from agr_ray.scoring.driver import score_input
from agr_ray.scoring.planning import plan
from agr_ray.scoring.publish import Counts, Publication
from agr_ray.storage import Storage
from agr_ray.storage.parts import PARTS_PER_FILE, Parts, write_manifest

PLANNED_ROWS: Final = 200_000
IDLE_PARTS: Final = 500
FULL_PART: Final = ScoreConfig().rows_per_file
KINDS: Final = {
    "GetObject": "get",
    "HeadObject": "get",
    "ListObjectsV2": "list",
    "DeleteObject": "delete",
    "DeleteObjects": "delete",
}
"""Kinds of requests to S3; all others are `put`."""
Mark = tuple[str, float, float]
"""Of `timed_score.py`."""


def measure(checkpoint: Path, photographs: Path, num: int, rows_per_part: int) -> dict[str, Any]:
    """Score `num` photographs with one worker on one node, and return the fields of `scale_model.Costs`."""
    console = make_console()
    with photograph_bucket(photographs, num) as server, tempfile.TemporaryDirectory(prefix="scale-") as temporary:
        console.print("requests, and publishing a full file")
        full = FullFile()
        score_input(parse(ScoreJob, options(checkpoint, "requests", FULL_PART, limit=FULL_PART)), full, console)
        console.print("planning")
        plan_key_s = planning_s(Path(temporary), PLANNED_ROWS) / PLANNED_ROWS
        started = time.perf_counter()
        with run_cluster(environment(server), cpus(1)) as cluster:
            node_start_s = time.perf_counter() - started
            console.print("the driver alone")
            os.environ.update(cluster.environment)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                driver_part_s = pool.submit(driver_s, cluster.address, IDLE_PARTS).result() / IDLE_PARTS
            console.print("one worker")
            path = Path(temporary, "marks.json")
            given = options(checkpoint, "measured", rows_per_part, cluster=cluster)
            began, ended = run("benchmarks/timed_score.py", str(path), *given, cluster=cluster)
        timed = json.loads(path.read_text())
    return costs_of_run(timed["marks"], timed["record"], began, ended, full.publish_row_s) | {
        "node_start_s": node_start_s,
        "plan_key_s": plan_key_s,
        "driver_part_s": driver_part_s,
        "driver_mib": timed["driver_mib"],
        "publish_row_s": full.publish_row_s,
        "part_requests": dict(full.part_requests),
        "file_requests": dict(full.file_requests),
    }


def costs_of_run(
    marks: Sequence[Mark], record: Mapping[str, Any], began: float, ended: float, publish_row_s: float
) -> dict[str, Any]:
    """Return the costs that follow from the marks of a run with one worker.

    Ray Data hands over a part when the next one has ended, and the last two together. So the first arrives after two.

    Args:
        marks: of the run.
        record: of the run.
        began: when the job's process was started.
        ended: when it had exited.
        publish_row_s: seconds to publish a row.
    """
    at = {name: (seconds, cpu_s) for name, seconds, cpu_s in marks if name != "part"}
    arrived = [(seconds, cpu_s) for name, seconds, cpu_s in marks if name == "part"]
    (score_s, score_cpu_s), (stage_s, _), (staged_s, _) = (at[name] for name in ("score", "stage", "staged"))
    (first_s, first_cpu_s), (last_s, last_cpu_s) = arrived[0], arrived[-1]
    num = record["num_images"]
    each_s = (last_s - first_s) / (len(arrived) - 2)
    stages_s = {name: spent_s / num for name, spent_s in record["timings"]["worker_s"].items() if name != "write"}
    return {
        "start_s": score_s - began,
        "worker_start_s": first_s - score_s - 2 * each_s,
        "worker_start_cores": (first_cpu_s - score_cpu_s) / (first_s - score_s),
        "stages_s": stages_s,
        "part_s": each_s - num / len(arrived) * sum(stages_s.values()),
        "scoring_cores": (last_cpu_s - first_cpu_s) / (last_s - first_s),
        "publish_start_s": staged_s - stage_s - num * publish_row_s,
        "finish_s": ended - staged_s,
        "faces_per_image": record["num_faces"] / num,
    }


def walls_s(checkpoint: Path, photographs: Path, num: int, rows_per_part: int, nodes: Sequence[int]) -> Iterator[float]:
    """Yield the seconds that `jobs/score.py` takes on a running cluster of each number of nodes."""
    with photograph_bucket(photographs, num) as server:
        for number in nodes:
            with run_cluster(environment(server), cpus(number)) as cluster:
                given = options(checkpoint, f"nodes-{number}", rows_per_part, workers=number, cluster=cluster)
                began, ended = run("jobs/score.py", *given, cluster=cluster)
            yield ended - began


class FullFile(ThisProcess):
    """Workers in this process that also publish a full file, of copies of the first part, and count its requests."""

    publish_row_s: float
    part_requests: Counter[str]
    """Of a worker for one part, without the photographs."""
    file_requests: Counter[str]
    """To publish a file, without copies and deletions of what is staged."""

    def stage(self, publication: Publication) -> Iterator[Counts]:
        """Measure, then write the files to publish."""
        storage, first = publication.storage, Parts(publication.storage, publication.work)
        images, rows = storage.read_table(first.uri(0)), first.rows(0)
        full = Parts(storage, storage.join(publication.work, "full"))
        batches = [each for _ in range(PARTS_PER_FILE) for each in rows.to_batches()]
        write_manifest(storage, full.manifest, batches, rows.schema, rows.num_rows, {})
        for number in range(PARTS_PER_FILE):
            storage.write_table(images, full.uri(number))
        with counted_requests() as self.part_requests:
            full.rows(PARTS_PER_FILE // 2)
            full.begin(0)
            full.write(0, images)
        started = time.perf_counter()
        with counted_requests() as self.file_requests:
            replace(publication, work=full.work, num_parts=PARTS_PER_FILE).stage_file(0)
        self.publish_row_s = (time.perf_counter() - started) / (PARTS_PER_FILE * rows.num_rows)
        yield from super().stage(publication)


@contextmanager
def counted_requests() -> Iterator[Counter[str]]:
    """Yield an empty counter that has the requests of boto3's clients by kind when the block ends."""
    send, sent, counted = BaseClient._make_api_call, list[str](), Counter[str]()

    def note_and_send(client: BaseClient, operation: str, arguments: Any) -> Any:
        sent.append(KINDS.get(operation, "put"))
        return send(client, operation, arguments)

    BaseClient._make_api_call = note_and_send  # type: ignore[method-assign]
    try:
        yield counted
    finally:
        BaseClient._make_api_call = send  # type: ignore[method-assign]
        counted.update(sent)


def planning_s(folder: Path, num_rows: int) -> float:
    """Plan from an inventory of new photographs, and return the seconds."""
    generate(folder, num_rows, "Parquet")
    started = time.perf_counter()
    plan(Storage(), ScoreConfig(input=str(folder / "inventory" / "manifest.json")), f"s3://{TABLES}/planned")
    return time.perf_counter() - started


def driver_s(address: str, num_parts: int) -> float:
    """Return the CPU seconds of a driver, this process, while a worker does nothing for each of these parts."""
    from ray.data import ActorPoolStrategy

    from agr_ray.runtime.cluster import cluster
    from agr_ray.runtime.part_runner import run_parts

    class Idle:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return batch

    with cluster(ClusterConfig(address=address)):
        results = run_parts(Idle, (), range(num_parts), ActorPoolStrategy(size=1))
        next(results)
        before_s = own_cpu_s()
        for _ in results:
            pass
        return own_cpu_s() - before_s


def own_cpu_s() -> float:
    """Return the CPU seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def photograph_bucket(folder: Path, num: int) -> Iterator[S3Server]:
    """Run an S3 server with `num` objects made of a folder's photographs, filled as in `score_bucket.py`."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    chosen = random.Random(0).sample(paths, min(NUM_CHIPS, len(paths)))
    with filled_server([path.read_bytes() for path in chosen], num) as server:
        yield server


def environment(server: S3Server) -> dict[str, str]:
    """Return the variables of a cluster's nodes."""
    return server.environment() | {"RAY_prestart_worker_first_driver": "0"}


def cpus(num_nodes: int) -> list[int]:
    """Return the logical CPUs of each node."""
    return [2] + [1] * (num_nodes - 1)


def options(
    checkpoint: Path,
    out: str,
    rows_per_part: int,
    *,
    workers: int = 1,
    limit: int | None = None,
    cluster: Cluster | None = None,
) -> list[str]:
    """Return the options of a scoring job."""
    given = {
        "checkpoint": checkpoint,
        "input": f"s3://{BUCKET}/uploads",
        "out": f"s3://{TABLES}/{out}",
        "score.rows_per_file": rows_per_part,
        "score.num_workers": workers,
        **({} if limit is None else {"score.limit": limit}),
        **({} if cluster is None else {"cluster.address": cluster.address}),
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def run(script: str, *arguments: str, cluster: Cluster) -> tuple[float, float]:
    """Run a script of the repository; return when it was started and when it had exited."""
    command = [sys.executable, str(ROOT / script), *arguments]
    began = time.time()
    done = subprocess.run(command, env=cluster.environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return began, time.time()

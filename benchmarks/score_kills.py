"""Score a large bucket while every kind of process is killed, and check that each photograph is scored once.

    python benchmarks/score_kills.py --checkpoint RUN/best --chips UTKFACE --photographs FOLDER [--num 20000]

Runs `jobs/score.py` on a cluster of three node processes, on a bucket filled as in `score_bucket.py` with two more
objects that kill any process that decodes them. While it runs, in this order: SIGKILL of a worker; SIGKILL of a node,
which is replaced; the S3 server is killed, and restarted after 30 s; SIGKILL of the driver. Then the same command runs
again through a proxy that answers 5 % of all requests with 503, is killed while it publishes, and finally runs to its
end. Prints a log of events, and checks the published rows with DuckDB.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path

import duckdb
import pyarrow.dataset
from botocore.exceptions import BotoCoreError, ClientError
from deltalake import DeltaTable
from rich.console import Console
from score_bucket import BUCKET, ROOT, TABLES, filled_server, make_pictures, parse_arguments

# isort: split
# score_bucket has put the tests' folders on the path.
from commands import (
    DATA_WORKER,
    Cluster,
    add_node,
    disturb_command,
    job_command,
    kill_command,
    kill_node,
    run_cluster,
    titled_processes,
)
from fault_proxy import Faults, run_fault_proxy
from seaweedfs import S3Server

from agr_ray.console import make_console
from agr_ray.scoring.publish import published_runs
from agr_ray.storage import Storage

KILLERS = ("SIGKILL", "SIGSEGV")
OUTAGE_S = 30.0
TIMEOUT_S = 1800.0
REFUSED_SHARE = 0.05


def main() -> None:
    """Fill the bucket, score with disturbances, check and print."""
    arguments = parse_arguments(__doc__)
    console = make_console()
    pictures = make_pictures(arguments.chips, arguments.photographs)
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary, filled_server(pictures, arguments.num) as server:
        for name in KILLERS:
            body = pictures[0] + f"kills with {name}".encode()
            server.client().put_object(Bucket=BUCKET, Key=f"uploads/{name}.jpg", Body=body)
        deadly = str(ROOT / "tests" / "system" / "deadly_images")
        more = server.environment() | {"PYTHONPATH": deadly, "RAY_prestart_worker_first_driver": "0"}
        with run_cluster(more, num_cpus=(1, 4, 4)) as cluster:
            Disturbance(console, server, cluster, arguments.checkpoint.resolve(), arguments.num, Path(temporary)).run()
        check(console, arguments.num)


class Disturbance:
    """One run with all disturbances."""

    def __init__(
        self, console: Console, server: S3Server, cluster: Cluster, checkpoint: Path, num: int, folder: Path
    ) -> None:
        self._console, self._server, self._cluster = console, server, cluster
        self._checkpoint, self._num, self._log = checkpoint, num, folder / "log"
        self._started = time.monotonic()

    def run(self) -> None:
        """Start the command four times; the fourth time it runs to its end."""
        self._say("started")
        kill_command(
            self._command(self._server.endpoint_url),
            self._cluster,
            self._log,
            when=self._disturbed,
            timeout_s=TIMEOUT_S,
        )
        self._say("driver killed")
        num_drawn = num_requests = 0
        for held, when in (
            ("/_SUCCESS/", "before its last step of publishing"),
            ("/_delta_log/", "before its first commit"),
            ("", ""),
        ):
            faults = Faults(share=REFUSED_SHARE, held=held)
            with run_fault_proxy(self._server.endpoint_url, faults) as endpoint_url:
                command = self._command(endpoint_url)
                if held:
                    is_held = faults.holding.is_set
                    kill_command(command, self._cluster, self._log, when=is_held, timeout_s=TIMEOUT_S)
                    self._say(f"driver killed {when}")
                else:
                    disturb_command(command, self._cluster, self._log, when=lambda: True, then=lambda: None)
            num_drawn, num_requests = num_drawn + faults.num_drawn, num_requests + faults.num_requests
        self._say(f"ended; {num_drawn:,} of {num_requests:,} requests were refused meanwhile")

    def _command(self, endpoint_url: str) -> list[str]:
        options = {
            "--cluster.address": self._cluster.address,
            "--storage.endpoint_url": endpoint_url,
            "--score.checkpoint": self._checkpoint,
            "--score.input": f"s3://{BUCKET}/uploads",
            "--score.out": f"s3://{TABLES}/all",
            "--score.num_workers": 2,
            "--score.rows_per_file": 128,
            "--score.lock_expiry_s": 10,
            "--score.table": "delta",
        }
        return job_command("score", *(word for option in options.items() for word in option))

    def _disturbed(self) -> bool:
        """Return whether it is time to kill the driver; cause the other failures first."""
        self._wait_for(0.1)
        titled_processes(self._cluster.nodes, DATA_WORKER)[0].kill()
        self._say("worker killed")
        self._wait_for(0.25)
        busy = next(node for node in self._cluster.nodes[1:] if titled_processes([node], DATA_WORKER))
        kill_node(self._cluster, busy)
        self._say("node killed")
        add_node(self._cluster, 4)
        self._say("new node joined")
        self._wait_for(0.4)
        self._server.weed.kill()
        self._say("S3 server killed")
        time.sleep(OUTAGE_S)
        self._server.weed.start()
        self._say("S3 server started")
        self._wait_for(0.6)
        return True

    def _wait_for(self, share: float) -> None:
        """Return once this share of the photographs is scored."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._num_parts_done() * 128 < share * self._num:
            if time.monotonic() > deadline:
                raise SystemExit(f"never reached {share:.0%}: {self._log.read_text(errors='replace')[-3000:]}")
            time.sleep(1.0)

    def _num_parts_done(self) -> int:
        try:
            return sum("/parts/part-" in key for key in self._keys("all-work/"))
        except (BotoCoreError, ClientError):  # the server has only just been started
            return 0

    def _keys(self, prefix: str) -> list[str]:
        pages = self._server.client().get_paginator("list_objects_v2").paginate(Bucket=TABLES, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def _say(self, what: str) -> None:
        seconds = time.monotonic() - self._started
        self._console.print(f"{seconds:5.0f} s, {self._num_parts_done():4d} parts done: {what}")


def check(console: Console, num_objects: int) -> None:
    """Count the published rows, and those of the Delta table, with DuckDB."""
    (record,) = published_runs(Storage(), f"s3://{TABLES}/all")
    fs, path = Storage().arrow_filesystem(f"s3://{TABLES}/all/images")
    images = pyarrow.dataset.dataset(path, filesystem=fs, format="parquet")  # noqa: F841  # DuckDB finds it by name
    ((num_rows, num_uris),) = duckdb.sql("SELECT count(*), count(DISTINCT uri) FROM images").fetchall()
    statuses = dict(duckdb.sql("SELECT status, count(*) FROM images GROUP BY status ORDER BY status").fetchall())
    given_up = duckdb.sql("SELECT uri, error FROM images WHERE status = 'failed' ORDER BY uri").fetchall()
    console.print(f"{num_objects + len(KILLERS):,} objects, {num_rows:,} rows, {num_uris:,} URIs; {statuses}")
    console.print(f"failed: {given_up}")
    wanted = [f"s3://{BUCKET}/uploads/{name}.jpg" for name in KILLERS]
    if num_rows != num_uris or num_rows != num_objects + len(KILLERS) or [uri for uri, _ in given_up] != wanted:
        raise SystemExit("a photograph was lost, duplicated, or failed for another reason")
    if Counter(record["counts"]) != Counter(statuses):
        raise SystemExit(f"_SUCCESS says {record['counts']}")
    uri = f"s3://{TABLES}/all/images"
    delta = DeltaTable(uri, storage_options=Storage().delta_options(uri)).to_pyarrow_dataset()  # noqa: F841
    keys = "SELECT image_id, run_id FROM {} ORDER BY ALL"
    if duckdb.sql(keys.format("delta")).fetchall() != duckdb.sql(keys.format("images")).fetchall():
        raise SystemExit("the Delta table has other rows than the published files")


if __name__ == "__main__":
    main()

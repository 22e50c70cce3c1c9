"""Batch scoring of a bucket: each photograph once, whatever is killed, stopped or rejected meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pytest
from commands import (
    DATA_WORKER,
    ROOT,
    Cluster,
    add_node,
    disturb_command,
    job_command,
    kill_command,
    kill_node,
    run_cluster,
    submit_command,
    succeed,
    titled_processes,
)
from fault_proxy import Faults, run_fault_proxy
from seaweedfs import READ_ONLY, Bucket, S3Server, run_seaweedfs
from servers import free_ports

from agr_ray.config import ScoreConfig, ScoreJob
from agr_ray.data.rendered import render_photograph
from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint import FORMAT_VERSION
from agr_ray.runtime.score import score
from agr_ray.schema import IMAGES
from agr_ray.storage import StorageUnavailable
from agr_ray.vision.decode import encode_jpeg

sys.path += [str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "ray")]
import bad_images
from sets import checkpoint

pytestmark = pytest.mark.timeout(900)

BUCKET = "scoring"
NUM_PHOTOGRAPHS = 48
ROWS_PER_PART = 4
PARTS_BEFORE_KILL = 2
LOCK_EXPIRY_S = 8
OUTAGE_S = 30.0
DEADLY_IMAGES = Path(__file__).parent / "deadly_images"
ODD_KEYS = ["a b.jpg", "e=1/f+g.JPEG", "h#h.jpg", "p%20q%.jpg", "q?x&y.jpg", "two//slashes.jpg", "ünï/日本.jpg"]
BAD_FILES = {
    "bomb.png": (bad_images.png_bomb, "too_large"),
    "corrupt.jpg": (bad_images.corrupt_jpeg, "unreadable"),
    "empty.jpg": (bad_images.empty, "not_an_image"),
    "nobody.jpg": (bad_images.jpeg, "no_face"),
    "text.jpg": (bad_images.text, "not_an_image"),
    "truncated.jpg": (bad_images.truncated_jpeg, "unreadable"),
}
FACE = encode_jpeg(render_photograph(0, 0, 640, 480, 1).image_rgb)


def photograph(number: int) -> bytes:
    """Return one face after a moment, each time as a new object: images after the end are not decoded."""
    return FACE + number.to_bytes(4)


@dataclass(frozen=True)
class Task:
    """A prefix of a bucket with photographs in `in/`, and how they are scored into `out/`."""

    bucket: Bucket
    prefix: str
    model: str

    @property
    def out(self) -> str:
        return f"{self.bucket.uri}/{self.prefix}/out"

    def fill(self, num_photographs: int = NUM_PHOTOGRAPHS) -> Task:
        """Put photographs, odd keys, bad files and what is no image at all."""
        keys = [*(f"{number:03d}.jpg" for number in range(num_photographs)), *ODD_KEYS]
        bodies = {key: photograph(number) for number, key in enumerate(keys)}
        bodies |= {key: make() for key, (make, _) in BAD_FILES.items()}
        for key, body in bodies.items():
            self.put(key, body)
        assert len(self.expected()) == len(bodies)
        self.put("notes.txt", b"no photograph")
        return self

    def put(self, key: str, body: bytes) -> None:
        self.bucket.put(f"{self.prefix}/in/{key}", body)

    def uri(self, key: str) -> str:
        return f"{self.bucket.uri}/{self.prefix}/in/{key}"

    def expected(self) -> dict[str, str]:
        """Return the status that each photograph must get, by URI, as the server lists them now."""
        listed = [key.removeprefix(f"{self.prefix}/in/") for key in self.bucket.keys(f"{self.prefix}/in/")]
        return {self.uri(key): BAD_FILES[key][1] if key in BAD_FILES else "ok" for key in listed if key != "notes.txt"}

    def command(self, cluster: Cluster | None, *more: object, endpoint_url: str = "") -> list[str]:
        """Return the command that scores, on a cluster or on the one that it is submitted to."""
        return job_command(
            "score",
            *(("--cluster.address", cluster.address) if cluster else ()),
            *("--storage.endpoint_url", endpoint_url or self.bucket.server.endpoint_url),
            *("--score.checkpoint", self.model, "--score.out", self.out),
            *("--score.input", f"{self.bucket.uri}/{self.prefix}/in"),
            *("--score.num_workers", 2, "--score.rows_per_file", ROWS_PER_PART, "--score.batch_size", ROWS_PER_PART),
            *more,
        )

    def parts(self) -> list[str]:
        """Return the keys of the parts that are done and not published yet."""
        return [key for key in self.bucket.keys(f"{self.prefix}/out-work/") if "/parts/part-" in key]

    def is_under_way(self) -> bool:
        return len(self.parts()) >= PARTS_BEFORE_KILL

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the published runs, oldest first."""
        return [self.bucket.json(key) for key in sorted(self.bucket.keys(f"{self.prefix}/out/_SUCCESS/"))]

    @contextlib.contextmanager
    def published(self, folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
        """Copy what is published into `folder` and open it: views.sql's views, and `rows`, all images of all runs."""
        self.bucket.download(f"{self.prefix}/out", folder)
        with duckdb.connect() as database:
            sql = (folder / "views.sql").read_text().replace(self.out, str(folder))
            secret, create_runs, views = sql.partition("CREATE OR REPLACE VIEW runs")  # a copy needs no secret
            assert "CREATE OR REPLACE SECRET" in secret
            database.execute(create_runs + views)
            database.execute(f"CREATE VIEW rows AS SELECT * FROM read_parquet('{folder}/images/run=*/*.parquet')")
            yield database


def assert_each_once(task: Task, folder: Path, expected: dict[str, str]) -> None:
    """Check that one run is published with one row for each URI, with its status, and that nothing else is left."""
    (record,) = task.records()
    num_ok = sum(status == "ok" for status in expected.values())
    with task.published(folder) as database:
        rows = database.sql("SELECT uri, status FROM rows").fetchall()
        seen = database.sql("SELECT uri, status FROM images").fetchall()
        faces = database.sql("SELECT uri FROM faces").fetchall()
        rejects = database.sql("SELECT uri FROM rejects").fetchall()
        (counted,) = database.sql("SELECT sum(n) FROM demographics WHERE breakdown = 'gender'").fetchall()
    assert sorted(rows) == sorted(seen) == sorted(expected.items())
    assert sorted(faces) == sorted((uri,) for uri, status in expected.items() if status == "ok")
    assert sorted(rejects) == sorted((uri,) for uri, status in expected.items() if status not in ("ok", "no_face"))
    assert counted == (num_ok,)
    assert record["counts"] == Counter(expected.values())
    assert record["plan"]["num_to_do"] == record["num_images"] == len(expected)
    assert record["num_faces"] == num_ok
    assert not task.bucket.keys(f"{task.prefix}/out-work/")


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> Bucket:
    return Bucket.create(s3_server, BUCKET)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint of random weights."""
    return checkpoint(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def model(bucket: Bucket, model_folder: Path) -> str:
    """Put the checkpoint into the bucket and return its URI."""
    bucket.upload(model_folder, "model")
    return f"{bucket.uri}/model"


@pytest.fixture(scope="module")
def three_nodes(s3_server: S3Server) -> Iterator[Cluster]:
    """Run a cluster whose head has too few CPUs for two workers, and which is not told where the S3 server is."""
    environment = s3_server.environment() | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(DEADLY_IMAGES), os.environ.get("PYTHONPATH")))),
    }
    with run_cluster(environment, num_cpus=(1, 4, 4)) as running:
        yield running


@pytest.fixture
def task(request: pytest.FixtureRequest, bucket: Bucket, model: str) -> Task:
    """Return a task with a prefix of its own, filled."""
    return Task(bucket, request.node.name.replace("[", "_").rstrip("]"), model).fill()


# The life of a bucket


@pytest.fixture(scope="module")
def scored(bucket: Bucket, cluster: Cluster, model: str) -> tuple[Task, str]:
    """Score a few photographs once, and return what the command printed, too."""
    task = Task(bucket, "scored", model).fill(8)
    return task, succeed(task.command(cluster), cluster.environment)


def test_each_photograph_is_scored_once_with_its_status(scored: tuple[Task, str], tmp_path: Path) -> None:
    task, _ = scored

    assert_each_once(task, tmp_path, task.expected())


def test_an_uncalibrated_model_gives_no_age_interval_and_says_so(scored: tuple[Task, str], tmp_path: Path) -> None:
    task, printed = scored

    assert "no corrected shares: the checkpoint has no calibration" in printed
    with task.published(tmp_path) as database:
        counted = database.sql("SELECT count(age) > 0, count(age_low), count(age_high) FROM faces").fetchall()
    assert counted == [(True, 0, 0)]


def test_later_runs_score_only_what_was_added_or_replaced(
    scored: tuple[Task, str], cluster: Cluster, tmp_path: Path
) -> None:
    task, _ = scored
    before = task.expected()

    succeed(task.command(cluster), cluster.environment)
    for number, key in enumerate(["added.jpg", "sub/added.jpg", "sub/ad ded.jpg", "000.jpg", "text.jpg"]):
        task.put(key, photograph(1000 + number))
    succeed(task.command(cluster), cluster.environment)

    assert [record["num_images"] for record in task.records()] == [len(before), 5]
    with task.published(tmp_path) as database:
        rows = database.sql("SELECT uri FROM rows").fetchall()
        seen = database.sql("SELECT uri, status FROM images").fetchall()
    replaced = {task.uri("000.jpg"), task.uri("text.jpg")}
    expected = task.expected() | {task.uri("text.jpg"): "ok"}
    assert sorted(rows) == sorted((uri,) for uri in [*expected, *replaced])
    assert sorted(seen) == sorted(expected.items())


# Kills


@pytest.mark.slow
def test_a_killed_driver_is_resumed_although_the_bucket_has_changed(
    task: Task, three_nodes: Cluster, tmp_path: Path
) -> None:
    command = task.command(three_nodes, "--score.lock_expiry_s", LOCK_EXPIRY_S)
    kill_command(command, three_nodes, tmp_path / "log", when=task.is_under_way)
    done = task.parts()
    num_parts = -(-len(task.expected()) // ROWS_PER_PART)
    rows_done = [row for key in done for row in task.bucket.table(key).to_pylist()]
    uris_done = [row["uri"] for row in rows_done]
    replaced, deleted = [uri for uri, status in task.expected().items() if status == "ok" and uri not in uris_done][:2]
    expected = task.expected() | {replaced: "changed", deleted: "missing"}
    task.bucket.put(replaced.removeprefix(f"{task.bucket.uri}/"), photograph(1000))
    task.bucket.delete(deleted.removeprefix(f"{task.bucket.uri}/"))

    printed = succeed(command, three_nodes.environment)

    assert f"{len(done)} of {num_parts} parts are done" in printed
    assert_each_once(task, tmp_path / "out", expected)
    with task.published(tmp_path / "out") as database:
        scored_at = dict(database.sql("SELECT uri, scored_at FROM rows").fetchall())
    assert all(scored_at[row["uri"]] == row["scored_at"] for row in rows_done)


@pytest.mark.slow
@pytest.mark.parametrize("write", ["/staged/", "/out/images/", "/_SUCCESS/"], ids=["first", "middle", "last"])
def test_a_driver_killed_while_it_publishes_publishes_the_same_run(
    task: Task, three_nodes: Cluster, tmp_path: Path, write: str
) -> None:
    faults = Faults(share=0, held=write)
    options = ("--score.lock_expiry_s", LOCK_EXPIRY_S)
    with run_fault_proxy(task.bucket.server.endpoint_url, faults) as endpoint_url:
        command = task.command(three_nodes, *options, endpoint_url=endpoint_url)
        kill_command(command, three_nodes, tmp_path / "log", when=faults.holding.is_set)
    assert not task.records()

    succeed(task.command(three_nodes, *options), three_nodes.environment)

    assert_each_once(task, tmp_path / "out", task.expected())


@pytest.mark.slow
def test_a_killed_worker_loses_no_photograph(task: Task, three_nodes: Cluster, tmp_path: Path) -> None:
    def kill_worker() -> None:
        titled_processes(three_nodes.nodes, DATA_WORKER)[0].kill()

    disturb_command(task.command(three_nodes), three_nodes, tmp_path / "log", when=task.is_under_way, then=kill_worker)

    assert_each_once(task, tmp_path / "out", task.expected())


@pytest.mark.slow
def test_a_killed_node_loses_no_photograph(task: Task, three_nodes: Cluster, tmp_path: Path) -> None:
    def kill_busy_node() -> None:
        nodes = three_nodes.nodes[1:]
        kill_node(three_nodes, next(node for node in nodes if titled_processes([node], DATA_WORKER)))

    command = task.command(three_nodes)
    disturb_command(command, three_nodes, tmp_path / "log", when=task.is_under_way, then=kill_busy_node)
    add_node(three_nodes, 4)

    assert_each_once(task, tmp_path / "out", task.expected())


@pytest.mark.slow
def test_images_that_kill_their_worker_fail_and_the_rest_is_scored(
    task: Task, three_nodes: Cluster, tmp_path: Path
) -> None:
    killers = {task.uri(f"{name}.jpg"): name for name in ("SIGKILL", "SIGSEGV")}
    for number, name in enumerate(killers.values()):
        task.put(f"{name}.jpg", photograph(1000 + number) + f"kills with {name}".encode())

    succeed(task.command(three_nodes), three_nodes.environment)

    assert_each_once(task, tmp_path, task.expected() | dict.fromkeys(killers, "failed"))
    with task.published(tmp_path) as database:
        errors = database.sql("SELECT DISTINCT error FROM rejects WHERE status = 'failed'").fetchall()
    assert errors == [("killed its worker 3 times",)]


# Storage


@pytest.mark.slow
def test_failed_requests_are_retried_and_remaining_failures_by_the_next_run(
    task: Task, three_nodes: Cluster, tmp_path: Path
) -> None:
    refused = f"{task.prefix}/in/007.jpg"
    faults = Faults(share=0.05, always=f"/{task.bucket.name}/{refused}")
    with run_fault_proxy(task.bucket.server.endpoint_url, faults) as endpoint_url:
        succeed(
            task.command(three_nodes, "--storage.max_attempts", 5, endpoint_url=endpoint_url), three_nodes.environment
        )

    assert faults.num_drawn >= 5, faults
    expected = task.expected()
    assert_each_once(task, tmp_path / "first", expected | {f"{task.bucket.uri}/{refused}": "failed"})

    succeed(task.command(three_nodes), three_nodes.environment)

    assert [record["num_images"] for record in task.records()] == [len(expected), 1]
    with task.published(tmp_path / "both") as database:
        assert sorted(database.sql("SELECT uri, status FROM images").fetchall()) == sorted(expected.items())


@pytest.mark.slow
def test_jobs_wait_for_a_stopped_server(three_nodes: Cluster, model_folder: Path, tmp_path: Path) -> None:
    with run_seaweedfs(tmp_path / "seaweedfs") as server:
        bucket = Bucket.create(server, BUCKET)
        bucket.upload(model_folder, "model")
        task = Task(bucket, "outage", f"{bucket.uri}/model").fill()

        def stop_for_a_while() -> None:
            server.weed.kill()
            time.sleep(OUTAGE_S)
            server.weed.start()

        disturb_command(
            task.command(three_nodes), three_nodes, tmp_path / "log", when=task.is_under_way, then=stop_for_a_while
        )

        assert_each_once(task, tmp_path / "out", task.expected())


# A job on three nodes


@pytest.mark.slow
def test_a_job_submitted_to_three_nodes_scores_each_photograph_once(
    task: Task, three_nodes: Cluster, tmp_path: Path
) -> None:
    assert len(three_nodes.nodes) == 3

    printed = succeed(submit_command(three_nodes, task.command(None)), three_nodes.environment)

    assert "succeeded" in printed
    assert_each_once(task, tmp_path, task.expected())


# Unusable set-ups, and one without work


def score_job(model: str, bucket: Bucket, prefix: str) -> ScoreJob:
    uri = f"{bucket.uri}/{prefix}"
    return ScoreJob(score=ScoreConfig(checkpoint=model, input=f"{uri}/in", out=f"{uri}/out", num_workers=1))


@pytest.mark.usefixtures("s3_environment")
def test_an_input_without_a_photograph_is_rejected_unless_an_empty_run_is_allowed(
    bucket: Bucket, model: str, tmp_path: Path
) -> None:
    bucket.put("nothing/in/notes.txt", b"no photograph")
    job = score_job(model, bucket, "nothing")
    misspelt = job.score.model_copy(update={"input": f"{bucket.uri}/nothing/inn"})
    with pytest.raises(ConfigError, match=r"^score\.input s3://scoring/nothing/inn: nothing is there"):
        score(job.model_copy(update={"score": misspelt}))
    with pytest.raises(ConfigError, match=r"^score\.input .*: none of its 1 keys .*: 1 end in \.txt"):
        score(job)
    assert bucket.keys("nothing/out") == []

    record = score(job.model_copy(update={"score": job.score.model_copy(update={"allow_empty": True})}))

    task = Task(bucket, "nothing", model)
    assert [record] == task.records()
    assert (record["num_images"], record["plan"]["num_excluded"]) == (0, 1)
    with task.published(tmp_path) as database:
        for view in ("images", "faces", "rejects"):
            assert database.sql(f"SELECT count(*) FROM {view}").fetchall() == [(0,)]
        columns = database.sql("SELECT * FROM images").columns
    assert [name for name in IMAGES.names if name not in columns] == []
    assert not bucket.keys("nothing/out-work/")


@pytest.mark.usefixtures("s3_environment")
def test_an_unwritable_output_ends_the_job_at_once(bucket: Bucket, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("unwritable/in/0.jpg", photograph(0))
    for name, value in READ_ONLY.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(StorageUnavailable, match=f"bucket '{BUCKET}' .* can't be written with these keys"):
        score(score_job(model, bucket, "unwritable"))

    assert bucket.keys("unwritable/") == ["unwritable/in/0.jpg"]


@pytest.mark.usefixtures("s3_environment")
def test_a_checkpoint_of_another_format_is_rejected(bucket: Bucket, model: str) -> None:
    meta = bucket.json("model/meta.json") | {"format_version": 99}
    bucket.put("newer/meta.json", json.dumps(meta).encode())

    with pytest.raises(
        ConfigError, match=f"^score.checkpoint {bucket.uri}/newer: .*format_version {FORMAT_VERSION}, found 99"
    ):
        score(score_job(f"{bucket.uri}/newer", bucket, "refused"))

    assert not bucket.keys("refused/")

"""Batch scoring of a bucket: each photograph once, whatever is killed, stopped or rejected meanwhile.

`test_jobs_s3.py` scores without accidents.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import (
    DATA_WORKER,
    ROOT,
    Cluster,
    add_node,
    disturb_command,
    kill_command,
    kill_node,
    run_cluster,
    submit_command,
    succeed,
    titled_processes,
)
from fault_proxy import Faults, run_fault_proxy
from scoring_task import ROWS_PER_PART, Task, assert_each_once, photograph
from seaweedfs import READ_ONLY, Bucket, S3Server, run_seaweedfs
from servers import free_ports

from agr_ray.config import ScoreConfig, ScoreJob
from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint import FORMAT_VERSION
from agr_ray.runtime.score import score
from agr_ray.schema import IMAGES
from agr_ray.storage import StorageUnavailable

sys.path.append(str(ROOT / "tests" / "ray"))
from sets import checkpoint

pytestmark = pytest.mark.timeout(900)

BUCKET = "scoring"
LOCK_EXPIRY_S = 8
OUTAGE_S = 30.0
DEADLY_IMAGES = Path(__file__).parent / "deadly_images"


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

"""Training on three nodes and an S3 server: whatever is killed, each epoch exists once and the model is as good."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import (
    ROOT,
    TRAIN_CONTROLLER,
    TRAIN_WORKER,
    Cluster,
    Node,
    add_node,
    disturb_command,
    job_command,
    kill_command,
    kill_node,
    run_cluster,
    run_command,
    start_command,
    succeed,
    titled_processes,
    wait_until,
)
from seaweedfs import Bucket, S3Server, run_seaweedfs

sys.path.append(str(ROOT / "tests" / "ray"))
from sets import SIDE_PX, prepared_set

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BUCKET = "training"
SPLITS = {"train": 320, "val": 80}
BATCH = 32
EPOCHS = 12
EPOCHS_BEFORE = 3
"""That are done when the harm is."""
NUM_CPUS = (1, 4, 4)
"""Of the nodes. Workers don't fit on the head, which can't be killed without ending everything."""
OUTAGE_S = 30.0
NOTICE_S = 20
"""Between a notice and the end of a machine."""


@dataclass(frozen=True)
class Run:
    """A training run in a bucket."""

    bucket: Bucket
    name: str
    epochs: int = EPOCHS
    backbone: str = "mobilenet_v3_small"  # whose checkpoints are small: the server never gives space back
    image_size: int = SIDE_PX

    def command(self, cluster: Cluster, **changes: object) -> list[str]:
        """Return the command that trains, and that goes on."""
        options = {
            "--cluster.address": cluster.address,
            "--storage.endpoint_url": self.bucket.server.endpoint_url,
            "--train.data": f"{self.bucket.uri}/data",
            "--train.out": f"{self.bucket.uri}/runs",
            "--train.name": self.name,
            "--train.num_workers": 2,
            "--train.threads_per_worker": 1,
            "--train.batch_size": BATCH,
            "--train.epochs": self.epochs,
            "--train.early_stopping_patience": 0,
            "--train.lr": 4e-3,
            "--train.schedule": "one_cycle",
            "--model.backbone": self.backbone,
            "--model.bn_momentum": 0.1,
            "--model.image_size": self.image_size,
        } | {f"--train.{key}": value for key, value in changes.items()}
        return job_command("train", *(word for option in options.items() for word in option))

    def history(self) -> list[dict[str, Any]]:
        key = f"runs/{self.name}/history.parquet"
        rows: list[dict[str, Any]] = self.bucket.table(key).to_pylist() if self.bucket.keys(key) else []
        return rows

    def has_done(self, epochs: int) -> Callable[[], bool]:
        return lambda: len(self.history()) >= epochs

    def disturbed(
        self,
        cluster: Cluster,
        folder: Path,
        harm: Callable[[], object],
        epochs_before: int = EPOCHS_BEFORE,
        **changes: object,
    ) -> str:
        """Train to the end, do harm after some epochs, and return what was printed."""
        return disturb_command(
            self.command(cluster, **changes), cluster, folder / "log", when=self.has_done(epochs_before), then=harm
        )

    def check(self, like: Run | None = None) -> None:
        """Fail unless each epoch is there once, checkpoints are whole, and the model is as good as another run's."""
        rows = self.history()
        assert [row["epoch"] for row in rows] == list(range(1, self.epochs + 1))
        assert [row["step"] for row in rows] == [SPLITS["train"] // BATCH * row["epoch"] for row in rows]
        assert {row["num_val_rows"] for row in rows} == {SPLITS["val"]}
        assert self.bucket.json(f"runs/{self.name}/run.json")["finished"] == "epochs"
        for name, epoch in (("best", best(rows)["epoch"]), ("last", self.epochs)):
            assert self.bucket.json(f"runs/{self.name}/{name}/meta.json")["metrics"]["epoch"] == epoch
        if like is not None:
            assert best(rows)["val_objective"] == pytest.approx(best(like.history())["val_objective"], abs=NOISE)


NOISE = 0.12
"""By which the objectives of two runs that nothing disturbs may differ; guessing has 1."""


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return min(rows, key=lambda row: row["val_objective"])


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    bucket = Bucket.create(s3_server, BUCKET)
    bucket.upload(prepared_set(tmp_path_factory.mktemp("crops") / "data", SPLITS), "data")
    return bucket


@pytest.fixture(scope="module")
def three_nodes(s3_server: S3Server) -> Iterator[Cluster]:
    with run_cluster(
        s3_server.environment() | {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}, num_cpus=NUM_CPUS
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def _three_nodes_again(three_nodes: Cluster) -> Iterator[None]:
    yield
    while len(three_nodes.nodes) < 3:
        add_node(three_nodes, NUM_CPUS[-1])


@pytest.fixture(scope="module")
def undisturbed(bucket: Bucket, three_nodes: Cluster) -> Run:
    run = Run(bucket, "undisturbed")
    succeed(run.command(three_nodes), three_nodes.environment)
    return run


def working_node(cluster: Cluster) -> Node:
    """Return a node, not the head, on which a worker trains."""
    return next(node for node in cluster.nodes[1:] if titled_processes([node], TRAIN_WORKER))


def test_an_undisturbed_run_learns(undisturbed: Run) -> None:
    undisturbed.check()
    assert best(undisturbed.history())["val_objective"] < 0.8


def test_one_worker_learns_as_well_as_two(bucket: Bucket, three_nodes: Cluster, undisturbed: Run) -> None:
    run = Run(bucket, "alone")
    succeed(run.command(three_nodes, num_workers=1), three_nodes.environment)

    run.check(like=undisturbed)


def test_an_elastic_run_resumes_with_fewer_workers(
    bucket: Bucket, three_nodes: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    # Before all tests that kill a driver or a controller: Ray keeps their reservation for three minutes.
    run = Run(bucket, "elastic")
    num_workers: list[int] = []

    def kill_one_of_two() -> None:
        # Counted here, because the worker that prints the number may be on this node: what its log monitor has not
        # forwarded by now is lost with it.
        num_workers.append(len(titled_processes(three_nodes.nodes, TRAIN_WORKER)))
        kill_node(three_nodes, working_node(three_nodes))

    printed = run.disturbed(three_nodes, tmp_path, kill_one_of_two, num_workers="[1, 2]", cpus_per_worker=4)

    assert num_workers == [2]
    assert re.search(r"resuming after epoch \d+, 1 worker\b", printed)
    run.check(like=undisturbed)


def test_a_killed_worker_is_started_again(
    bucket: Bucket, three_nodes: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(bucket, "worker")

    printed = run.disturbed(three_nodes, tmp_path, lambda: titled_processes(three_nodes.nodes, TRAIN_WORKER)[0].kill())

    assert "resuming after epoch" in printed
    run.check(like=undisturbed)


def test_the_workers_of_a_killed_node_are_started_on_another(
    bucket: Bucket, three_nodes: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(bucket, "node")

    printed = run.disturbed(three_nodes, tmp_path, lambda: kill_node(three_nodes, working_node(three_nodes)))

    assert "resuming after epoch" in printed
    run.check(like=undisturbed)


def test_after_a_killed_driver_the_same_command_resumes(
    bucket: Bucket, three_nodes: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(bucket, "driver")
    kill_command(run.command(three_nodes), three_nodes, tmp_path / "log", when=run.has_done(EPOCHS_BEFORE))
    assert len(run.history()) < EPOCHS

    printed = succeed(run.command(three_nodes), three_nodes.environment)

    assert "resuming after epoch" in printed
    run.check(like=undisturbed)


def test_a_killed_train_controller_is_restarted(
    bucket: Bucket, three_nodes: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(bucket, "controller")

    printed = run.disturbed(
        three_nodes, tmp_path, lambda: titled_processes(three_nodes.nodes, TRAIN_CONTROLLER)[0].kill()
    )

    assert "the Ray Train controller ended" in printed
    run.check(like=undisturbed)


def test_jobs_wait_for_a_stopped_server(three_nodes: Cluster, undisturbed: Run, tmp_path: Path) -> None:
    with run_seaweedfs(tmp_path / "seaweedfs") as server:
        bucket = Bucket.create(server, BUCKET)
        bucket.upload(prepared_set(tmp_path / "data", SPLITS), "data")
        run = Run(bucket, "outage")

        def stop_for_a_while() -> None:
            server.weed.kill()
            time.sleep(OUTAGE_S)
            server.weed.start()

        run.disturbed(three_nodes, tmp_path, stop_for_a_while)

        run.check(like=undisturbed)


def test_an_elastic_run_reports_a_too_small_cluster_and_resumes_when_it_grows(
    bucket: Bucket, three_nodes: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(bucket, "small")
    changes = {"num_workers": "[2, 3]", "cpus_per_worker": 4, "outage_s": 5.0}
    log = tmp_path / "log"

    with start_command(run.command(three_nodes, **changes), three_nodes.environment, log) as process:
        wait_until(run.has_done(EPOCHS_BEFORE), process, log)
        kill_node(three_nodes, working_node(three_nodes))
        assert process.wait(timeout=120) == 1
    assert "train.num_workers asks for 2 x 4 CPU, 8 in all; the cluster has 5" in log.read_text()

    add_node(three_nodes, NUM_CPUS[-1])
    assert "resuming after epoch" in succeed(run.command(three_nodes, **changes), three_nodes.environment)
    run.check(like=undisturbed)


def test_a_preemption_notice_triggers_a_checkpoint_within_an_epoch(
    bucket: Bucket, three_nodes: Cluster, tmp_path: Path
) -> None:
    # Epochs that take longer than it takes to notice, to save and to go away.
    run = Run(bucket, "notice", epochs=3, backbone="resnet18", image_size=6 * SIDE_PX)
    notice = "saved a checkpoint of epoch"

    def give_notice_and_kill() -> None:
        node = working_node(three_nodes)
        succeed(drain(three_nodes, node), three_nodes.environment)
        deadline = time.monotonic() + NOTICE_S
        while notice not in (tmp_path / "log").read_text(errors="replace"):
            assert time.monotonic() < deadline, "nothing was kept"
            time.sleep(0.1)
        kill_node(three_nodes, node)

    printed = run.disturbed(three_nodes, tmp_path, give_notice_and_kill, epochs_before=1)

    assert re.search(r"resuming after epoch \d+ and \d+ steps", printed)
    run.check()


def drain(cluster: Cluster, node: Node) -> list[str]:
    """Return the command by which a provider announces that it will take a node away."""
    # Raylets name their node on their command line.
    (raylet,) = [p for p in titled_processes([node], "raylet/raylet") if "--node_id" in " ".join(p.cmdline())]
    node_id = next(word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--node_id"))
    return [
        *("ray", "drain-node", "--address", cluster.address, "--node-id", node_id),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
        *("--deadline-remaining-seconds", str(NOTICE_S)),
    ]


def test_workers_that_do_not_fit_are_rejected_with_the_available_resources(
    bucket: Bucket, three_nodes: Cluster
) -> None:
    done = run_command(Run(bucket, "large").command(three_nodes, num_workers=16), three_nodes.environment)

    assert done.returncode == 2
    assert (
        "train.num_workers asks for 16 x 1 CPU and 2 for reading and writing, 18 in all; the cluster has 9"
        in done.stderr
    )

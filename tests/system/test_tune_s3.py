"""Sweeps whose driver, workers or trials are killed; and one through `ray job submit` on three nodes with S3."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import (
    ROOT,
    TRAIN_WORKER,
    TRIAL,
    Cluster,
    disturb_command,
    job_command,
    kill_command,
    run_cluster,
    run_command,
    submit_command,
    succeed,
    titled_processes,
)
from seaweedfs import Bucket, S3Server

from agr_ray.storage import Storage

sys.path.append(str(ROOT / "tests" / "ray"))
from sets import SIDE_PX, prepared_set

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BUCKET = "sweeps"
SPLITS = {"train": 64, "val": 24}
TRIALS = 4
EPOCHS = 3
TIMEOUT_S = 900.0
NUM_CPUS = (2, 4, 4)
SPACE = {"loss.race_weight": {"log_uniform": [0.1, 4.0]}, "train.lr": {"log_uniform": [1e-4, 1e-2]}}


@dataclass(frozen=True)
class SweepRun:
    """A sweep, in a folder or in a bucket."""

    root: str
    name: str

    def options(self, **changes: object) -> list[object]:
        options = {
            "--train.data": f"{self.root}/data",
            "--train.out": f"{self.root}/runs",
            "--train.threads_per_worker": 1,
            "--train.batch_size": 16,
            "--train.epochs": EPOCHS,
            "--train.early_stopping_patience": 0,
            "--model.backbone": "mobilenet_v3_small",
            "--model.bn_momentum": 0.1,
            "--model.image_size": SIDE_PX,
            "--tune.space": json.dumps(SPACE),
            "--tune.out": f"{self.root}/sweeps",
            "--tune.name": self.name,
            "--tune.trials": TRIALS,
            "--tune.asha": "false",
            "--tune.max_concurrent": 1,
        } | {f"--tune.{key}": value for key, value in changes.items()}
        return [word for option in options.items() for word in option]

    def command(self, cluster: Cluster, **changes: object) -> list[str]:
        return job_command("tune", "--cluster.address", cluster.address, *self.options(**changes))


def trials(storage: Storage, run: SweepRun) -> list[dict[str, Any]]:
    table = pq.read_table(io.BytesIO(storage.read(f"{run.root}/sweeps/{run.name}/trials.parquet")))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("records/*.json"))]


def num_ended(folder: Path) -> int:
    return sum(record["state"] != "unfinished" for record in records(folder))


def is_under_way(folder: Path, number: int) -> Callable[[], bool]:
    """Return whether a trial has an epoch behind it and is not over."""
    trial = folder / "trials" / f"{number:04d}"
    return lambda: (trial / "history.parquet").exists() and num_ended(folder) == number


@pytest.fixture(scope="module")
def nodes(s3_server: S3Server) -> Iterator[Cluster]:
    with run_cluster(s3_server.environment(), num_cpus=NUM_CPUS) as running:
        yield running


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    prepared_set(folder / "data", SPLITS)
    return folder


def test_after_sigkill_the_same_command_repeats_no_finished_trial(root: Path, nodes: Cluster) -> None:
    run = SweepRun(str(root), "killed")
    folder = root / "sweeps" / "killed"
    kill_command(run.command(nodes), nodes, root / "log", when=is_under_way(folder, 2), timeout_s=TIMEOUT_S)
    before = records(folder)
    assert [record["state"] for record in before] == ["complete", "complete", "unfinished"]

    printed = succeed(run.command(nodes), nodes.environment)

    after = records(folder)
    assert after[:2] == before[:2]
    assert [record["state"] for record in after] == ["complete"] * TRIALS
    assert after[2]["params"] == before[2]["params"]
    assert "3 of 4 trials were started before; 1 unfinished, to be resumed" in printed
    assert "trial 0 begins" not in printed
    assert [row["number"] for row in trials(Storage(), run)] == list(range(TRIALS))
    done = run_command(run.command(nodes), nodes.environment)
    assert done.returncode == 2
    assert "has finished (4 trials)" in done.stderr


def test_a_killed_worker_and_a_killed_trial_are_retried(root: Path, nodes: Cluster) -> None:
    run = SweepRun(str(root), "disturbed")
    folder = root / "sweeps" / "disturbed"

    def kill_worker() -> None:
        titled_processes(nodes.nodes, TRAIN_WORKER)[0].kill()

    printed = disturb_command(
        run.command(nodes, trials=2), nodes, root / "log", when=is_under_way(folder, 0), then=kill_worker
    )

    assert "trial 0 failed (" in printed
    assert [row["num_failures"] for row in trials(Storage(), run)] == [1, 0]
    assert [row["state"] for row in trials(Storage(), run)] == ["complete"] * 2

    second = SweepRun(str(root), "disturbed-trial")
    printed = disturb_command(
        second.command(nodes, trials=2, max_failures=0),
        nodes,
        root / "log",
        when=is_under_way(root / "sweeps" / "disturbed-trial", 0),
        then=lambda: titled_processes(nodes.nodes, TRIAL)[0].kill(),
    )

    rows = trials(Storage(), second)
    assert [(row["state"], row["why"]) for row in rows] == [
        ("failed", "killed: its process died"),
        ("complete", ""),
    ]
    assert not titled_processes(nodes.nodes, TRAIN_WORKER)


def test_a_sweep_in_a_bucket_through_job_submit(
    s3_server: S3Server, nodes: Cluster, root: Path, s3_environment: S3Server
) -> None:
    bucket = Bucket.create(s3_server, BUCKET)
    bucket.upload(root / "data", "data")
    run = SweepRun(bucket.uri, "submitted")
    command = job_command("tune", *run.options(max_concurrent=2))

    printed = succeed(submit_command(nodes, command), nodes.environment)

    assert "4 of 4 ended" in printed
    rows = trials(Storage(), run)
    assert [row["state"] for row in rows] == ["complete"] * TRIALS
    (best,) = [row["number"] for row in rows if row["is_best"]]
    keys = bucket.keys("sweeps/submitted/")
    assert {key.split("/")[3] for key in keys if "/best/" in key and "/trials/" in key} == {f"{best:04d}"}
    for name in ("best.toml", "best/meta.json", "report.html", "study.journal", "sweep.json"):
        assert f"sweeps/submitted/{name}" in keys
    assert not [key for key in keys if key.startswith("sweeps/submitted/tune/")]

    (root / "best.toml").write_bytes(bucket.get("sweeps/submitted/best.toml"))
    again = job_command("train", "--config", root / "best.toml", "--cluster.address", nodes.address)
    succeed(again, nodes.environment)
    assert bucket.json("runs/submitted-best/run.json")["finished"] == "epochs"

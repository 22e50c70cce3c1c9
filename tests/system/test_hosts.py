"""All jobs on several hosts with a token and S3, while one host loses its power, one its network, and one joins."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import ROOT, job_command, run_command, start_command, succeed, wait_until
from hosts import Hosts, Network, can_make_hosts, run_hosts
from seaweedfs import Bucket, run_seaweedfs

from agr_ray.data.rendered import render_chip, render_photograph
from agr_ray.vision.decode import encode_jpeg

sys.path.append(str(ROOT / "tests" / "ray"))
from sets import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not can_make_hosts(), reason="needs root, iproute2 and unshare"),
]

NUM_CHIPS = 240
NUM_PHOTOGRAPHS = 2000
EPOCHS = 60
NUM_CPUS = {1: 2, 2: 4, 3: 4}
"""Logical CPUs by host. Workers don't fit on the head, which can't be lost without ending everything."""
PARTITION_S = 20.0
JOBS_TIMEOUT_S = 1200.0


@dataclass(frozen=True)
class Place:
    """A cluster of hosts, and a bucket that all of them reach."""

    hosts: Hosts
    bucket: Bucket

    def submit(self, name: str, *options: object) -> list[str]:
        """Return the command that submits a job, as documented, and waits for its end."""
        submission = ["ray", "job", "submit", "--address", self.hosts.dashboard, "--working-dir", str(ROOT), "--"]
        return [*submission, *job_command(name, *options)]

    def run(self, name: str, *options: object) -> str:
        return succeed(self.submit(name, *options), self.hosts.environment)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    network = Network()
    with network.running(), run_seaweedfs(tmp_path_factory.mktemp("s3"), address=network.address(254)) as server:
        bucket = Bucket.create(server, "hosts")
        labels = ["key,age,gender,race"]
        for index in range(NUM_CHIPS):
            chip = render_chip(0, index, side_px=120)
            bucket.put(f"faces/{index:03d}.jpg", encode_jpeg(chip.image_rgb))
            labels.append(f"{index:03d}.jpg,{chip.age_years},{chip.gender},{chip.race}")
        bucket.put("faces/labels.csv", "\n".join(labels).encode())
        body = encode_jpeg(render_photograph(0, 0, 1600, 1200, 1).image_rgb)
        for number in range(NUM_PHOTOGRAPHS):
            bucket.put(f"photographs/{number:04d}.jpg", body + number.to_bytes(2))  # its end is not decoded
        bucket.upload(checkpoint(tmp_path_factory.mktemp("model") / "model"), "model")
        with run_hosts(network, NUM_CPUS, server.environment()) as hosts:
            yield Place(hosts, bucket)


@pytest.fixture(scope="module")
def prepared(place: Place) -> str:
    uri = place.bucket.uri
    place.run(
        "prepare",
        *("--source.uri", f"{uri}/faces", "--prepare.out", f"{uri}/data", "--prepare.crop_side_px", 32),
        *("--split.val", 0.2, "--split.test", 0.2, "--source.name", "rendered"),
    )
    return f"{uri}/data"


def training(data: str, out: str) -> tuple[object, ...]:
    return (
        *("--train.data", data, "--train.out", out, "--train.name", "run", "--train.num_workers", 2),
        *("--train.threads_per_worker", 1, "--train.batch_size", 16, "--train.epochs", EPOCHS),
        *("--train.early_stopping_patience", 0, "--model.preset", "lightweight", "--model.image_size", 64),
    )


def test_jobs_survive_the_loss_the_isolation_and_the_arrival_of_hosts(
    place: Place, prepared: str, tmp_path: Path
) -> None:
    bucket, hosts = place.bucket, place.hosts
    train = place.submit("train", *training(prepared, f"{bucket.uri}/runs"))
    score = place.submit(
        "score",
        *("--score.checkpoint", f"{bucket.uri}/model", "--score.input", f"{bucket.uri}/photographs"),
        *("--score.out", f"{bucket.uri}/scores", "--score.rows_per_file", 20, "--score.num_workers", 2),
    )
    log = tmp_path / "train.log", tmp_path / "score.log"

    def num_epochs() -> int:
        key = "runs/run/history.parquet"
        return len(bucket.table(key)) if bucket.keys(key) else 0

    def num_parts() -> int:
        return sum("/parts/part-" in key for key in bucket.keys("scores-work/"))

    with ExitStack() as stack:
        trainer = stack.enter_context(start_command(train, hosts.environment, log[0]))
        wait_until(lambda: num_epochs() >= 3, trainer, log[0], JOBS_TIMEOUT_S, pause_s=1.0)
        scorer = stack.enter_context(start_command(score, hosts.environment, log[1]))
        wait_until(lambda: num_parts() >= 5, scorer, log[1], JOBS_TIMEOUT_S, pause_s=1.0)
        hosts.cut_power(3)
        hosts.add(4, NUM_CPUS[3])
        hosts.isolate(2, PARTITION_S)
        assert trainer.poll() is None, log[0].read_text()[-2000:]
        assert scorer.poll() is None, log[1].read_text()[-2000:]
        for process, text in ((scorer, log[1]), (trainer, log[0])):
            process.wait(JOBS_TIMEOUT_S)
            assert process.returncode == 0, text.read_text()[-3000:]

    rows = bucket.table("scores/images/").select(["uri", "status"]).to_pylist()
    uris = [f"{bucket.uri}/photographs/{number:04d}.jpg" for number in range(NUM_PHOTOGRAPHS)]
    assert sorted(row["uri"] for row in rows) == uris
    assert Counter(row["status"] for row in rows) == {"ok": NUM_PHOTOGRAPHS}
    assert sorted(bucket.table("scores/faces/")["uri"].to_pylist()) == uris
    history = bucket.table("runs/run/history.parquet")
    assert history["epoch"].to_pylist() == list(range(1, EPOCHS + 1))
    assert bucket.json("runs/run/run.json")["finished"] == "epochs"
    assert "resuming after epoch" in log[0].read_text()


def test_the_other_jobs_run_on_the_hosts_that_are_left(place: Place, prepared: str) -> None:
    bucket, uri = place.bucket, place.bucket.uri
    small = ("--model.preset", "lightweight", "--model.image_size", 32, "--train.batch_size", 16, "--train.epochs", 2)

    place.run(
        "tune",
        *("--config", "tune_lite", "--train.data", prepared, "--tune.out", f"{uri}/sweeps", "--tune.name", "small"),
        *(*small, "--tune.trials", 2, "--tune.max_concurrent", 1),
    )
    place.run(
        "compare",
        *("--train.data", prepared, "--compare.out", f"{uri}/compared", "--compare.image_size", 32, *small[4:]),
        *("--compare.presets", "lightweight,plain_cnn"),
    )
    place.run("report", f"{uri}/sweeps/small")

    assert bucket.table("sweeps/small/trials.parquet")["state"].to_pylist() == ["complete"] * 2
    assert sorted(bucket.table("compared/comparison.parquet")["preset"].to_pylist()) == ["lightweight", "plain_cnn"]
    assert b"<!doctype html>" in bucket.get("sweeps/small/report.html")[:100].lower()


def test_a_submission_without_the_right_token_is_rejected(place: Place) -> None:
    command = place.submit("prepare", "--help")
    assert "usage: " in succeed(command, place.hosts.environment)

    done = run_command(command, place.hosts.environment | {"RAY_AUTH_TOKEN": "0" * 64})

    assert done.returncode != 0
    assert "usage: " not in done.stdout

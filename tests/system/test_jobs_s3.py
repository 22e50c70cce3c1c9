"""The whole way as commands on s3:// URIs, on a real S3 server and a real cluster, also by `ray job submit`."""

from __future__ import annotations

import itertools
import runpy
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from commands import (
    ROOT,
    Cluster,
    job_command,
    job_environment,
    kill_command,
    run_command,
    submit_command,
    succeed,
)
from scoring_task import Task, assert_each_once, photograph
from seaweedfs import Bucket, S3Server
from servers import free_ports

from agr_ray.data.rendered import render_chip
from agr_ray.learn.run import CHECKPOINTS
from agr_ray.runtime.ray_compat import SNAPSHOT
from agr_ray.vision.decode import encode_jpeg

sys.path += [str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "ray")]
import bad_images
from sets import checkpoint

pytestmark = pytest.mark.timeout(900)

BUCKET = "jobs"
NUM_CHIPS = 60
EPOCHS = 8
EPOCHS_BEFORE_KILL = 2
RUN = "runs/tiny"
BAD_CHIPS = {
    "empty.jpg": (bad_images.empty, "not_an_image"),
    "text.jpg": (bad_images.text, "not_an_image"),
    "corrupt.jpg": (bad_images.corrupt_jpeg, "unreadable"),
    "half.jpg": (bad_images.truncated_jpeg, "unreadable"),
    "too old.jpg": (bad_images.jpeg, "fallback"),  # its other labels can be read
}
MISSING_CHIP = "labelled, not there.jpg"


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> Bucket:
    return Bucket.create(s3_server, BUCKET)


@pytest.fixture(scope="module")
def filled(bucket: Bucket) -> Bucket:
    """Put labelled chips, good and bad, into the bucket."""
    labels = ["key,age,gender,race"]
    for index in range(NUM_CHIPS):
        chip = render_chip(0, index, side_px=120)
        bucket.put(f"faces/{index:03d}.jpg", encode_jpeg(chip.image_rgb))
        labels.append(f"{index:03d}.jpg,{chip.age_years},{chip.gender},{chip.race}")
    for name, (body, _) in BAD_CHIPS.items():
        bucket.put(f"faces/{name}", body())
        labels.append(f"{name},{200 if name == 'too old.jpg' else 30},male,asian")
    labels.append(f'"{MISSING_CHIP}",30,male,asian')
    bucket.put("faces/labels.csv", "\n".join(labels).encode())
    return bucket


@pytest.fixture(scope="module")
def here(cluster: Cluster, s3_server: S3Server) -> tuple[str, ...]:
    """Return the options by which every job joins the cluster and reaches the S3 server."""
    return ("--cluster.address", cluster.address, "--storage.endpoint_url", s3_server.endpoint_url)


PREPARE = ("--source.name", "rendered", "--split.val", 0.15, "--split.test", 0.25, "--prepare.crop_side_px", 32)


@pytest.fixture(scope="module")
def prepared(filled: Bucket, cluster: Cluster, here: tuple[str, ...]) -> str:
    """Prepare the chips and return the key of the set."""
    where = ("--source.uri", f"{filled.uri}/faces", "--prepare.out", f"{filled.uri}/prepared")
    succeed(job_command("prepare", *here, *PREPARE, *where, "--prepare.num_workers", 1), cluster.environment)
    return "prepared"


@pytest.fixture(scope="module")
def trained(
    prepared: str,
    bucket: Bucket,
    cluster: Cluster,
    here: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Train on the set, SIGKILL the command after some epochs, run it again, and return what the second one printed."""
    command = job_command(
        "train",
        *(*here, "--train.data", f"{bucket.uri}/{prepared}", "--train.out", f"{bucket.uri}/runs"),
        *("--train.name", "tiny", "--train.epochs", EPOCHS, "--train.batch_size", 16),
        *("--train.num_workers", 1, "--train.threads_per_worker", 1, "--train.early_stopping_patience", 0),
        *("--model.backbone", "plain_cnn", "--model.image_size", 32),
    )
    history, snapshot = f"{RUN}/history.parquet", f"{RUN}/{CHECKPOINTS}/{SNAPSHOT}"

    def has_come_so_far() -> bool:
        """Return whether Ray has noted a checkpoint, which it does seconds later. It resumes only from those."""
        if not {history, snapshot} <= set(bucket.keys(f"{RUN}/")):
            return False
        return b"checkpoint_dir_name" in bucket.get(snapshot) and len(bucket.table(history)) >= EPOCHS_BEFORE_KILL

    kill_command(command, cluster, tmp_path_factory.mktemp("train") / "log", when=has_come_so_far, pause_s=0.2)
    assert len(bucket.table(history)) < EPOCHS
    return succeed(command, cluster.environment)


def test_prepare_accounts_for_every_object(prepared: str, bucket: Bucket) -> None:
    rows = bucket.table(f"{prepared}/crops/")
    status = dict(zip(rows["key"].to_pylist(), rows["status"].to_pylist(), strict=True))

    expected = {name: status for name, (_, status) in BAD_CHIPS.items()} | {MISSING_CHIP: "missing"}
    assert {name: status.pop(name) for name in expected} == expected
    assert sorted(status) == [f"{index:03d}.jpg" for index in range(NUM_CHIPS)]
    assert set(status.values()) <= {"ok", "fallback"}
    record = bucket.json(f"{prepared}/prepare.json")
    assert record["finished"]
    assert record["counts"] == Counter(rows["status"].to_pylist())


def test_a_prepared_set_is_not_prepared_again(
    prepared: str, bucket: Bucket, cluster: Cluster, here: tuple[str, ...]
) -> None:
    before = bucket.keys(f"{prepared}/crops/")
    where = ("--source.uri", f"{bucket.uri}/faces", "--prepare.out", f"{bucket.uri}/{prepared}")

    printed = succeed(job_command("prepare", *here, *PREPARE, *where), cluster.environment)

    assert f"{NUM_CHIPS + len(BAD_CHIPS) + 1} done before, 0 to do" in printed
    assert bucket.keys(f"{prepared}/crops/") == before


def test_a_killed_training_resumes_after_its_last_epoch(trained: str) -> None:
    (line,) = [line for line in trained.splitlines() if "resuming after epoch" in line]

    # An epoch whose checkpoint Ray had not noted yet when it was killed is trained again.
    assert int(line.partition("after epoch ")[2].partition(",")[0]) >= 1


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("name", ["best", "last"])
def test_training_leaves_complete_checkpoints(bucket: Bucket, name: str) -> None:
    names = {key.removeprefix(f"{RUN}/{name}/") for key in bucket.keys(f"{RUN}/{name}/")}

    assert {"weights.safetensors", "train_state.pt", "meta.json"} <= names
    epoch = bucket.json(f"{RUN}/{name}/meta.json")["metrics"]["epoch"]
    assert epoch in (range(1, EPOCHS + 1) if name == "best" else [EPOCHS])


@pytest.mark.usefixtures("trained")
def test_a_resumed_training_has_each_epoch_once_and_records_that_it_finished(bucket: Bucket) -> None:
    history = bucket.table(f"{RUN}/history.parquet")
    steps = history["step"].to_pylist()

    assert history["epoch"].to_pylist() == list(range(1, EPOCHS + 1))
    assert steps == [steps[0] * epoch for epoch in range(1, EPOCHS + 1)]
    assert bucket.json(f"{RUN}/run.json")["finished"]
    assert bucket.keys(f"{RUN}/tensorboard/")


@pytest.mark.usefixtures("trained")
def test_evaluate_measures_every_row_of_the_split(
    prepared: str, bucket: Bucket, cluster: Cluster, here: tuple[str, ...]
) -> None:
    where = ("--evaluate.checkpoint", f"{bucket.uri}/{RUN}/best", "--evaluate.data", f"{bucket.uri}/{prepared}")

    succeed(job_command("evaluate", *here, *where, "--evaluate.out", f"{bucket.uri}/measured"), cluster.environment)

    crops = bucket.table(f"{prepared}/crops/").to_pylist()
    expected = {row["key"] for row in crops if row["split"] == "test" and row["crop"] is not None}
    assert sorted(bucket.table("measured/predictions.parquet")["key"].to_pylist()) == sorted(expected)
    metrics = bucket.json("measured/metrics.json")
    assert metrics["n"] == len(expected)
    assert {"age", "gender", "race", "baseline", "groups"} <= set(metrics)


@pytest.fixture(scope="module")
def scored(bucket: Bucket, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, str]:
    """Score a few photographs once with random weights, and return what the command printed, too."""
    bucket.upload(checkpoint(tmp_path_factory.mktemp("model") / "model"), "model")
    task = Task(bucket, "scored", f"{bucket.uri}/model").fill(8)
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
    succeed(task.command(cluster, num_workers=1), cluster.environment)

    assert [record["num_images"] for record in task.records()] == [len(before), 5]
    with task.published(tmp_path) as database:
        rows = database.sql("SELECT uri FROM rows").fetchall()
        seen = database.sql("SELECT uri, status FROM images").fetchall()
    replaced = {task.uri("000.jpg"), task.uri("text.jpg")}
    expected = task.expected() | {task.uri("text.jpg"): "ok"}
    assert sorted(rows) == sorted((uri,) for uri in [*expected, *replaced])
    assert sorted(seen) == sorted(expected.items())


def test_a_submitted_job_runs_the_code_it_was_submitted_with(
    filled: Bucket, cluster: Cluster, s3_server: S3Server
) -> None:
    prepare = job_command(
        "prepare",
        *("--storage.endpoint_url", s3_server.endpoint_url, *PREPARE, "--vision.detector", "none"),
        *("--source.uri", f"{filled.uri}/faces", "--prepare.out", f"{filled.uri}/submitted"),
        *("--prepare.num_workers", 1),
    )
    script = f"python -c 'import agr_ray; print(agr_ray.__file__)' && {' '.join(prepare)}"

    printed = succeed(submit_command(cluster, ["sh", "-c", script]), cluster.environment)

    assert "succeeded" in printed
    assert "/working_dir_files/" in printed  # where Ray unpacks what was submitted
    assert filled.json("submitted/prepare.json")["finished"]
    assert len(filled.table("submitted/crops/")) == NUM_CHIPS + len(BAD_CHIPS) + 1


@pytest.mark.slow
def test_workers_without_access_to_the_bucket_end_the_job_with_one_line(
    filled: Bucket, cluster: Cluster, s3_server: S3Server
) -> None:
    where = ("--source.uri", f"{filled.uri}/faces", "--prepare.out", f"{filled.uri}/unreachable")
    command = job_command(
        "prepare", "--cluster.address", cluster.address, *where, *PREPARE, "--storage.max_attempts", 1
    )
    command += ["--prepare.outage_s", "5"]

    # Only the driver is told where the server is.
    done = run_command(command, cluster.environment | {"AWS_ENDPOINT_URL": s3_server.endpoint_url})

    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert cluster.environment["AWS_ENDPOINT_URL"] in last


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["no token", "wrong token"])
def test_nobody_without_the_token_submits_or_reads(cluster: Cluster, token: str | None) -> None:
    jobs = f"{cluster.dashboard}/api/jobs/"
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    known = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    entrypoint = f"echo {uuid.uuid4().hex}"

    answers = [
        requests.post(jobs, json={"entrypoint": entrypoint}, headers=headers, timeout=30),
        requests.put(f"{cluster.dashboard}/api/packages/gcs/x.zip", data=b"x", headers=headers, timeout=30),
        *(
            requests.get(f"{cluster.dashboard}{path}", headers=headers, timeout=30)
            for path in ("/api/jobs/", "/nodes?view=summary", "/api/v0/actors", "/api/v0/logs", "/api/cluster_status")
        ),
    ]

    assert [answer.status_code for answer in answers] == [401 if token is None else 403] * len(answers)
    submitted = requests.get(jobs, headers=known, timeout=30)
    assert submitted.status_code == 200
    assert entrypoint not in submitted.text


@pytest.mark.usefixtures("trained")
def test_ray_shows_no_secret_of_a_training_run(bucket: Bucket, cluster: Cluster) -> None:
    token = cluster.environment["RAY_AUTH_TOKEN"]
    paths = ("/api/jobs/", "/api/v0/jobs", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1", "/api/v0/runtime_envs")

    shown = {
        path: requests.get(f"{cluster.dashboard}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=60)
        for path in paths
    }

    assert {path: answer.status_code for path, answer in shown.items()} == dict.fromkeys(paths, 200)
    secrets = (bucket.server.secret_key, token)
    assert [path for path, answer in shown.items() if any(each in answer.text for each in secrets)] == []


def test_a_driver_with_a_wrong_token_does_not_join(cluster: Cluster) -> None:
    script = f"import ray; print('joining', flush=True); ray.init({cluster.address!r}); print('joined', flush=True)"
    command = [sys.executable, "-c", script]
    began = time.monotonic()
    assert succeed(command, cluster.environment).splitlines()[-1] == "joined"
    took_s = time.monotonic() - began

    environment = cluster.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "joining\n"
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=took_s)  # and its imports before; Ray may retry for minutes
        process.kill()
        assert process.stdout.read() == ""


FAULTS = ["wrong keys", "no bucket", "no endpoint"]
JOBS = {
    "prepare": ("--source.uri", "--prepare.out"),
    "train": ("--train.data",),
    "evaluate": ("--evaluate.checkpoint", "--evaluate.data"),
    "score": ("--score.checkpoint", "--score.input", "--score.out"),
}


@dataclass(frozen=True)
class Fault:
    """An unusable set-up: environment and bucket, and the names that the error must contain."""

    environment: dict[str, str]
    bucket: str
    named: tuple[str, ...]


def make_fault(kind: str, server: S3Server) -> Fault:
    environment = server.environment()
    if kind == "wrong keys":
        environment["AWS_SECRET_ACCESS_KEY"] = "wrong"
        return Fault(environment, BUCKET, (f"'{BUCKET}'", server.endpoint_url))
    if kind == "no bucket":
        return Fault(environment, "nobody-made-it", ("'nobody-made-it'", server.endpoint_url))
    environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{free_ports(1)[0]}"
    return Fault(environment, BUCKET, (f"'{BUCKET}'", environment["AWS_ENDPOINT_URL"]))


def faulty_command(job: str, fault: Fault) -> list[str]:
    options = itertools.chain.from_iterable((key, f"s3://{fault.bucket}/{uuid.uuid4().hex}") for key in JOBS[job])
    return job_command(job, *options, "--storage.max_attempts", 1)


def test_an_unusable_setup_ends_the_command_with_status_2(bucket: Bucket, tmp_path: Path) -> None:
    fault = make_fault("wrong keys", bucket.server)

    done = run_command(faulty_command("score", fault), job_environment(tmp_path, fault.environment))

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert not any(tmp_path.iterdir())  # Ray was not started


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("job", JOBS)
def test_every_job_names_unusable_settings(
    job: str,
    kind: str,
    s3_environment: S3Server,
    bucket: Bucket,  # there must be one that the wrong keys could open
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault = make_fault(kind, s3_environment)
    for name, value in fault.environment.items():
        monkeypatch.setenv(name, value)
    _, script, *arguments = faulty_command(job, fault)
    monkeypatch.setattr(sys, "argv", [script, *arguments])

    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")

    written = capsys.readouterr().err
    assert (ended.value.code, written[:7], written.count("\n")) == (2, "error: ", 1)
    assert all(name in written for name in fault.named), written

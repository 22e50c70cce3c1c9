"""The jobs as a user runs them: commands in processes of their own, a cluster to run them on, and the end of both."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray  # noqa: F401  # brings psutil, of which it carries a copy

# isort: split
import psutil
import requests
from seaweedfs import free_ports

ROOT = Path(__file__).parents[2]
COMMAND_TIMEOUT_S = 400.0
GONE_TIMEOUT_S = 20.0
CLUSTER_READY_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Cluster:
    """A running cluster, and the environment in which commands can talk to it."""

    address: str
    dashboard: str
    environment: dict[str, str]


@contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder with a short path, because the paths of Ray's sockets may have 107 bytes; delete it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="agr", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def job_environment(ray_folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a command: this process's, without what would make it join or use another cluster.

    `python` is this Python, and Ray keeps its files in `ray_folder`.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "AGR_RAY_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {
        "PATH": path,
        "RAY_TMPDIR": str(ray_folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Ray Train takes a worker's report no more often than this
        "COLUMNS": "200",
        **(more or {}),
    }


def job_command(name: str, *arguments: object) -> list[str]:
    """Return the command of one of the scripts in jobs/."""
    return ["python", f"jobs/{name}.py", *map(str, arguments)]


def run_command(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository to its end, whatever it returns."""
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )


def succeed(command: list[str], environment: Mapping[str, str]) -> str:
    """Run a command that must succeed, and return what it wrote to stdout."""
    done = run_command(command, environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def kill_command(command: list[str], environment: Mapping[str, str], log: Path, *, when: Callable[[], bool]) -> None:
    """Start a command, SIGKILL it and its process group once `when` is true, and wait until all it started is gone."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        try:
            while not when():
                assert process.poll() is None, f"ended by itself:\n{log.read_text(errors='replace')[-3000:]}"
                assert time.monotonic() < deadline, f"never came so far:\n{log.read_text(errors='replace')[-3000:]}"
                time.sleep(0.02)
        finally:
            kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process that leads its own group, the group, and whatever descends from it; wait until all are gone."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Ray's processes end with their driver, a moment later.
    _, alive = psutil.wait_procs(started, timeout=GONE_TIMEOUT_S)
    for each in alive:
        each.kill()
    psutil.wait_procs(alive, timeout=GONE_TIMEOUT_S)


@contextmanager
def run_cluster(more: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Run a cluster of one node and four logical CPUs, with `more` in its environment; end it, by its own ids."""
    agent = [f"dashboard-agent-{kind}-port" for kind in ("listen", "grpc")]
    names = ["port", "dashboard-port", *agent, "ray-client-server-port", "metrics-export-port"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    # Without a token, whoever reaches the dashboard runs code.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=4"]
    command += [f"--object-store-memory={256 * 2**20}", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    with short_folder() as folder:
        environment = job_environment(folder, token | dict(more or {}))
        log = folder / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, f"--temp-dir={folder}"],
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        cluster = Cluster(f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['dashboard-port']}", environment)
        try:
            _wait_for_jobs_api(cluster, process, log)
            yield cluster
        finally:
            kill_group(process)


def _wait_for_jobs_api(cluster: Cluster, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the cluster takes jobs."""
    deadline = time.monotonic() + CLUSTER_READY_TIMEOUT_S
    headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    last = "no answer"
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            answer = requests.get(f"{cluster.dashboard}/api/jobs/", headers=headers, timeout=5)
        except requests.RequestException as error:
            last = str(error)
        else:
            if answer.ok:
                return
            last = f"{answer.status_code} {answer.text}"
        time.sleep(0.3)
    raise AssertionError(f"no cluster after {CLUSTER_READY_TIMEOUT_S:g} s: {last}\n{log.read_text(errors='replace')}")

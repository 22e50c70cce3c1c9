"""Run jobs as a user does: commands in their own processes, on a cluster; and stop both."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray  # noqa: F401  # brings psutil, of which it carries a copy

# isort: split
import psutil

sys.path.append(str(Path(__file__).parents[2] / "cluster"))
from servers import NO_PRESTART, head_options, node_command, nodes_alive, ray_environment

ROOT = Path(__file__).parents[2]
COMMAND_TIMEOUT_S = 400.0
GONE_TIMEOUT_S = 20.0
CLUSTER_READY_TIMEOUT_S = 120.0
TRAIN_WORKER, TRAIN_CONTROLLER = "RayTrainWorker", "TrainController"
TRIAL = "ImplicitFunc"
"""In the titles of the processes in which Ray Tune waits for a trial's workers."""
OBJECT_STORE_MIB = 256
DATA_WORKER = "MapWorker"
"""In the titles of the processes that work on Ray Data's batches: prepare's and score's."""

Node = subprocess.Popen[bytes]
"""`ray start --block`, from which all processes of a node descend."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster, and the environment in which commands can talk to it."""

    address: str
    dashboard: str
    environment: dict[str, str]
    folder: Path
    """Ray's files, and a log of each node."""
    nodes: list[Node]
    """The head first. `kill_node` takes one out, `add_node` puts one in."""


@contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder with a short path, because the paths of Ray's sockets may have 107 bytes; delete it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="agr", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def job_environment(ray_folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a command: this process's, without variables that are meant for another cluster.

    `python` is this Python, and Ray keeps its files in `ray_folder`.
    """
    others = ("RAY_ADDRESS", "RAY_TRAIN_", "AGR_RAY_")  # tests/ray/conftest.py sets one of Ray Train
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {
        "PATH": path,
        "RAY_TMPDIR": str(ray_folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Ray Train takes a worker's report no more often than this
        "COLUMNS": "200",
        **(more or {}),
    }


# Commands


def job_command(name: str, *arguments: object) -> list[str]:
    """Return the command of one of the scripts in jobs/."""
    return ["python", f"jobs/{name}.py", *map(str, arguments)]


def submit_command(cluster: Cluster, command: list[str]) -> list[str]:
    """Return the command that submits a command with the repository to the cluster, and waits for its end."""
    return ["ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT), "--", *command]


def run_command(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository to its end, whatever it returns."""
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )


RAY_NOISE = re.compile(
    r"core_worker|raylet|RayTrainWorker|pid=\d|DeprecationWarning|Progress bars|execution finished|Token authentication"
)


def succeed(command: list[str], environment: Mapping[str, str]) -> str:
    """Run a command that must succeed and print nothing of Ray's internals, and return what it wrote to stdout."""
    done = run_command(command, environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    noise = RAY_NOISE.search(done.stdout + done.stderr)
    assert noise is None, f"{' '.join(command)}\n{noise and noise.string}"
    return done.stdout


def kill_command(
    command: list[str],
    cluster: Cluster,
    log: Path,
    *,
    when: Callable[[], bool],
    timeout_s: float = COMMAND_TIMEOUT_S,
    pause_s: float = 0.05,
) -> None:
    """Start a command, SIGKILL it and its process group once `when` is true, and wait until all it started is gone."""
    with start_command(command, cluster.environment, log) as process:
        wait_until(when, process, log, timeout_s, pause_s)
    # Its workers are the cluster's, which ends them a moment later.
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while titled_processes(cluster.nodes, DATA_WORKER):
        assert time.monotonic() < deadline, f"still at work {GONE_TIMEOUT_S:g} s after their driver was killed"
        time.sleep(0.1)


def disturb_command(
    command: list[str], cluster: Cluster, log: Path, *, when: Callable[[], bool], then: Callable[[], object]
) -> str:
    """Start a command that must succeed, do `then` once `when` is true, and return what it wrote."""
    with start_command(command, cluster.environment, log) as process:
        wait_until(when, process, log)
        then()
        wait_until(lambda: process.poll() is not None, process, log)
        assert process.returncode == 0, _tail(log)
    return log.read_text(errors="replace")


@contextmanager
def start_command(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command that writes into `log`; SIGKILL it and all that it started when the block ends."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            kill_group(process)


def wait_until(
    when: Callable[[], bool],
    process: subprocess.Popen[bytes],
    log: Path,
    timeout_s: float = COMMAND_TIMEOUT_S,
    pause_s: float = 0.05,
) -> None:
    """Return once `when` is true; fail if the process ends before, or takes too long."""
    deadline = time.monotonic() + timeout_s
    while not when():
        assert process.poll() is None, f"ended by itself with {process.returncode}:\n{_tail(log)}"
        assert time.monotonic() < deadline, f"never came so far in {timeout_s:g} s:\n{_tail(log)}"
        time.sleep(pause_s)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


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


# Clusters


@contextmanager
def run_cluster(more: Mapping[str, str] | None = None, num_cpus: Sequence[int] = (4,)) -> Iterator[Cluster]:
    """Run a cluster with `more` in its environment, one node for each number of logical CPUs, the head first.

    In the end all nodes are ended, by their own ids.
    """
    with short_folder() as folder:
        options, address, dashboard = head_options(folder)
        environment = job_environment(folder, ray_environment() | NO_PRESTART | dict(more or {}))
        cluster = Cluster(address, dashboard, environment, folder, nodes=[])
        try:
            _start_node(cluster, num_cpus[0], options)
            for each in num_cpus[1:]:
                add_node(cluster, each)
            yield cluster
        finally:
            for node in reversed(cluster.nodes):
                kill_group(node)


def add_node(cluster: Cluster, num_cpus: int) -> None:
    """Start one more node, and return once the cluster has it."""
    _start_node(cluster, num_cpus, [f"--address={cluster.address}"])


def kill_node(cluster: Cluster, node: Node) -> None:
    """SIGKILL all processes of a node."""
    cluster.nodes.remove(node)
    kill_group(node)


def titled_processes(nodes: Sequence[Node], title: str) -> list[psutil.Process]:
    """Return the processes of the nodes in whose titles, which Ray sets, is `title`."""
    found = []
    for node in nodes:
        for process in psutil.Process(node.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
    return found


def _start_node(cluster: Cluster, num_cpus: int, options: Sequence[str]) -> None:
    log = cluster.folder / f"{uuid.uuid4().hex}.log"
    with log.open("wb") as file:
        node = subprocess.Popen(
            node_command(num_cpus, OBJECT_STORE_MIB, options),
            cwd=cluster.folder,
            env=cluster.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    cluster.nodes.append(node)
    wait_until(lambda: _is_complete(cluster), node, log, CLUSTER_READY_TIMEOUT_S, pause_s=0.3)


def _is_complete(cluster: Cluster) -> bool:
    """Say whether the cluster has the nodes that it should have, and no dead one any more."""
    return nodes_alive(cluster.dashboard, cluster.environment["RAY_AUTH_TOKEN"]) == len(cluster.nodes)

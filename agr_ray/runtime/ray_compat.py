"""Uses of undocumented parts of Ray, each with its reason. Written for Ray 2.60.0.

`tests/unit/test_ray_compat.py` has a test for each, which fails if Ray changes it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import ray
from ray._private import worker as ray_worker
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._private.utils import get_num_cpus
from ray.autoscaler._private.util import format_readonly_node_type
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.train.v2._internal import constants
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainRunContext

from agr_ray.console import make_console
from agr_ray.json_log import print_at_once
from agr_ray.redact import printable

__all__ = ["ControllerCallback", "TrainRunContext"]
# ControllerCallback: no public callback runs in Ray Train's controller, where a run that has lost its lock must end.
# TrainRunContext: the type of an argument of Ray's public callbacks.

SEEN_WITH: Final = "2.60.0"

# Cluster

NO_PRESTART: Final = "RAY_prestart_worker_first_driver"
"""Environment variable of the raylet: "0" starts no worker processes in advance. One for each logical CPU would keep a
small machine busy for half a minute."""


def machine_cpus() -> int:
    """Return the CPUs that this process may use: of the machine, or of its container.

    Ray counts them by itself for a local cluster; Python's own counts ignore a container's CPU quota.
    """
    return max(1, int(get_num_cpus(override_docker_cpu_warning=True)))


def has_autoscaler() -> bool:
    """Return whether the cluster adds nodes by itself, which no public function says.

    Every head node has a monitor that reports the nodes' types. Without an autoscaler, the types are made up, one for
    each node, named by its id.
    """
    if is_autoscaler_v2(fetch_from_server=True):
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        found = [node for group in (status.active_nodes, status.idle_nodes) for node in group]
        types = [node.ray_node_type_name for node in found]
    else:
        body = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
        report = json.loads(body).get("autoscaler_report") if body else None
        types = list((report or {}).get("active_nodes", {}))
    made_up = {format_readonly_node_type(node["NodeID"]) for node in ray.nodes()}  # type: ignore[no-untyped-call]  # Ray leaves it bare
    return any(name and name not in made_up for name in types)


def set_flag(name: str) -> None:
    """Set a flag that all processes of the cluster can read. With public functions, that needs another process."""
    _internal_kv_put(name, b"1")


def has_flag(name: str) -> bool:
    """Return whether a process of the cluster has set the flag."""
    return _internal_kv_get(name) is not None


# Console

FOR_USER: Final = re.compile(r"agr_ray ([\d.]+): (.*)", re.DOTALL)
"""A line that a worker prints for the user: its number, and its text."""
_NUM_REMEMBERED: Final = 1000
_LEVEL: Final = "RAY_BACKEND_LOG_LEVEL"
_STDERR: Final = 2
_RESOURCE_RAN_OUT: Final = re.compile(r"due to memory pressure|out of disk|disk is full|% full", re.IGNORECASE)
"""Matches the raylet's reports of a full memory or disk."""


def print_for_user(line: str) -> None:
    """Print a line in a worker that the driver shows its user. `print` would print it twice in Ray Train's workers."""
    sys.stdout.write(f"agr_ray {time.time_ns()}.{os.getpid()}: {printable(line)}\n")
    sys.stdout.flush()


@contextmanager
def _quiet_connect() -> Iterator[None]:
    """Around `ray.init`: let Ray's C++ code in this process log fatal errors only, unless the user has set its level.

    It logs warnings about its own actors as errors, straight to stderr. It reads the level when the driver connects,
    and then announces it on stderr. The processes of a local cluster have started by then and keep their level.
    """
    connect = ray_worker.connect

    def connect_quietly(*args: Any, **options: Any) -> Any:
        if _LEVEL in os.environ:
            return connect(*args, **options)
        os.environ[_LEVEL] = "fatal"
        stderr = os.dup(_STDERR)
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), _STDERR)
        try:
            return connect(*args, **options)
        finally:
            os.dup2(stderr, _STDERR)
            os.close(stderr)
            del os.environ[_LEVEL]

    ray_worker.connect = connect_quietly
    try:
        yield
    finally:
        ray_worker.connect = connect


@contextmanager
def quiet_console() -> Iterator[None]:
    """Print what workers print for the user, without Ray's prefix, and hide Ray's own messages.

    Events of the autoscaler and reports of a node that runs out of memory or disk are still printed. Call it in the
    driver, around `ray.init`. Ray itself forwards the output of all processes, or of none, and if a machine runs
    several nodes, each of them forwards every line.
    """
    ray_prints = ray_worker.print_to_stdstream
    printed: deque[str] = deque(maxlen=_NUM_REMEMBERED)

    def print_lines(data: dict[str, Any], ignore_prefix: bool) -> None:
        lines = data["lines"]
        if data["pid"] == "raylet":
            lines = [line for line in lines if _RESOURCE_RAN_OUT.search(line)]
        elif data["pid"] != "autoscaler":
            for line in lines:
                match = FOR_USER.fullmatch(line)
                if match and match[1] not in printed:
                    printed.append(match[1])
                    make_console().print(match[2])
            return
        if lines:
            ray_prints(data | {"lines": lines}, ignore_prefix)

    ray_worker.print_to_stdstream = print_lines
    try:
        with _quiet_connect():
            yield
    finally:
        ray_worker.print_to_stdstream = ray_prints


# Ray Data

DATA_LOGGERS: Final = ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state")
"""Loggers that print a traceback of each error that ends the work, which is raised as well."""


class PacedExecution(ExecutionCallback):
    """Makes Ray Data's scheduling loop rest between steps.

    The loop waits for tasks only while one runs. While finished blocks wait for the trainer, it spins and takes a core
    of a small machine.
    """

    REST_S: Final = 0.01

    def on_execution_step(self, executor: object) -> None:  # noqa: ARG002  # Ray's signature
        """Rest."""
        time.sleep(self.REST_S)


def pace_ray_data(context: DataContext) -> None:
    """Make executions rest between steps, and log no traceback of errors that are raised."""
    context.custom_execution_callback_classes = [PacedExecution]
    for name in DATA_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


# Ray Tune


@contextmanager
def graceful_interrupts() -> Iterator[Callable[[], bool]]:
    """Around `Tuner.fit`: on the first SIGINT, print a line and let Tune end its trials; on the second, end at once.

    Tune does that on SIGUSR1, silently. Its own handler of SIGINT must be disabled. Yields a function that returns
    whether there was a SIGINT.
    """
    count = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before, before_usr1 = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1 and callable(before):
            before(signum, frame)
        print_at_once("stopping the trials; press Ctrl-C again to end at once")
        signal.raise_signal(signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, signal.default_int_handler)  # until Tune installs its own, while it starts
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGUSR1, before_usr1)


# Ray Train

SNAPSHOT: Final = constants.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
"""File in which Ray Train names its complete checkpoints. What it does not name was being uploaded when its worker was
killed, and Ray Train never deletes that."""
_ADDRESS: Final = "RAY_ADDRESS"


def limit_worker_start(timeout_s: float) -> None:
    """Give a fixed number of workers this long to start, unless the environment says otherwise; no argument does."""
    os.environ.setdefault(constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, f"{timeout_s:g}")


def could_not_start(error: Exception) -> bool:
    """Return whether Ray Train could not start workers, after several attempts."""
    failure = getattr(error, "controller_failure", None)
    return isinstance(failure, WorkerGroupStartupFailedError | WorkerGroupStartupTimeoutError)


@contextmanager
def named_cluster() -> Iterator[None]:
    """Tell all processes that Ray Train starts which cluster they belong to.

    After a kill, for example of a trial that ASHA stops, another process frees the workers' resources. It looks for the
    cluster by itself. If the machine runs two clusters, it finds neither, and the resources stay reserved until the job
    ends.
    """
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = ray.get_runtime_context().gcs_address
    constants.ENV_VARS_TO_PROPAGATE.add(_ADDRESS)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADDRESS]
        else:
            os.environ[_ADDRESS] = before


def abort_training(controller: Any) -> None:
    """Make Ray Train's controller, an actor, stop its workers and end; public functions only work in the driver."""
    controller.abort.remote()

"""Join or start the Ray cluster that does the work, and check that the work fits it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Final, TypeVar

import ray
from ray.data import DataContext
from ray.util.placement_group import placement_group, remove_placement_group

from agr_ray.config import ClusterConfig
from agr_ray.console import make_console
from agr_ray.errors import ConfigError, JobError
from agr_ray.placement import places, process_bundles
from agr_ray.runtime.ray_compat import NO_PRESTART, has_autoscaler, machine_cpus, pace_ray_data, quiet_console

MIN_LOCAL_CPUS: Final = 8
"""Fewest logical CPUs of a local cluster: actors that hold all CPUs leave none for Ray Data to read and write with."""

T = TypeVar("T")

_LOOK_EVERY_S: Final = 1.0
_MOST_BUNDLES: Final = 10_000
"""Maximum number of processes to request from an autoscaler; a larger number is a mistake."""
_autoscaler_wait_s: ContextVar[float] = ContextVar("autoscaler_wait_s", default=0.0)
"""`cluster.autoscaler_wait_s`, inside `cluster`."""


@contextmanager
def cluster(config: ClusterConfig, *, trains: bool = False) -> Iterator[None]:
    """Join the configured cluster, or start one in this process and end it afterwards.

    Does nothing if this process is connected already: the tests share one cluster.

    Args:
        config: says which.
        trains: whether the job trains networks.

    Raises:
        ConfigError: there is no cluster at the address.
        JobError: Ray does not start.
    """
    waiting = _autoscaler_wait_s.set(config.autoscaler_wait_s)
    try:
        with nullcontext() if config.verbose else quiet_console(), _joined(config, trains):
            yield
    finally:
        _autoscaler_wait_s.reset(waiting)


@contextmanager
def _joined(config: ClusterConfig, trains: bool) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    level = logging.INFO if config.verbose else logging.ERROR
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address == "local":
            make_console().print("starting Ray on this machine")
            os.environ.setdefault(NO_PRESTART, "0")
            ray.init(
                address="local",
                num_cpus=config.num_cpus or max(machine_cpus(), MIN_LOCAL_CPUS),
                object_store_memory=config.object_store_mib * 2**20,
                include_dashboard=trains if config.include_dashboard is None else config.include_dashboard,
                logging_level=level,
            )
        else:
            ray.init(address=address, logging_level=level)
    except (ConnectionError, ValueError) as error:
        said = "Ray refuses to start" if address == "local" else "no Ray cluster answers there"
        raise ConfigError(f"cluster.address {address}: {said}: {' '.join(str(error).split())}") from None
    except Exception as error:  # Ray raises a plain Exception if its processes do not start in time
        raise JobError(
            f"Ray did not start at cluster.address {address}: {' '.join(str(error).split())}; if the machine is busy "
            "or short of memory, free some and run the command again"
        ) from error
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has installed its own, which exits without a word
    try:
        yield
    finally:
        ray.shutdown()


def configure_ray_data() -> None:
    """Configure Ray Data for our jobs; call it in the process that builds a dataset."""
    context = DataContext.get_current()
    # We show our own progress. Without a terminal, Ray Data logs a page every ten seconds.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # An error that ends the work is raised in the driver, as an instance of its class in the worker, so it need not be
    # logged as well.
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # A small input needs fewer.
    warnings.filterwarnings("ignore", "The (maximum|minimum) number of concurrent (tasks|actors) for ")
    pace_ray_data(context)


def check_fits(
    purpose: str, num_processes: int, cpus_each: float, gpus_each: float = 0.0, spare_cpus: float = 1.0
) -> None:
    """Check that the cluster has the CPUs and GPUs that a plan needs; without them it would wait forever.

    If the cluster has an autoscaler, ask it for nodes and wait for up to `cluster.autoscaler_wait_s`.

    Raises:
        ConfigError: the cluster is too small; the message says what is needed and what exists.
    """
    bundles = process_bundles(num_processes, cpus_each, gpus_each, spare_cpus)
    wait_for_nodes(lambda: refuse_misfit(purpose, num_processes, cpus_each, gpus_each, spare_cpus), bundles, purpose)


def wait_for_nodes(check: Callable[[], T], bundles: Sequence[Mapping[str, float]], purpose: str) -> T:
    """Return what `check` returns, at once or once the cluster's autoscaler has added nodes.

    A placement group asks for the resources. Ray removes it when this job ends, however it ends.

    Args:
        check: raises ConfigError while the cluster is too small.
        bundles: resources that are needed, each on one node.
        purpose: the configuration key that asks for them.

    Raises:
        ConfigError: from `check`, if there is no autoscaler or `cluster.autoscaler_wait_s` has passed.
    """
    try:
        return check()
    except ConfigError:
        wait_s = _autoscaler_wait_s.get()
        if not wait_s or not bundles or len(bundles) > _MOST_BUNDLES or not has_autoscaler():
            raise
    cpus, gpus = (sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU"))
    asked = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    make_console().print(f"waiting for the autoscaler to add nodes for {purpose}: {asked}; {wait_s:g} s at most")
    group = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")
    until_s = time.monotonic() + wait_s
    try:
        while True:
            time.sleep(_LOOK_EVERY_S)
            try:
                return check()
            except ConfigError as error:
                if time.monotonic() > until_s:
                    raise ConfigError(f"{error}. Its autoscaler added too few nodes within {wait_s:g} s") from None
    finally:
        remove_placement_group(group)


def refuse_misfit(
    purpose: str, num_processes: int, cpus_each: float, gpus_each: float = 0.0, spare_cpus: float = 1.0
) -> None:
    """Check that a plan fits the cluster as it is.

    A process runs on one node. So resources that are left over on a node only count towards `spare_cpus`, which Ray
    Data's tasks need to read and write.

    Raises:
        ConfigError: it does not fit; the message says what is needed and what exists.
    """
    resources = _resources()
    more_cpus = "give a local cluster more logical CPUs with cluster.num_cpus"
    for kind, each, spare, remedy in (
        ("CPU", cpus_each, spare_cpus, more_cpus),
        ("GPU", gpus_each, 0.0, "leave use_gpu out"),
    ):
        asked, has = num_processes * each + (spare if each else 0.0), resources.get(kind, 0.0)
        if asked > has:
            beside = f" and {spare:g} for reading and writing" if spare else ""
            raise ConfigError(
                f"{purpose} asks for {num_processes} x {each:g} {kind}{beside}, {asked:g} in all; "
                f"the cluster has {has:g}. Ask for fewer workers, or {remedy}"
            )
    num_places = sum(places(node, cpus_each, gpus_each) for node in nodes())
    if num_places < num_processes:
        one = f"{cpus_each:g} CPU" + (f" and {gpus_each:g} GPU" if gpus_each else "")
        raise ConfigError(
            f"{purpose} asks for {num_processes} x {one}, each on one node; the cluster's nodes have room for "
            f"{num_places}"
        )


def worker_count(num_workers: int | None, *, use_gpu: bool = False, besides: int = 0) -> int:
    """Return the configured number of processes, or one for each GPU, or one for each spare CPU.

    `besides` is the number of other processes that take a logical CPU each.
    """
    if num_workers is not None:
        return num_workers
    if use_gpu:
        return max(1, int(_resources().get("GPU", 0.0)))
    spare = int(_resources().get("CPU", 1.0)) - 1 - besides
    return max(1, min(machine_cpus(), spare) if len(nodes()) == 1 else spare)


def nodes() -> list[dict[str, float]]:
    """Return the resources of each live node, by Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray leaves it bare


def _resources() -> dict[str, float]:
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]  # Ray leaves it bare

"""Join or start the Ray cluster that does the work, and check that the work fits it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from agr_ray.config import ClusterConfig, ConfigError

MIN_LOCAL_CPUS = 8
"""Logical CPUs of a local cluster at least: actors that hold all CPUs leave Ray Data none to read and write with."""


@contextmanager
def cluster(config: ClusterConfig) -> Iterator[None]:
    """Join the configured cluster, or start one in this process and end it afterwards.

    Does nothing where this process is connected already: the tests share one cluster among them.

    Raises:
        ConfigError: if there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        if address == "local":
            # A process for each logical CPU, started in advance, would keep a small machine busy for half a minute.
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
            ray.init(
                address="local",
                num_cpus=config.num_cpus or max(os.cpu_count() or 1, MIN_LOCAL_CPUS),
                object_store_memory=config.object_store_mib * 2**20,
                include_dashboard=config.include_dashboard,
                logging_level=logging.WARNING,
            )
        else:
            ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"cluster.address {address}: no Ray cluster answers there: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def check_fits(
    purpose: str, num_processes: int, cpus_each: float, gpus_each: float = 0.0, spare_cpus: float = 1.0
) -> None:
    """Refuse a plan that would wait for ever for CPUs or GPUs that the cluster does not have.

    `spare_cpus` are left for Ray Data's own tasks, which read and write.

    Raises:
        ConfigError: with what is asked and what there is.
    """
    resources = _resources()
    for kind, each, spare in (("CPU", cpus_each, spare_cpus), ("GPU", gpus_each, 0.0)):
        asked, has = num_processes * each + (spare if each else 0.0), resources.get(kind, 0.0)
        if asked > has:
            beside = f" and {spare:g} for reading and writing" if spare else ""
            raise ConfigError(
                f"{purpose} asks for {num_processes} x {each:g} {kind}{beside}, {asked:g} in all; "
                f"the cluster has {has:g}. Ask for fewer workers, or give a local cluster more logical CPUs "
                "with cluster.num_cpus"
            )


def worker_count(num_workers: int | None) -> int:
    """Return the configured number of processes, or as many as the smaller of physical and spare logical CPUs."""
    if num_workers is not None:
        return num_workers
    spare = int(_resources().get("CPU", 1.0)) - 1
    is_local = sum(node["Alive"] for node in ray.nodes()) == 1  # type: ignore[no-untyped-call]  # Ray leaves it bare
    return max(1, min(os.cpu_count() or 1, spare) if is_local else spare)


def _resources() -> dict[str, float]:
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]  # Ray leaves it bare

"""How many trials of a sweep fit a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agr_ray.config import TrainConfig
from agr_ray.errors import ConfigError
from agr_ray.learn.resources import spare_cpus
from agr_ray.placement import ROUNDING, places, process_bundles

TRIAL_CPUS: Final = 0.001
"""Logical CPUs of the process that waits for a trial's workers."""


@dataclass(frozen=True)
class Room:
    """How much of the cluster a sweep uses."""

    num_trials: int
    """Number of concurrent trials."""
    threads_per_worker: int | None
    """Threads that a worker computes with; None: as many as without other trials."""


def trial_bundles(config: TrainConfig) -> list[dict[str, float]]:
    """Return the resource bundles of a trial, each for one node, by Ray's names.

    The trial's own process reserves next to nothing, because it only waits for its workers.
    """
    gpus_each = config.gpus_per_worker if config.use_gpu else 0.0
    bundles = process_bundles(config.max_workers, config.cpus_per_worker, gpus_each, spare_cpus(config))
    return [{"CPU": TRIAL_CPUS}, *bundles]


def room_for(
    config: TrainConfig, asked: int | None, has_each: Sequence[Mapping[str, float]], machine_cpus: int, key: str
) -> Room:
    """Return the number of concurrent trials and of threads per worker.

    Args:
        config: of a trial.
        asked: number of trials; None: as many as fit.
        has_each: resources of each node, by Ray's names.
        machine_cpus: CPUs of this machine; used only if it is the only node.
        key: the setting that asks for them.

    Raises:
        ConfigError: no trial fits, or fewer than requested.
    """
    fits = trials_that_fit(has_each, config)
    if fits < (asked or 1):
        has = ", ".join(f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in has_each)
        gpus = f" and {config.gpus_per_worker:g} GPU" if config.use_gpu else ""
        raise ConfigError(
            f"{key} {asked or 1}: each trial asks for {config.max_workers} x "
            f"{config.cpus_per_worker:g} CPU{gpus} (train.num_workers) and {spare_cpus(config):g} CPU for reading; the "
            f"cluster has room for {fits}: its nodes have {has}. Ask for fewer trials or workers, or give a local "
            "cluster more logical CPUs with cluster.num_cpus"
        )
    cores = machine_cpus if len(has_each) == 1 else None
    num_trials = asked or fits
    if cores is not None and asked is None and not config.use_gpu:
        num_trials = min(num_trials, max(1, cores // config.max_workers))  # logical CPUs are not cores
    return Room(num_trials, _threads(config, num_trials, cores))


def trials_that_fit(has_each: Sequence[Mapping[str, float]], config: TrainConfig) -> int:
    """Return the number of trials that fit the cluster: each worker on one node, CPUs for reading on any.

    Args:
        has_each: resources of each node, by Ray's names.
        config: of a trial.
    """
    gpus_each = config.gpus_per_worker if config.use_gpu else 0.0
    slots = 0
    for has in has_each:
        # A trial's own process may be on any node. A worker needs all its CPUs at once; reading tasks can take turns.
        left = max(has.get("CPU", 0.0) - TRIAL_CPUS, 0.0)
        slots += places({**has, "CPU": left}, config.cpus_per_worker, gpus_each)
    cpus = sum(has.get("CPU", 0.0) for has in has_each)
    each = config.max_workers * config.cpus_per_worker + spare_cpus(config)
    return min(slots // config.max_workers, int(cpus / each + ROUNDING))


def _threads(config: TrainConfig, num_trials: int, cores: int | None) -> int | None:
    """Return a worker's threads: if several trials share a machine, none may take all of its cores."""
    if config.threads_per_worker is not None or num_trials == 1:
        return config.threads_per_worker
    if cores is None:
        return max(1, round(config.cpus_per_worker))
    return max(1, cores // (num_trials * config.max_workers))

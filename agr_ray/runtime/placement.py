"""How many trials of a sweep a cluster has room for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import ray

from agr_ray.config import ConfigError, TrainConfig
from agr_ray.runtime.cluster import machine_cpus
from agr_ray.runtime.trainer import spare_cpus

TRIAL_CPUS: Final = 0.001
"""Of the process that waits for a trial's workers."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Room:
    """What a sweep may use."""

    num_trials: int
    """At the same time."""
    threads_per_worker: int | None
    """That a worker computes with; None: as it would alone."""


def room(config: TrainConfig, asked: int | None) -> Room:
    """Return how many trials run at the same time, and with how many threads a worker.

    A trial's process itself asks for next to nothing: it waits for its workers.

    Args:
        config: of a trial.
        asked: tune.max_concurrent.

    Raises:
        ConfigError: not one trial fits, or not as many as are asked for.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    fits = trials_that_fit(nodes, config)
    if fits < (asked or 1):
        has = ", ".join(f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes)
        gpus = f" and {config.gpus_per_worker:g} GPU" if config.use_gpu else ""
        raise ConfigError(
            f"tune.max_concurrent {asked or 1}: each trial asks for {config.max_workers} x "
            f"{config.cpus_per_worker:g} CPU{gpus} (train.num_workers) and {spare_cpus(config):g} CPU for reading; the "
            f"cluster has room for {fits}: its nodes have {has}. Ask for fewer trials or workers, or give a local "
            "cluster more logical CPUs with cluster.num_cpus"
        )
    cores = machine_cpus() if len(nodes) == 1 else None
    num_trials = asked or fits
    if cores is not None and asked is None and not config.use_gpu:
        num_trials = min(num_trials, max(1, cores // config.max_workers))  # logical CPUs are no cores
    return Room(num_trials, _threads(config, num_trials, cores))


def trials_that_fit(nodes: Sequence[Mapping[str, float]], config: TrainConfig) -> int:
    """Return for how many trials there are resources: each worker on one node, and CPUs for reading on any.

    Args:
        nodes: what each has, by Ray's names.
        config: of a trial.
    """
    slots = 0
    for node in nodes:
        # A trial's own process may be on any node, and a worker needs its CPUs whole; what reads only takes turns.
        shares = [max(node.get("CPU", 0.0) - TRIAL_CPUS, 0.0) / config.cpus_per_worker]
        if config.use_gpu:
            # A worker takes its share of one GPU.
            shares.append(node.get("GPU", 0.0) * math.floor(1.0 / config.gpus_per_worker + _ROUNDING))
        slots += math.floor(min(shares) + _ROUNDING)
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    each = config.max_workers * config.cpus_per_worker + spare_cpus(config)
    return min(slots // config.max_workers, math.floor(cpus / each + _ROUNDING))


def _threads(config: TrainConfig, num_trials: int, cores: int | None) -> int | None:
    """Return a worker's threads: where several trials share a machine, none may take all of its cores."""
    if config.threads_per_worker is not None or num_trials == 1:
        return config.threads_per_worker
    if cores is None:
        return max(1, round(config.cpus_per_worker))
    return max(1, cores // (num_trials * config.max_workers))

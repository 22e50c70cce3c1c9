"""Placement of processes on the nodes of a cluster; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

ROUNDING: Final = 1e-9
"""Tolerance for a quotient of resources that should be a whole number."""


def process_bundles(
    num_processes: int, cpus_each: float, gpus_each: float, spare_cpus: float
) -> list[dict[str, float]]:
    """Return the bundles of a Ray placement group: one for each process, and one for each spare CPU."""
    each = {kind: asked for kind, asked in (("CPU", cpus_each), ("GPU", gpus_each)) if asked}
    spare = [{"CPU": 1.0}] * math.ceil(spare_cpus) if cpus_each else []
    return [each] * num_processes + spare if each else spare


def places(has: Mapping[str, float], cpus_each: float, gpus_each: float) -> int:
    """Return how many processes fit on a node. A fraction of a GPU must be of a single GPU.

    Args:
        has: the node's resources, by Ray's names.
        cpus_each: CPUs of a process; 0 if it needs GPUs only.
        gpus_each: GPUs of a process, at most 1; 0 if it needs CPUs only.
    """
    fits = [has.get("CPU", 0.0) / cpus_each] if cpus_each else []
    if gpus_each:
        fits.append(has.get("GPU", 0.0) * int(1.0 / gpus_each + ROUNDING))
    return int(min(fits) + ROUNDING)

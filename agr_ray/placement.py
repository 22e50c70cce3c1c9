"""How processes fit the nodes of a cluster; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

ROUNDING: Final = 1e-9
"""Tolerance for a quotient of resources that should be a whole number."""


def process_bundles(
    num_processes: int, cpus_each: float, gpus_each: float, spare_cpus: float
) -> list[dict[str, float]]:
    """Return what processes ask for, each on one node, by Ray's names; and each spare CPU by itself."""
    each = {kind: asked for kind, asked in (("CPU", cpus_each), ("GPU", gpus_each)) if asked}
    spare = [{"CPU": 1.0}] * math.ceil(spare_cpus) if cpus_each else []
    return [each] * num_processes + spare if each else spare


def places(has: Mapping[str, float], cpus_each: float, gpus_each: float) -> int:
    """Return how many processes fit a node; each asks for CPUs or GPUs, and a share of a GPU is one GPU's.

    Args:
        has: what the node has, by Ray's names.
        cpus_each: that a process asks for; 0: none.
        gpus_each: the same, 1 at most.
    """
    fits = [has.get("CPU", 0.0) / cpus_each] if cpus_each else []
    if gpus_each:
        fits.append(has.get("GPU", 0.0) * int(1.0 / gpus_each + ROUNDING))
    return int(min(fits) + ROUNDING)

"""The metrics that a node serves to Prometheus."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families

Samples = list[tuple[str, dict[str, str], float]]
TIMEOUT_S = 60.0
OURS = "ray_agr_ray_"


def samples(output: str) -> Samples:
    """Return our metrics of all nodes for one output: name, labels of interest, and value."""
    found: Samples = []
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=20) as answer:
            ours = [line for line in answer.read().decode().splitlines() if OURS in line]  # Ray has a thousand more
        for family in text_string_to_metric_families("\n".join(ours)):
            for each in family.samples:
                if each.labels["output"] == output:
                    found.append((each.name.removeprefix(OURS), dict(each.labels), each.value))
    return found


def wait_for(output: str, is_there: Callable[[Samples], bool]) -> Samples:
    """Return the latest samples as soon as the node has the wanted ones; processes send theirs every 10 s."""
    until_s = time.monotonic() + TIMEOUT_S
    latest: dict[tuple[Any, ...], tuple[str, dict[str, str], float]] = {}  # a node drops a gauge after 20 s
    while True:
        latest |= {(name, *sorted(labels.items())): (name, labels, number) for name, labels, number in samples(output)}
        found = [*latest.values()]
        if is_there(found) or time.monotonic() > until_s:
            return found
        time.sleep(1.0)


def value(found: Samples, name: str, **labels: str) -> list[float]:
    return [number for each, theirs, number in found if each == name and labels.items() <= theirs.items()]

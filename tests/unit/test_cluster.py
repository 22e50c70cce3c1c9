"""Whether a plan fits a cluster, what the message advises, and what a cluster of the command's own has."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from agr_ray.config import ClusterConfig
from agr_ray.errors import ConfigError
from agr_ray.runtime import cluster


@pytest.mark.parametrize(
    ("cpus_each", "gpus_each", "advice"),
    [
        (4.0, 0.0, "4 x 4 CPU and 1 for reading .* give a local cluster more logical CPUs with cluster.num_cpus$"),
        (0.0, 1.0, "4 x 1 GPU, 4 in all; the cluster has 0. Ask for fewer workers, or leave use_gpu out$"),
    ],
)
def test_a_plan_that_does_not_fit_is_rejected_with_suggestions(
    monkeypatch: pytest.MonkeyPatch, cpus_each: float, gpus_each: float, advice: str
) -> None:
    monkeypatch.setattr(cluster, "_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(cluster, "nodes", lambda: [{"CPU": 8.0}])
    with pytest.raises(ConfigError, match=rf"^score\.use_gpu asks for {advice}"):
        cluster.refuse_misfit("score.use_gpu", 4, cpus_each, gpus_each)


@pytest.mark.parametrize(
    ("given", "trains", "expected"),
    [(None, False, False), (None, True, True), (True, False, True), (False, True, False)],
)
def test_only_training_starts_the_dashboard_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: bool | None, trains: bool, expected: bool
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options["include_dashboard"]))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with cluster.cluster(ClusterConfig(address="local", include_dashboard=given), trains=trains):
        pass
    assert asked == [expected]

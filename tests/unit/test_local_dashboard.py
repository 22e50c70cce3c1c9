"""Whether a cluster that a command starts for itself has Ray's dashboard."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from agr_ray.config import ClusterConfig
from agr_ray.runtime.cluster import cluster


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
    with cluster(ClusterConfig(address="local", include_dashboard=given), trains=trains):
        pass
    assert asked == [expected]

"""How `pytest -n 2 --dist loadgroup` shares the tests between two processes.

All tests that run a Ray cluster stay in one process, because two clusters crowd a small machine. It gets them first.
The other process runs the remaining files.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
CLUSTERS = ("test_autoscaling", "test_local_cluster")
"""Files of tests/system that start clusters without the fixture `cluster`."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put each test into the group of clusters or of its file."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        in_clusters = HERE / "ray" in item.path.parents or item.path.stem in CLUSTERS or "cluster" in fixtures
        item.add_marker(pytest.mark.xdist_group("clusters" if in_clusters else item.path.stem))

"""Shared fixtures: one small Ray cluster for all tests of this folder."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from agr_ray.runtime.ray_compat import NO_PRESTART

HERE = Path(__file__).parent
UNIT = str(HERE.parent / "unit")
sys.path.insert(0, UNIT)  # bad_images

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ[NO_PRESTART] = "0"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one process less for each training
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [UNIT, os.environ.get("PYTHONPATH")]))  # toy_registry


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Run a local cluster, which every job of this process then uses."""
    # Short, because Ray puts sockets into it, whose paths may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        ray.init(
            address="local",
            num_cpus=8,
            object_store_memory=512 * 2**20,
            include_dashboard=True,  # Ray Train asks it which workers live
            runtime_env={"worker_process_setup_hook": "toy_registry.register"},
            _temp_dir=temporary,
        )
        yield
        ray.shutdown()


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """End the cluster after the last test here: those of other folders run their own."""
    if nextitem is None or HERE not in nextitem.path.parents:
        ray.shutdown()

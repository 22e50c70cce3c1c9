"""How `pytest -n 2` shares the tests between two processes.

All files that run a Ray cluster stay in one process, because two clusters crowd a small machine. It gets them first.
The other process runs the remaining files, one after another.
"""

from __future__ import annotations

import os
from pathlib import PurePath

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

CLUSTER_FILES = ("autoscaling", "gpu_smoke", "jobs_s3", "local_cluster", "resume", "score_s3", "train_s3", "tune_s3")
"""Files of tests/system that run a cluster; all of tests/ray do."""

os.environ.setdefault("RAY_worker_niceness", "0")  # else the tests beside the cluster take its cores


class ByFile(LoadScopeScheduling):
    """Gives a process all tests of a file, and one of them all files that run a cluster."""

    def _split_scope(self, nodeid: str) -> str:
        file = PurePath(nodeid.partition("::")[0])
        is_cluster = file.parent.name == "ray" or file.stem.removeprefix("test_") in CLUSTER_FILES
        return "clusters" if is_cluster else str(file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)

"""How `pytest -n 2` shares the tests between two processes, and which unit tests take long.

All files of tests/ray share one cluster, so one process gets them, first; then it gets test_jobs_s3.py, which takes
longest of the others. Files of tests/system that run a cluster come last, one at a time in whichever process is free,
because two clusters crowd a small machine. Between them, each file of the others goes to the process that is free.
"""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import PurePath

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

CLUSTER_FILES = (
    "autoscaling",
    "gpu_smoke",
    "hosts",
    "jobs_s3",
    "local_cluster",
    "resume",
    "score_s3",
    "train_s3",
    "tune_s3",
)
"""Files of tests/system that run a cluster."""
LONG_FILES = (
    "absurd_values",
    "atomic",
    "audit",
    "backbones",
    "bucket_audit",
    "card",
    "check_network",
    "checkpoint_alone",
    "cli",
    "comparison",
    "config",
    "data_parallel",
    "decode",
    "detect",
    "dry_run",
    "evaluation_page",
    "exactly_once",
    "explanations",
    "face_model",
    "fairface",
    "fast_steps",
    "fuzz",
    "gpu_benchmark",
    "image_bombs",
    "images",
    "imports",
    "jobs_errors",
    "kubernetes",
    "lakehouse",
    "local_worker",
    "lock",
    "loop",
    "near_duplicates",
    "parts",
    "planted_secrets",
    "planning",
    "prepare_again",
    "presets",
    "rendered",
    "rendered_cues",
    "report",
    "score_driver",
    "scorer",
    "scores_page",
    "site",
    "splits",
    "status",
    "suppression",
    "sweep_page",
    "sweep_results",
    "training_output",
    "tune_command",
    "tutorials",
)
"""Files of tests/unit that take several seconds each: `make unit` leaves them out, `make test` does not."""

os.environ.setdefault("RAY_worker_niceness", "0")  # else the tests beside the cluster take its cores


class ByFile(LoadScopeScheduling):
    """Gives a process all tests of a file, and one of them all files of tests/ray and test_jobs_s3.py."""

    def _split_scope(self, nodeid: str) -> str:
        file = PurePath(nodeid.partition("::")[0])
        return "ray" if file.parent.name == "ray" or file.stem == "test_jobs_s3" else str(file)

    def _reschedule(self, node: WorkerController) -> None:
        """Give a process files until it has three tests to run; if there are no more, tell it to end.

        A process runs a test only when it knows the next, or that there is none.
        """
        if node.shutting_down:
            return
        while self.workqueue and self._pending_of(self.assigned_work[node]) < 3:
            with contextlib.suppress(OSError):  # it has died, and `remove_node` will be called
                self._assign_work_unit(node)
        if not self.workqueue:
            node.shutdown()

    def remove_node(self, node: WorkerController) -> str | None:
        """Give the files of a process that died to the others, but not the test that it died of, which is returned."""
        files = self.assigned_work.pop(node)
        died_of = next((test for tests in files.values() for test, is_done in tests.items() if not is_done), None)
        if died_of is None:
            return None
        files[self._split_scope(died_of)][died_of] = True
        self.workqueue.update(files)
        for other in self.assigned_work:
            self._reschedule(other)
        return died_of


gc.disable()  # while 5,000 tests are collected: looking for garbage takes a fifth of that time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gc.enable()
    for item in items:
        if item.path.parent.name == "unit" and item.path.stem.removeprefix("test_") in LONG_FILES:
            item.add_marker("long")
    # The sort is stable.
    items.sort(key=lambda item: item.path.parent.name == "system" and item.path.stem[5:] in CLUSTER_FILES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)

"""The one process that scores few photographs without Ray."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from run_first import run_first
from sets import checkpoint, with_other_weights
from this_process import ThisProcess, scoring_of

from agr_ray.config import ClusterConfig, ScoreConfig, ScoreJob
from agr_ray.errors import JobError
from agr_ray.models.checkpoint import CheckpointError
from agr_ray.runtime import score as score_module
from agr_ray.scoring.local_worker import LocalWorker
from agr_ray.scoring.planning import plan
from agr_ray.scoring.scorer import Scoring
from agr_ray.storage import Storage
from agr_ray.storage.parts import Parts
from agr_ray.vision.decode import encode_jpeg

NO_NETWORK = """
from types import SimpleNamespace
from agr_ray.scoring import scorer
scorer.RowPredictor = lambda *_: SimpleNamespace(submit=lambda found: lambda: found.images)
"""
"""Grey images have no faces. A process without a network starts several times as fast."""
KILLER = """
import os, signal
from agr_ray.predict.face_finder import FaceFinder
find = FaceFinder.find
def find_or_die(finder, bodies):
    if any(body == open({path!r}, "rb").read() for body in bodies):
        os.kill(os.getpid(), signal.SIGKILL)
    return find(finder, bodies)
FaceFinder.find = find_or_die
"""
SLEEPER = """
import os, time
from agr_ray.predict.face_finder import FaceFinder
def sleep(finder, bodies):
    open({path!r}, "w").write(str(os.getpid()))
    time.sleep(600)
FaceFinder.find = sleep
"""


@pytest.fixture
def scoring(tmp_path: Path) -> Scoring:
    """Plan a run over six grey images, in three parts."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(6):
        (photographs / f"{number}.jpg").write_bytes(encode_jpeg(np.full((64, 64, 3), 40 * number, np.uint8)))
    config = ScoreConfig(input=str(photographs), rows_per_file=2)
    plan(Storage(), config, Parts(Storage(), str(tmp_path / "work")).manifest)
    return scoring_of(checkpoint(tmp_path / "model"), tmp_path / "work", outage_s=5.0)


def rows(scoring: Scoring) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key != "scored_at"}
        for part in range(3)
        for row in scoring.storage.read_table(scoring.parts.uri(part)).to_pylist()
    ]


def test_rows_and_summaries_are_those_of_this_process(scoring: Scoring) -> None:
    there = list(LocalWorker().score(scoring, [2, 0, 1]))
    written = rows(scoring)
    here = list(ThisProcess().score(scoring, [2, 0, 1]))
    assert [dict(each, worker_s=None) for each in there] == [dict(each, worker_s=None) for each in here]
    assert written == rows(scoring)


def test_a_photograph_that_kills_the_process_fails_and_the_rest_is_scored(
    scoring: Scoring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_first(NO_NETWORK + KILLER.format(path=str(tmp_path / "photographs" / "3.jpg")), tmp_path / "code", monkeypatch)
    summaries = list(LocalWorker().score(scoring, [0, 1, 2]))
    assert sorted(each["part"] for each in summaries) == [0, 1, 2]
    assert [(Path(row["uri"]).stem, row["status"]) for row in rows(scoring)] == [
        (name, "failed" if name == "3" else "no_face") for name in "012345"
    ]


def test_an_error_keeps_its_class_and_the_traceback_of_its_process(scoring: Scoring) -> None:
    broken = dataclasses.replace(scoring, checkpoint={"meta.json": b"no json"})
    with pytest.raises(CheckpointError, match="expected JSON") as raised:
        list(LocalWorker().score(broken, [0]))
    assert "PartScorer(scoring)" in raised.value.__notes__[0]


def test_a_process_that_ends_by_itself_is_not_started_again(scoring: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(JobError, match="the process that scores ended with status 1"):
        list(LocalWorker().score(scoring, [0]))


def test_the_process_ends_with_the_one_that_started_it(scoring: Scoring, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    pid_file = tmp_path / "pid"
    (tmp_path / "code" / "sitecustomize.py").write_text(NO_NETWORK + SLEEPER.format(path=str(pid_file)))
    task = tmp_path / "task.py"
    task.write_text(
        "import pickle, sys\n"
        "from agr_ray.scoring.local_worker import LocalWorker\n"
        f"sys.path.insert(0, {str(tmp_path / 'code')!r})\n"
        f"list(LocalWorker().score(pickle.loads(open({str(tmp_path / 'scoring')!r}, 'rb').read()), [0]))\n"
    )
    (tmp_path / "scoring").write_bytes(pickle.dumps(scoring))
    parent = subprocess.Popen([sys.executable, str(task)], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        wait_until(pid_file.exists)
        wait_until(lambda: bool(pid_file.read_text()))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until(lambda: not Path("/proc", pid_file.read_text()).exists())


def test_the_process_that_asks_for_a_run_does_not_load_torch(scoring: Scoring, tmp_path: Path) -> None:
    code = "import sys; from agr_ray.cli import main; main(sys.argv[1:]); print('loaded:', 'torch' in sys.modules)"
    argv = ["score", "--checkpoint", str(tmp_path / "model"), "--input", str(tmp_path / "photographs")]
    printed = subprocess.check_output([sys.executable, "-c", code, *argv, "--out", str(tmp_path / "out")], text=True)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert printed.splitlines()[-1] == "loaded: False"


def test_weights_that_do_not_fit_the_network_end_the_command_in_one_line(scoring: Scoring, tmp_path: Path) -> None:
    other = with_other_weights(tmp_path / "model", tmp_path / "other")
    argv = [
        "score",
        "--checkpoint",
        str(other),
        "--input",
        str(tmp_path / "photographs"),
        "--out",
        str(tmp_path / "out"),
    ]
    code = "import sys; from agr_ray.cli import main; main(sys.argv[1:])"
    ended = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert ended.returncode == 2
    message = r"error: score\.checkpoint .*other: .*: heads\.race\.layer\.bias: expected shape \[5\], found \[7\]\n"
    assert re.fullmatch(message, ended.stderr)
    assert not list(tmp_path.glob("out*"))


def wait_until(condition: Any) -> None:
    until = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_ray_is_used_if_there_is_much_to_do_or_the_job_names_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    needs_no_ray = score_module._needs_no_ray
    assert needs_no_ray(ScoreJob(), 250)
    assert not needs_no_ray(ScoreJob(), 251)
    for job in (
        ScoreJob(score=ScoreConfig(num_workers=1)),
        ScoreJob(score=ScoreConfig(use_gpu=True)),
        ScoreJob(cluster=ClusterConfig(address="local")),
    ):
        assert not needs_no_ray(job, 1)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert not needs_no_ray(ScoreJob(), 1)

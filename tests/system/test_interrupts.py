"""Ctrl-C and SIGTERM during a job: confirmed at once, ended soon, and resumable."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, job_environment, short_folder

from agr_ray.learn.run import CHECKPOINTS
from agr_ray.models.checkpoint_network import load_train_state
from agr_ray.runtime.ray_compat import SNAPSHOT

sys.path += [str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "ray")]
from sets import prepared_set
from test_json_log import logged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

END_TIMEOUT_S = 120.0
TRAINING = (
    *("--model.preset", "lightweight", "--model.image_size", 32, "--train.batch_size", 16, "--train.epochs", 1000),
    *("--train.early_stopping_patience", 0, "--train.num_workers", 1, "--train.threads_per_worker", 1),
)


def interrupted(
    command: list[str], folder: Path, ray_folder: Path, signum: int = signal.SIGINT
) -> tuple[int, str, str, float]:
    """Run a command, send it a signal once an epoch is done, and return status, stdout, stderr and seconds to the
    first line that it prints then."""
    out, errors = folder / "stdout", folder / "stderr"
    with out.open("wb") as stdout, errors.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=job_environment(ray_folder),
            stdout=stdout,
            stderr=stderr,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # tests may ignore it
        )
        try:
            while not any("history.parquet" in names for _, _, names in os.walk(folder / "out")):
                assert process.poll() is None, errors.read_text()
                time.sleep(0.2)
            sent = time.monotonic()
            process.send_signal(signum)
            while "stopping" not in errors.read_text() and process.poll() is None:
                time.sleep(0.05)
            confirmed_s = time.monotonic() - sent
            process.wait(END_TIMEOUT_S)
        finally:
            process.kill()
    return process.returncode, out.read_text(), errors.read_text(), confirmed_s


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ("--train.name", "run")),
        ("tune", ("--tune.trials", 1, "--tune.space", '{"train.lr": {"choice": [0.0001, 0.01]}}')),
    ],
)
def test_ctrl_c_is_confirmed_and_ends_the_job_with_one_line(
    command: str, options: tuple[object, ...], tmp_path: Path
) -> None:
    data = prepared_set(tmp_path / "data", {"train": 40, "val": 12})
    words = [command, "--train.data", data, f"--{command}.out", tmp_path / "out", *TRAINING, *options]
    line = "from agr_ray.cli import main; main()"

    with short_folder() as ray_folder:
        status, _, errors, confirmed_s = interrupted(
            [sys.executable, "-c", line, *map(str, words)], tmp_path, ray_folder
        )

    assert status == 130, errors
    assert confirmed_s < 5
    assert errors.splitlines()[0].startswith("stopping")
    assert errors.splitlines()[-1] == "error: interrupted; run the same command again to resume it"


def test_sigterm_saves_a_checkpoint_within_the_epoch_and_releases_the_lock(tmp_path: Path) -> None:
    data = prepared_set(tmp_path / "data", {"train": 40, "val": 12})
    words = ["train", "--train.data", data, "--train.out", tmp_path / "out", "--train.name", "run", *TRAINING]
    command = [sys.executable, "-c", "from agr_ray.cli import main; main()", *map(str, words), "--log-format", "json"]

    with short_folder() as ray_folder:
        status, out, errors, confirmed_s = interrupted(command, tmp_path, ray_folder, signal.SIGTERM)

    assert status == 143, errors
    assert confirmed_s < 5
    run = tmp_path / "out" / "run"
    lines = logged(errors)
    assert out == ""
    begins = next(number for number, line in enumerate(lines) if line["run"])
    assert {line["run"] for line in lines[begins:]} == {str(run)}
    messages = [line["message"] for line in lines]
    assert "saving a checkpoint; press Ctrl-C again to end at once" in messages
    saved = re.search(r"saved a checkpoint of epoch (\d+) after (\d+) steps", "\n".join(messages))
    assert saved, messages
    assert (lines[-1]["level"], messages[-1]) == (
        "error",
        "stopped by SIGTERM; run the same command again to resume it",
    )
    assert not (run / "lock.json").exists()
    known = (run / CHECKPOINTS / SNAPSHOT).read_text()
    states = [load_train_state(folder) for folder in (run / CHECKPOINTS).iterdir() if f'"{folder.name}"' in known]
    partial = [state for state in states if "partial_epoch" in state]
    epochs_and_steps = [(state["epoch"] + 1, state["partial_epoch"]["num_steps"]) for state in partial]
    assert epochs_and_steps == [tuple(map(int, saved.groups()))]

"""The process that checks whether a checkpoint's weights fit its network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from run_first import run_first
from sets import checkpoint, with_other_weights

from agr_ray.errors import ConfigError, JobError
from agr_ray.models.check_network import check_network
from agr_ray.models.checkpoint import WEIGHTS, read_checkpoint
from agr_ray.models.checkpoint_network import given_network

URI, KEY = "s3://models/best", "score.checkpoint"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model") / "model")


def check(folder: Path) -> None:
    check_network(read_checkpoint(folder), URI, KEY)


def test_weights_that_fit_pass_whatever_libraries_print(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_first("import sys; print('hello'); print('a warning', file=sys.stderr)", tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)  # where our package is not
    check(model)
    assert capfd.readouterr() == ("", "")


def test_an_error_is_the_one_that_the_network_raises_here(model: Path, tmp_path: Path) -> None:
    other = with_other_weights(model, tmp_path / "other")
    cut = shutil.copytree(model, tmp_path / "cut")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-1])
    for folder, reason in (
        (other, "heads.race.layer.bias: expected shape [5], found [7]"),
        (cut, "expected safetensors, found "),
    ):
        with pytest.raises(ConfigError) as here:
            given_network(read_checkpoint(folder), URI, KEY)
        with pytest.raises(ConfigError) as there:
            check(folder)
        assert str(there.value) == str(here.value)
        assert str(there.value).startswith(f"{KEY} {URI}: {folder / WEIGHTS}: {reason}")
        assert "\n" not in str(there.value)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "its process was killed by SIGKILL; is this machine out of memory?"),
        ("import sys; sys.modules['torch'] = None", "ModuleNotFoundError: import of torch halted; None in sys.modules"),
    ],
    ids=["killed", "a missing package"],
)
def test_a_process_that_fails_gives_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    run_first(code, tmp_path, monkeypatch)
    with pytest.raises(JobError) as raised:
        check(model)
    assert str(raised.value) == f"{KEY} {URI}: the network can't be built: {reason}"


def test_a_process_that_says_nothing_gives_its_status(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 3, "", ""))
    with pytest.raises(JobError, match=r"the network can't be built: its process ended with status 3$"):
        check(model)

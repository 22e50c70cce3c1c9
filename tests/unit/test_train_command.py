"""A training command whose run.json is written by another driver before the command holds the lock."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from prepared_sets import SIDE_PX, prepared_set

from agr_ray.config import ModelConfig, TrainConfig, TrainJob
from agr_ray.errors import ConfigError
from agr_ray.runtime import train as command
from agr_ray.storage import Storage
from agr_ray.storage.lock import run_lock


class Reached(Exception):
    """Training would begin here."""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainJob:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    data = prepared_set(tmp_path / "prepared")
    return TrainJob(
        model=ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX, tasks=("age", "gender")),
        train=TrainConfig(
            data=str(data), out=str(tmp_path / "runs"), name="run", batch_size=4, num_workers=1, threads_per_worker=1
        ),
    )


def record(job: TrainJob, name: str, finished: str) -> Path:
    """Write a run's record as another driver with the same settings does; return the run's folder."""
    run = Path(job.train.out) / name
    digest = command.settings_digest(job, command.open_sets(job, Storage()))
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps({"finished": finished, "settings_digest": digest}))
    return run


def record_before_lock(patch: pytest.MonkeyPatch, job: TrainJob, name: str, finished: str) -> None:
    """Let another driver write a run's record just before this one gets the lock."""

    @contextlib.contextmanager
    def late_lock(*arguments: Any, **options: Any) -> Iterator[Any]:
        record(job, name, finished)
        with run_lock(*arguments, **options) as lock:
            yield lock

    def reached(*_: object) -> None:
        raise Reached

    patch.setattr(command, "run_lock", late_lock)
    patch.setattr(command, "cluster", lambda _, **__: contextlib.nullcontext())
    patch.setattr(command, "check_workers_fit", lambda _: None)
    patch.setattr(command, "progress_board", lambda _: contextlib.nullcontext())
    patch.setattr(command, "fit", reached)


def test_a_run_that_another_driver_finished_meanwhile_is_rejected(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_before_lock(monkeypatch, job, "run", "all epochs")

    with pytest.raises(ConfigError, match=r"runs/run has finished \(all epochs\)"):
        command.train(job)


def test_a_new_run_that_another_driver_finished_meanwhile_is_rejected(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(job, "run", "all epochs")
    record_before_lock(monkeypatch, job, "run-2", "all epochs")

    with pytest.raises(ConfigError, match=r"runs/run-2 has finished since this command began"):
        command.train(job.model_copy(update={"new_run": True}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"lr": 0.5, "outage_s": 1.0}}, r"train\.lr 0\.5, not 0\.0001"),
        ({"loss": {"race_weight": 3.0}, "train": {"lr": 0.5}}, r"loss\.race_weight 3\.0, not 0\.5"),
        ({"train": {"data": "elsewhere", "max_failures": 9}}, "other data"),
    ],
)
def test_an_unfinished_run_of_other_settings_names_one(
    job: TrainJob, changes: dict[str, dict[str, Any]], named: str
) -> None:
    config = job.model_dump(mode="json", exclude={"new_run", "dry_run", "log_format"})
    theirs = config | {section: config[section] | values for section, values in changes.items()}
    run = Path(job.train.out) / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"finished": "", "settings_digest": "other", "config": theirs}))

    with pytest.raises(ConfigError, match=rf"train\.name run: the unfinished run .*/run has {named}; choose another"):
        command.train(job)


def test_a_run_that_another_driver_began_meanwhile_is_resumed(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    record_before_lock(monkeypatch, job, "run", "")

    with pytest.raises(Reached):
        command.train(job)

    run = Path(job.train.out) / "run"
    assert json.loads((run / "run.json").read_text()).keys() == {"finished", "settings_digest"}
    assert not (run / "initial").exists()

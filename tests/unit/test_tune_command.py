"""The `tune` command with trials that never run and no cluster: one driver at a time, and its end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sweeps import STORAGE, complete, opened, tune_job

from agr_ray.config import LossConfig, ModelConfig, TuneJob
from agr_ray.data.prepared import PreparedSet
from agr_ray.errors import ConfigError, JobError
from agr_ray.runtime.tune import tune
from agr_ray.storage.lock import LockLost, RunLock, run_lock
from agr_ray.tuning.concurrency import Room
from agr_ray.tuning.sweep import Sweep

RUN = SimpleNamespace(
    data={"uri": "/faces", "split_manifest_sha256": "ab"},
    num_train_rows=21,
    num_val_rows=6,
    git_commit="c0ffee",
)
Trials = Callable[[Sweep, RunLock], None]


def quick(folder: Path, **changes: Any) -> TuneJob:
    """Return a job whose lock expires soon."""
    job = tune_job(folder, **changes)
    return job.model_copy(update={"train": job.train.model_copy(update={"lock_expiry_s": 0.8})})


@pytest.fixture
def run_trials(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trials], None]:
    """Put something else in the place of the cluster and of trials."""
    name = "agr_ray.runtime.tune"
    monkeypatch.setattr(f"{name}.open_sets", lambda job, storage: [])
    monkeypatch.setattr(f"{name}.settings_digest", lambda job, sets: "of the data")
    monkeypatch.setattr(f"{name}.plan", lambda *args: (RUN, None))
    monkeypatch.setattr(f"{name}.cluster", lambda config, **_: contextlib.nullcontext())
    monkeypatch.setattr(f"{name}.room", lambda config, asked, key: Room(1, None))

    def put(trials: Trials) -> None:
        monkeypatch.setattr(f"{name}._run_trials", lambda sweep, lock, *rest: trials(sweep, lock))

    return put


def all_complete(sweep: Sweep, lock: RunLock) -> None:
    while sweep.num_left:
        number = complete(sweep, [0.9])
        Path(sweep.trial_uri(number), "best", "meta.json").write_text(json.dumps({"metrics": {"val": {}}}))


def all_fail(sweep: Sweep, lock: RunLock) -> None:
    while (following := sweep.next()) is not None:
        sweep.failed(following[0], "diverged: epoch 1, step 1")


def none_ends(sweep: Sweep, lock: RunLock) -> None:
    assert sweep.next() is not None


# One driver at a time


def test_a_sweep_that_another_driver_is_running_is_rejected(
    tmp_path: Path, run_trials: Callable[[Trials], None]
) -> None:
    run_trials(all_complete)
    job = quick(tmp_path)
    uri = f"{job.tune.out}/sweep"
    with run_lock(STORAGE, f"{uri}/lock.json", "another", expiry_s=0.4, console=Console(quiet=True)):
        with pytest.raises(ConfigError, match=r"is held by another .*: that run is alive"):
            tune(job)
        assert not Path(uri, "sweep.json").exists()

    assert tune(job) == f"{uri}/best"
    assert not Path(uri, "lock.json").exists()


def test_the_records_of_the_locks_previous_owner_are_resumed(
    tmp_path: Path, run_trials: Callable[[Trials], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_trials(all_complete)
    job = quick(tmp_path)
    others: list[str] = []

    def begin_another(*args: Any) -> Any:
        sweep = opened(job)
        complete(sweep, [0.8])
        others.append(sweep.plan.sweep_id)
        return RUN, None

    monkeypatch.setattr("agr_ray.runtime.tune.plan", begin_another)
    Path(tmp_path, "sweep", "trials", "0000", "best").mkdir(parents=True)
    Path(tmp_path, "sweep", "trials", "0000", "best", "meta.json").write_text(json.dumps({"metrics": {"val": {}}}))

    tune(job)

    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert (record["id"], record["finished"]) == (others[0], "3 trials")


def test_a_sweep_that_another_driver_has_just_finished_is_not_restarted(
    tmp_path: Path, run_trials: Callable[[Trials], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_trials(all_complete)
    job = quick(tmp_path, trials=1).model_copy(update={"new_run": True})

    def finish_another(*args: Any) -> Any:
        sweep = opened(job)
        complete(sweep, [0.8])
        sweep.write_record("1 trials")
        return RUN, None

    monkeypatch.setattr("agr_ray.runtime.tune.plan", finish_another)

    with pytest.raises(ConfigError, match="was finished by another driver just now"):
        tune(job)


def test_a_lost_lock_prevents_writing_the_results(tmp_path: Path, run_trials: Callable[[Trials], None]) -> None:
    def lose(sweep: Sweep, lock: RunLock) -> None:
        all_complete(sweep, lock)
        lock.lost = True

    run_trials(lose)

    with pytest.raises(LockLost):
        tune(quick(tmp_path))
    assert not (tmp_path / "sweep" / "trials.parquet").exists()


# The end


def test_a_finished_sweep_without_a_complete_trial_is_an_error(
    tmp_path: Path, run_trials: Callable[[Trials], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run_trials(none_ends)
    tune(quick(tmp_path))
    assert "the sweep is not finished: it was interrupted; the same command resumes it" in capsys.readouterr().out

    run_trials(all_fail)
    with pytest.raises(JobError, match="no trial is complete"):
        tune(quick(tmp_path))


def test_a_recipe_that_differs_from_the_papers_is_mentioned(
    tmp_path: Path, run_trials: Callable[[Trials], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run_trials(all_complete)

    tune(quick(tmp_path).model_copy(update={"loss": LossConfig(age_weight=0.2)}))

    said = "warning: loss.age_weight 0.2 (not 1) is not searched, so no trial has the paper's values"
    assert capsys.readouterr().out.count(said) == 1


# Labels


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "pareto"}, "tune.mode pareto needs labels of race, and no row of validation"),
        ({"constraints": {"race_error": 0.5}}, "tune.constraints race_error needs labels of race"),
    ],
)
def test_errors_without_validation_labels_are_rejected(
    tmp_path: Path,
    run_trials: Callable[[Trials], None],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    said: str,
) -> None:
    run_trials(all_complete)
    rows = [
        {"split": split, "status": "ok", "age": 30.0, "gender": "male", "race": race}
        for split, race in (("train", "white"), ("val", None))
    ]
    (tmp_path / "crops").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "crops" / "part.parquet")
    prepared = cast(PreparedSet, SimpleNamespace(crops=lambda storage: f"{tmp_path}/crops"))
    monkeypatch.setattr("agr_ray.runtime.tune.open_sets", lambda job, storage: [prepared])

    with pytest.raises(ConfigError, match=said):
        tune(quick(tmp_path, **changes))
    without = quick(tmp_path, name="without", mode="pareto")
    assert tune(without.model_copy(update={"model": ModelConfig(tasks=("age", "gender"))})).endswith("without/best")

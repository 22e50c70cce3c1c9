"""Our hooks for Ray Tune, without a cluster: which trial is stopped, which is next, and why one failed."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from sweeps import complete, opened, row, train, tune_job

from agr_ray.config import TuneJob
from agr_ray.runtime.tune import with_absolute_paths
from agr_ray.runtime.tuning.hooks import Budget, Halving, NextTrials, Watcher, last_epoch, why_failed
from agr_ray.storage import Storage
from agr_ray.storage.lock import LockLost, LockRecord, RunLock, clock_s
from agr_ray.tuning.sweep import Sweep
from agr_ray.tuning.trials import Trial

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def ray_trial(number: int) -> Any:
    return SimpleNamespace(
        trial_id=f"of this command {number}", status=RayTrial.RUNNING, config={"number": number, "values": {}}
    )


def halving(folder: Path, **changes: Any) -> Halving:
    settings = {"trials": 9, "grace_epochs": 1, "reduction": 2} | changes
    return Halving(opened(tune_job(folder, **settings)))


def told(scheduler: Halving, number: int, epoch: int, objective: float) -> str:
    trial = ray_trial(number)
    if epoch == 1:
        scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, row(epoch, objective))


# Halving


def test_a_worse_trial_is_stopped_with_a_reason(tmp_path: Path) -> None:
    scheduler = halving(tmp_path)

    assert told(scheduler, 0, 1, 0.8) == CONTINUE
    assert told(scheduler, 1, 1, 0.9) == STOP
    assert told(scheduler, 2, 1, 0.7) == CONTINUE
    assert scheduler.pruned == {1: "after epoch 1 not among the best 1 of 2, at 0.9000"}


def test_no_trial_is_stopped_within_the_grace_period_or_at_its_last_epoch(tmp_path: Path) -> None:
    scheduler = halving(tmp_path, grace_epochs=2)  # of 4 epochs: looked at after 2, and at 4 no more

    for number, objective in enumerate([0.5, 0.9]):
        assert told(scheduler, number, 1, objective) == CONTINUE
    assert told(scheduler, 0, 2, 0.5) == CONTINUE
    assert told(scheduler, 0, 4, 0.4) == CONTINUE
    assert told(scheduler, 1, 4, 0.9) == CONTINUE
    assert scheduler.pruned == {}


def test_a_resumed_sweep_compares_with_the_trials_before(tmp_path: Path) -> None:
    settings = {"trials": 9, "grace_epochs": 1, "reduction": 2}
    complete(opened(tune_job(tmp_path, **settings)), [0.8, 0.7, 0.6, 0.5])

    scheduler = halving(tmp_path)

    assert told(scheduler, 1, 1, 0.9) == STOP
    assert told(scheduler, 2, 1, 0.7) == CONTINUE
    # Trial 0 goes on, say: what it had reached is not counted twice, under another id.
    assert told(scheduler, 0, 1, 0.99) == CONTINUE


def test_an_epoch_without_metrics_is_not_judged(tmp_path: Path) -> None:
    scheduler = halving(tmp_path)
    told(scheduler, 0, 1, 0.8)

    assert scheduler.on_trial_result(None, ray_trial(0), row(2, 0.5, val_balanced_objective=None)) == CONTINUE
    # A trial whose first loss is NaN ends like this.
    assert scheduler.on_trial_result(None, ray_trial(1), {"done": True}) == CONTINUE


def test_a_trials_own_last_epoch_counts(tmp_path: Path) -> None:
    scheduler = halving(tmp_path)
    told(scheduler, 0, 1, 0.5)
    ends = ray_trial(1)
    ends.config["values"] = {"train.epochs": 1}
    scheduler.on_trial_add(None, ends)

    assert scheduler.on_trial_result(None, ends, row(1, 0.9)) == CONTINUE  # or its checkpoints were not published
    assert told(scheduler, 2, 1, 0.9) == STOP
    assert last_epoch(tune_job(tmp_path), {}) == 4


# The next trial


def test_the_searcher_proposes_the_sweeps_next_trial(tmp_path: Path) -> None:
    searcher = NextTrials(opened(tune_job(tmp_path, trials=1)))

    given = searcher.suggest("x")

    assert given["number"] == 0
    assert given["values"] == {"loss.race_weight": 0.5, "train.lr": 1e-4}
    assert searcher.suggest("y") == Searcher.FINISHED


def test_an_exhausted_budget_ends_the_sweep(tmp_path: Path) -> None:
    assert budget(opened(tune_job(tmp_path, max_hours=1e-9))).stop_all()
    assert not budget(opened(tune_job(tmp_path))).stop_all()


# Outcomes of trials


def watcher(sweep: Sweep) -> Watcher:
    return Watcher(sweep, None, lambda text: None, str(Path.cwd()))


def budget(sweep: Sweep, *, is_lost: bool = False) -> Budget:
    lock = RunLock(Storage(), "lock.json", cast(LockRecord, SimpleNamespace(expires_after_s=1.0)), "", clock_s())
    lock.lost = is_lost
    return Budget(sweep, lock)


def test_reports_of_tune_about_a_trial_are_recorded(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path))
    hook, told_of = watcher(sweep), [ray_trial(0)]
    assert sweep.next() is not None

    hook.on_trial_start(1, told_of, told_of[0])
    hook.on_trial_result(2, told_of, told_of[0], row(1, 0.9))
    train(sweep, 0, [0.9])
    hook.on_trial_complete(3, told_of, told_of[0])

    assert (sweep.trials[0].state, sweep.trials[0].objective, sweep.problem) == ("complete", 0.9, None)


def test_an_error_at_the_end_of_a_trial_ends_the_sweep_and_not_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tune would catch it, call the complete trial failed and train it again.
    sweep = opened(tune_job(tmp_path))
    hook, trials = watcher(sweep), [ray_trial(0), ray_trial(1)]
    assert sweep.next() is not None
    assert sweep.next() is not None
    for number in range(2):
        hook.on_trial_start(1, trials, trials[number])
        train(sweep, number, [0.9])

    def refuse(trial: Trial) -> None:
        raise RuntimeError("the database is gone")

    monkeypatch.setattr(sweep.study, "tell", refuse)
    hook.on_trial_complete(2, trials, trials[0])
    hook.on_trial_error(3, trials, trials[1])

    assert str(sweep.problem) == "the database is gone"
    assert budget(sweep).stop_all()
    assert NextTrials(sweep).suggest("x") == Searcher.FINISHED
    assert [sweep.trials[number].state for number in range(2)] == ["complete", "unfinished"]
    monkeypatch.undo()
    again = opened(tune_job(tmp_path))
    assert [again.trials[number].state for number in range(2)] == ["complete", "complete"]


def test_a_sweep_that_lost_its_lock_ends(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path))

    assert budget(sweep, is_lost=True).stop_all()
    assert isinstance(sweep.problem, LockLost)


def test_objects_that_tune_pickles_have_no_state(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path))

    for hook in (NextTrials(sweep), Halving(sweep), budget(sweep)):
        assert pickle.loads(pickle.dumps(hook)).__dict__ == {}


# Paths


def test_a_trial_resolves_paths_relative_to_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = {"model.pretrained": {"choice": ["none", "backbone.pt"]}}
    job = TuneJob(
        train={"data": ["one", "s3://bucket/two"]},
        model={"pretrained": "imagenet"},
        tune={"space": space, "out": "here"},
    )

    given = with_absolute_paths(job, Storage())

    assert given.train.data_uris == (str(tmp_path / "one"), "s3://bucket/two")
    assert given.model.pretrained == "imagenet"
    assert given.tune.space["model.pretrained"].choice == ("none", str(tmp_path / "backbone.pt"))
    assert given.tune.out == "here"
    assert with_absolute_paths(TuneJob(train={"data": "one"}), Storage()).train.data == str(tmp_path / "one")


# Why a trial failed

DIED = "RayActorError: The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 7"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (str(RayActorError()), "killed: its process died"),
        (str(ActorDiedError()), "killed: its process died"),
        (str(ActorUnavailableError("restarting", None)), "killed: its process died"),
        (f"traceback\nray.exceptions.{DIED}\n", "killed: its process died"),
        ("traceback\nValueError: x is no y\n", "raised: ValueError: x is no y"),
        ("traceback\nagr_ray.runtime.command.JobError: what is wrong\n", "raised: what is wrong"),
        ("TuneError: y\n\n", "raised: TuneError: y"),
    ],
)
def test_the_reason_for_a_trials_end_is_one_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "error.txt"
    path.write_text(f"Failure # 1 (occurred at noon)\n{text}\n")

    assert why_failed(SimpleNamespace(error_file=str(path))) == why


def test_a_trial_without_an_error_file_ended_for_an_unknown_reason() -> None:
    assert why_failed(SimpleNamespace(error_file=None)) == "raised an unknown error"


def test_a_replaced_working_directory_is_entered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    monkeypatch.chdir(folder)
    hook = watcher(opened(tune_job(tmp_path)))
    folder.rmdir()
    folder.mkdir()

    hook.on_experiment_end([])

    assert Path.cwd() == folder

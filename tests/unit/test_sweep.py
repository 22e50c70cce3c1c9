"""A sweep without Ray: how it resumes, which files it keeps, and what it reports to its study."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pytest
from optuna.storages.journal import JournalFileBackend, JournalStorage
from rich.console import Console
from sweeps import STORAGE, complete, opened, planned, row, train, tune_job

from agr_ray.config import TrainConfig
from agr_ray.errors import ConfigError, JobError
from agr_ray.schema import HISTORY
from agr_ray.storage import Storage, StorageUnavailable
from agr_ray.storage.lock import LockLost, run_lock
from agr_ray.tuning.concurrency import trials_that_fit
from agr_ray.tuning.plan import plan_sweep
from agr_ray.tuning.study import MemoryJournal, Study
from agr_ray.tuning.sweep import Sweep


def study(sweep: Sweep) -> optuna.Study:
    backend = JournalFileBackend(str(Path(sweep.plan.uri) / "study.journal"))
    return optuna.load_study(study_name="sweep", storage=JournalStorage(backend))


def states(sweep: Sweep) -> list[str]:
    return [sweep.trials[number].state for number in sorted(sweep.trials)]


def weights(sweep: Sweep) -> list[str]:
    """Return the trials of which checkpoints are kept."""
    return sorted(path.parent.name for path in Path(sweep.plan.uri).glob("trials/*/best"))


# From the first trial to the last


def test_trials_are_numbered_recorded_and_reported(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path))
    for objectives in ([0.9, 0.8], [0.7, 0.75], [0.9, 0.85]):
        complete(sweep, objectives)

    assert sweep.next() is None
    assert states(sweep) == ["complete"] * 3
    assert sweep.best is not None
    assert (sweep.best.number, sweep.best.objective) == (1, 0.7)
    assert [each.value for each in study(sweep).trials] == [0.8, 0.7, 0.85]
    assert study(sweep).trials[1].intermediate_values == {1: 0.7, 2: 0.75}
    assert study(sweep).trials[0].params == {"loss.race_weight": 0.5, "train.lr": 1e-4}
    assert sorted(path.parent.name for path in tmp_path.glob("sweep/trials/*/best")) == ["0001", "0002"]
    sweep.clean()
    assert sorted(path.parent.name for path in tmp_path.glob("sweep/trials/*/best")) == ["0001"]


def test_points_follow_the_papers_and_their_missing_keys_are_drawn(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path, points_to_evaluate=[{"train.lr": 3e-3}]))

    given = [sweep.next() for _ in range(3)]

    assert [each and each[1]["train.lr"] for each in given][:2] == [1e-4, 3e-3]
    assert given[1] is not None
    assert 0.1 <= given[1][1]["loss.race_weight"] <= 2.0


def test_values_that_the_configuration_rejects_are_a_row_and_the_next_are_drawn(tmp_path: Path) -> None:
    # The learning rate must be cut before train.early_stopping_patience, 10, are over.
    space = {"train.schedule": {"choice": ["plateau", "step"]}, "train.plateau_epochs": {"integer": [5, 15]}}
    sweep = opened(tune_job(tmp_path, space=space, paper_first=False, trials=20, random_trials=20))

    given = [following[1] for following in iter(sweep.next, None)]

    refused = [trial for trial in sweep.trials.values() if trial.state == "failed"]
    assert len(given) + len(refused) == 20
    assert given
    assert refused
    assert all(trial.why.startswith("refused: ") and "plateau_epochs" in trial.why for trial in refused)
    assert all(values["train.schedule"] == "step" or values["train.plateau_epochs"] < 10 for values in given)
    assert [each.state.name for each in study(sweep).trials].count("FAIL") == len(refused)
    again = opened(sweep.job)  # and is not tried again
    assert again.num_left == len(given)


def test_a_list_may_be_given_as_a_point(tmp_path: Path) -> None:
    space = {"train.image_sizes": {"choice": [[64, 224], [224]]}}
    sweep = opened(tune_job(tmp_path, space=space, points_to_evaluate=[{"train.image_sizes": [64, 224]}]))

    assert sweep.next() == (0, {"train.image_sizes": (64, 224)})


def test_pruned_and_failed_trials_are_reported_as_such(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path))
    for number in range(3):
        assert sweep.next() is not None
        sweep.started(number)
        sweep.reported(number, row(1, 0.9))
    sweep.ended(0, "after epoch 1")
    sweep.failed_once(1, "killed: its process died")
    sweep.failed(1, "raised: x")
    (Path(sweep.trial_uri(2))).mkdir(parents=True)
    (Path(sweep.trial_uri(2)) / "failure.txt").write_text("epoch 1, step 3: loss nan\nid")
    sweep.ended(2)

    assert [(sweep.trials[n].state, sweep.trials[n].why) for n in range(3)] == [
        ("pruned", "after epoch 1"),
        ("failed", "raised: x"),
        ("failed", "diverged: epoch 1, step 3: loss nan"),
    ]
    assert sweep.trials[1].failures == ("killed: its process died", "raised: x")
    assert [each.state.name for each in study(sweep).trials] == ["PRUNED", "FAIL", "FAIL"]
    assert study(sweep).trials[0].value == 0.9  # Optuna's own: the last that was reported
    assert sweep.best is None


def test_constraints_are_reported_to_optuna(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path, constraints={"age_mae_years": 0.4}))

    complete(sweep, [0.9])

    assert study(sweep).trials[0].constraints == pytest.approx({"age_mae_years": 0.1})


def test_constraints_of_a_pruned_trial_are_reported_too(tmp_path: Path) -> None:
    job = tune_job(tmp_path, constraints={"age_mae_years": 0.4})
    sweep = opened(job)
    assert sweep.next() is not None
    sweep.reported(0, row(1, 0.9))
    sweep.ended(0, "after epoch 1")

    assert study(sweep).trials[0].constraints == pytest.approx({"age_mae_years": 0.1})
    (tmp_path / "sweep" / "study.journal").unlink()
    assert study(opened(job)).trials[0].constraints == pytest.approx({"age_mae_years": 0.1})


def test_a_pareto_sweep_keeps_the_checkpoints_of_the_front(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path, mode="pareto", trials=3))
    errors = [(5.0, 0.8), (6.0, 0.9), (6.0, 0.7)]
    for number, (age, accuracy) in enumerate(errors):
        assert sweep.next() is not None
        train(sweep, number, [0.9])
        changes = {"val_age_mae_years": age, "val_gender_balanced_accuracy": accuracy}
        table = pa.Table.from_pylist([row(1, 0.9, **changes)], schema=HISTORY)
        STORAGE.write_table(table, f"{sweep.trial_uri(number)}/history.parquet")
        sweep.ended(number)
    sweep.clean()

    assert sorted(path.parent.name for path in tmp_path.glob("sweep/trials/*/best")) == ["0000", "0001"]
    assert study(sweep).trials[0].values == pytest.approx([5.0, 0.2, 0.5])


# Checkpoints


def test_a_worse_trial_with_writing_workers_is_cleaned_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = opened(tune_job(tmp_path))
    complete(sweep, [0.9])
    delete_tree = Storage.delete_tree

    def refuse(storage: Storage, uri: str) -> None:
        raise OSError(39, "Directory not empty", uri)

    monkeypatch.setattr(Storage, "delete_tree", refuse)
    complete(sweep, [0.8])
    assert states(sweep) == ["complete"] * 2
    monkeypatch.setattr(Storage, "delete_tree", delete_tree)
    assert weights(sweep) == ["0000", "0001"]
    complete(sweep, [0.7])

    assert weights(sweep) == ["0002"]


def test_each_worse_trial_is_cleaned_once_and_all_again_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = opened(tune_job(tmp_path, trials=9))
    deleted: list[str] = []
    monkeypatch.setattr(Storage, "delete_tree", lambda storage, uri: deleted.append(uri))
    for _ in range(9):
        complete(sweep, [0.9])

    assert len(deleted) == len(set(deleted)) == 7 * 4  # folders of all but the best and the last to end
    sweep.clean()
    assert len(deleted) == 7 * 4 + 8 * 4


def test_the_end_of_a_trial_waits_for_unavailable_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agr_ray.storage.retry._RETRY_S", 0.0)
    sweep = opened(tune_job(tmp_path))
    outages = {"read": 1, "read_table": 1}
    for name in outages:
        monkeypatch.setattr(Storage, name, away_once(name, outages))

    complete(sweep, [0.9, 0.8])

    assert (sweep.trials[0].state, len(sweep.trials[0].epochs)) == ("complete", 2)
    assert outages == {"read": 0, "read_table": 0}


def away_once(name: str, outages: dict[str, int]) -> Any:
    method = getattr(Storage, name)

    def call(*args: Any, **options: Any) -> Any:
        if outages[name]:
            outages[name] -= 1
            raise StorageUnavailable("it is away")
        return method(*args, **options)

    return call


# Failures that no trial's values cause


def fail(sweep: Sweep, why: str, num: int) -> None:
    for _ in range(num):
        following = sweep.next()
        assert following is not None
        sweep.started(following[0])
        sweep.failed(following[0], why)


def test_a_fault_of_all_trials_ends_the_sweep_and_they_are_retried(tmp_path: Path) -> None:
    job = tune_job(tmp_path, trials=6)
    first = opened(job)
    with pytest.raises(JobError, match=r"all 3 trials that have ended failed .* \(raised: no disk\); fix the cause"):
        fail(first, "raised: no disk", 6)
    assert states(first) == ["failed"] * 3
    asked = [first.trials[number].params for number in range(3)]

    second = opened(job)

    assert second.num_left == 6
    for _ in range(6):
        complete(second, [0.9])
    assert states(second) == ["complete"] * 6
    assert [second.trials[number].params for number in range(3)] == asked  # the paper's among them
    told = study(second).trials
    assert [each.state.name for each in told] == ["FAIL"] * 3 + ["COMPLETE"] * 6
    assert [each.state.name for each in study(opened(job)).trials] == [each.state.name for each in told]


def test_a_trial_that_failed_before_its_first_epoch_restarts(tmp_path: Path) -> None:
    first = opened(tune_job(tmp_path))
    complete(first, [0.9])
    fail(first, "raised: x", 1)
    train(first, 1, [], finished="")
    Path(first.trial_uri(1), "history.parquet").unlink()

    second = opened(tune_job(tmp_path))

    assert states(second) == ["complete", "unfinished"]
    assert second.trials[1].failures == ("raised: x",)
    assert not Path(second.trial_uri(1), "run.json").exists()  # without it the initial weights are drawn again


def test_small_sweeps_and_diverging_ones_are_distinguished(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="all 2 trials that have ended failed"):
        fail(opened(tune_job(tmp_path / "small", trials=2)), "killed: its process died", 2)
    diverging = opened(tune_job(tmp_path / "diverging"))
    fail(diverging, "diverged: epoch 1, step 1", 3)
    assert opened(tune_job(tmp_path / "diverging")).num_left == 0
    mixed = opened(tune_job(tmp_path / "mixed", trials=6))
    complete(mixed, [0.9])
    fail(mixed, "raised: x", 5)


# Interrupted


def test_after_a_kill_finished_trials_stay_and_the_others_resume(tmp_path: Path) -> None:
    job = tune_job(tmp_path, trials=4)
    first = opened(job)
    complete(first, [0.9])
    for number in (1, 2):
        assert first.next() is not None
        first.started(number)
    first.reported(1, row(1, 0.8))
    train(first, 1, [0.8, 0.7])  # ended, and the driver was killed before it knew
    train(first, 2, [0.6], finished="")
    asked = first.trials[2].params

    second = opened(job)

    assert states(second) == ["complete", "complete", "unfinished"]
    assert second.trials[1].objective == 0.7
    following = second.next()
    assert following is not None
    assert (following[0], following[1]) == (2, dict(asked))
    assert [each.state.name for each in study(second).trials] == ["COMPLETE", "COMPLETE", "RUNNING"]
    fresh = second.next()
    assert fresh is not None
    assert fresh[0] == 3
    assert second.next() is None


def test_a_resumed_sweep_does_not_repeat_its_draws(tmp_path: Path) -> None:
    job = tune_job(tmp_path / "a", paper_first=False)
    drawn = []
    for _ in range(3):
        sweep = opened(job)  # as if it was killed after each trial
        complete(sweep, [0.9])
        drawn.append(sweep.trials[max(sweep.trials)].params)
    undisturbed = opened(tune_job(tmp_path / "b", paper_first=False))
    for _ in range(3):
        complete(undisturbed, [0.9])

    assert len({params["train.lr"] for params in drawn}) == 3
    assert drawn == [undisturbed.trials[number].params for number in range(3)]


def test_a_proposed_trial_without_a_record_is_failed_in_optuna(tmp_path: Path) -> None:
    first = opened(tune_job(tmp_path))
    complete(first, [0.9])
    first.study.ask(1)  # and killed

    second = opened(tune_job(tmp_path))

    assert [each.state.name for each in study(second).trials] == ["COMPLETE", "FAIL"]
    following = second.next()
    assert following is not None
    assert following[0] == 1


@pytest.mark.parametrize("num_written", [0, 1])
def test_a_kill_while_a_trial_is_proposed_does_not_corrupt_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_written: int
) -> None:
    first = opened(tune_job(tmp_path))
    written: list[str] = []
    write = optuna.Trial.set_user_attr

    def killed(trial: optuna.Trial, key: str, value: Any) -> None:
        if len(written) == num_written:
            raise KeyboardInterrupt
        written.append(key)
        write(trial, key, value)

    monkeypatch.setattr(optuna.Trial, "set_user_attr", killed)
    with pytest.raises(KeyboardInterrupt):
        first.next()
    monkeypatch.undo()

    second = opened(tune_job(tmp_path))
    complete(second, [0.9])

    assert states(second) == ["complete"]
    assert [each.value for each in study(second).trials] == [None, 0.9]


def test_the_study_gets_each_report_once(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path))
    complete(sweep, [0.9])

    sweep.study.tell(sweep.trials[0])

    assert [each.value for each in study(sweep).trials] == [0.9]


def test_a_lost_study_is_rebuilt_from_the_records(tmp_path: Path) -> None:
    first = opened(tune_job(tmp_path, constraints={"age_mae_years": 0.4}))
    complete(first, [0.9, 0.8])
    assert first.next() is not None
    first.started(1)
    first.reported(1, row(1, 0.7))
    first.ended(1, "after epoch 1")
    assert first.next() is not None
    before = study(first).trials
    (tmp_path / "sweep" / "study.journal").unlink()

    second = opened(tune_job(tmp_path, constraints={"age_mae_years": 0.4}))

    after = study(second).trials
    for was, is_ in zip(before, after, strict=True):
        assert (is_.state, is_.params, is_.value) == (was.state, was.params, was.value)
        assert (is_.intermediate_values, is_.constraints) == (was.intermediate_values, was.constraints)
    following = second.next()
    assert following is not None
    assert following[0] == 2


def test_a_line_that_a_kill_cut_off_does_not_corrupt_the_journal(tmp_path: Path) -> None:
    complete(opened(tune_job(tmp_path)), [0.9])
    journal = tmp_path / "sweep" / "study.journal"
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 4, "wor')

    second = opened(tune_job(tmp_path))
    complete(second, [0.8])

    assert [each.value for each in study(second).trials] == [0.9, 0.8]


def test_a_journal_in_memory_has_the_format_of_the_file(tmp_path: Path) -> None:
    """The journal of a sweep in a bucket is in memory: read from a file that a kill truncated, and read by Optuna."""
    sweep = opened(tune_job(tmp_path))
    complete(sweep, [0.9])
    journal = MemoryJournal((tmp_path / "sweep" / "study.journal").read_bytes() + b'{"op_code": 4, "wor')
    loaded = optuna.load_study(study_name="sweep", storage=JournalStorage(journal))
    loaded.add_trial(optuna.trial.create_trial(value=0.7))

    (tmp_path / "copy.journal").write_bytes(journal.to_bytes())

    again = optuna.load_study(
        study_name="sweep", storage=JournalStorage(JournalFileBackend(str(tmp_path / "copy.journal")))
    )
    assert [each.value for each in again.trials] == [0.9, 0.7]


def test_a_journal_that_others_may_be_writing_is_not_changed(tmp_path: Path) -> None:
    journal = tmp_path / "shared.journal"
    job = tune_job(tmp_path, study=str(journal))
    complete(opened(job), [0.9])
    half = journal.read_bytes() + b'{"op_code": 4, "wor'
    journal.write_bytes(half)

    with contextlib.suppress(ConfigError):  # here nobody comes to finish the line
        Study(STORAGE, str(tmp_path / "sweep"), "another", job.tune, ("age",), "sweep")

    assert journal.read_bytes().startswith(half)


def test_a_database_keeps_the_study_of_several_sweeps(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    for name in ("one", "two"):
        job = tune_job(tmp_path, name=name, study=url, study_name="shared", trials=2)
        complete(opened(job), [0.9])
        complete(opened(job), [0.8])

    shared = optuna.load_study(study_name="shared", storage=url)
    assert [each.value for each in shared.trials] == [0.9, 0.8, 0.9, 0.8]
    assert not (tmp_path / "one" / "study.journal").exists()


def test_the_error_of_an_unreachable_database_hides_the_password(tmp_path: Path) -> None:
    job = tune_job(tmp_path, study="nosuchdb://me:secret@nowhere/db?password=secret")

    with pytest.raises(ConfigError, match=r"tune\.study nosuchdb://me:\*\*\*@nowhere/db\?password=\*\*\*: ") as error:
        opened(job)
    assert "secret" not in str(error.value)


def test_a_study_of_other_objectives_is_rejected(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    opened(tune_job(tmp_path, name="one", study=url, study_name="shared"))

    with pytest.raises(ConfigError, match=r"the study there has 1 objectives and tune\.mode pareto has 3"):
        opened(tune_job(tmp_path, name="two", study=url, study_name="shared", mode="pareto"))


# Budgets and resuming


def test_the_epochs_of_all_trials_can_be_limited(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path, max_epochs=3))
    complete(sweep, [0.9, 0.8])
    assert sweep.spent == ""
    complete(sweep, [0.9])

    assert sweep.spent == "tune.max_epochs 3"
    assert sweep.next() is None
    assert opened(tune_job(tmp_path, max_epochs=9)).next() is not None


def test_the_hours_of_a_sweep_can_be_limited(tmp_path: Path) -> None:
    assert opened(tune_job(tmp_path, max_hours=1e-9)).spent == "tune.max_hours 1e-09"


def test_a_finished_sweep_is_rejected_unless_more_trials_are_requested(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path, trials=1))
    complete(sweep, [0.9])
    sweep.write_record("1 trials")

    with pytest.raises(ConfigError, match=r"has finished \(1 trials\); --add 10 adds 10 trials"):
        planned(tune_job(tmp_path, trials=1))
    assert planned(tune_job(tmp_path, trials=2)).num_trials == 2
    assert planned(tune_job(tmp_path, trials=1, new_run=True)).name == "sweep-2"
    assert planned(tune_job(tmp_path, trials=1, add=20)).num_trials == 21


def test_adding_again_after_a_kill_adds_once(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path, trials=1))
    complete(sweep, [0.9])
    sweep.write_record("1 trials")

    added = opened(tune_job(tmp_path, trials=1, add=2))  # and killed
    assert added.plan.num_trials == 3
    again = opened(tune_job(tmp_path, trials=1, add=2))

    assert again.plan.num_trials == 3
    assert again.num_left == 2


def test_add_without_a_sweep_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add 5: there is no sweep"):
        planned(tune_job(tmp_path, add=5))


def test_a_sweep_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    opened(tune_job(tmp_path))

    with pytest.raises(ConfigError, match=r"tune\.name sweep: the sweep .* has tune\.seed 0, not 1; choose another"):
        planned(tune_job(tmp_path, seed=1))
    with pytest.raises(ConfigError, match=r"sweep .* has other data; choose another name"):
        plan_sweep(STORAGE, tune_job(tmp_path, max_hours=3.0), "of other data")
    assert planned(tune_job(tmp_path, max_concurrent=7, max_hours=3.0)).settings_digest


def test_the_record_keeps_no_password(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path, study=f"sqlite:///{tmp_path}/secret.db"))

    assert "secret" not in Path(sweep.plan.uri, "sweep.json").read_text()


# Room


@pytest.mark.parametrize(
    ("nodes", "config", "fits"),
    [
        ([{"CPU": 8}], {}, 2),
        ([{"CPU": 2}], {}, 0),
        ([{"CPU": 8}], {"num_workers": 2}, 2),
        ([{"CPU": 4}, {"CPU": 4}], {"num_workers": 2}, 2),
        ([{"CPU": 3}, {"CPU": 3}, {"CPU": 3}], {"cpus_per_worker": 2}, 2),
        ([{"CPU": 64, "GPU": 8}], {"use_gpu": True}, 8),
        ([{"CPU": 64, "GPU": 8}], {"use_gpu": True, "num_workers": 4}, 2),
        ([{"CPU": 64, "GPU": 2}], {"use_gpu": True, "gpus_per_worker": 0.5}, 4),
        ([{"CPU": 64, "GPU": 1}], {"use_gpu": True, "gpus_per_worker": 0.4}, 2),
        ([{"CPU": 64, "GPU": 2}], {"use_gpu": True, "gpus_per_worker": 0.6}, 2),
        ([{"CPU": 9, "GPU": 8}], {"use_gpu": True}, 3),
        ([{"CPU": 64}], {"use_gpu": True}, 0),
        # The process that waits for the workers may be on the small node, and then its one CPU is not whole.
        ([{"CPU": 1, "GPU": 1}, {"CPU": 64}], {"use_gpu": True}, 0),
    ],
)
def test_concurrent_trials_are_as_many_as_fit(nodes: list[dict[str, float]], config: dict[str, Any], fits: int) -> None:
    assert trials_that_fit(nodes, TrainConfig(**config)) == fits


def test_a_fraction_of_a_gpu_is_for_one_worker() -> None:
    with pytest.raises(ValueError, match="NCCL does not support two workers of a run on one GPU"):
        TrainConfig(use_gpu=True, gpus_per_worker=0.5, num_workers=2)


def test_a_sweep_whose_lock_was_lost_writes_and_deletes_nothing_more(tmp_path: Path) -> None:
    job = tune_job(tmp_path)
    uri = f"{tmp_path}/sweep/lock.json"
    with run_lock(STORAGE, uri, "this driver", expiry_s=60.0, console=Console(quiet=True)) as lock:
        sweep = Sweep(STORAGE, planned(job), job, Console(quiet=True), lock)
        sweep.begin()
        complete(sweep, [0.9])
        assert sweep.next() is not None
        train(sweep, 1, [0.5])  # better: the first trial's checkpoint would be deleted
        before = [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
        lock.lost = True

        with pytest.raises(LockLost):
            sweep.reported(1, row(1, 0.5))
        with pytest.raises(LockLost):
            sweep.next()
        with pytest.raises(LockLost):
            sweep.ended(1)
        with pytest.raises(LockLost):
            sweep.clean()
        with pytest.raises(LockLost):
            sweep.write_record("3 trials")

    after = [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert after == before

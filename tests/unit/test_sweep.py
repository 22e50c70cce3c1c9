"""A sweep without Ray: what it resumes from, what it keeps, what its study is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sweeps import STORAGE, complete, opened, planned, row, train, tune_job

from agr_ray.config import ConfigError, TrainConfig
from agr_ray.runtime.placement import trials_that_fit
from agr_ray.runtime.sweep import Sweep
from agr_ray.schema import HISTORY


def study(sweep: Sweep) -> optuna.Study:
    backend = JournalFileBackend(str(Path(sweep.plan.uri) / "study.journal"))
    return optuna.load_study(study_name="sweep", storage=JournalStorage(backend))


def states(sweep: Sweep) -> list[str]:
    return [sweep.trials[number].state for number in sorted(sweep.trials)]


# From the first trial to the last


def test_trials_are_numbered_recorded_and_told(tmp_path: Path) -> None:
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


def test_points_come_after_the_papers_and_what_they_leave_out_is_drawn(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path, points_to_evaluate=[{"train.lr": 3e-3}]))

    given = [sweep.next() for _ in range(3)]

    assert [each and each[1]["train.lr"] for each in given][:2] == [1e-4, 3e-3]
    assert given[1] is not None
    assert 0.1 <= given[1][1]["loss.race_weight"] <= 2.0


def test_a_pruned_and_a_failed_trial_are_told_as_such(tmp_path: Path) -> None:
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


def test_constraints_are_told_to_optuna(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path, constraints={"age_mae_years": 0.4}))

    complete(sweep, [0.9])

    assert study(sweep).trials[0].constraints == pytest.approx({"age_mae_years": 0.1})


def test_a_front_keeps_checkpoints_of_all_that_no_other_beats(tmp_path: Path) -> None:
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


# Interrupted


def test_after_a_kill_finished_trials_stay_and_the_others_go_on(tmp_path: Path) -> None:
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


def test_a_resumed_sweep_does_not_draw_again_what_it_drew(tmp_path: Path) -> None:
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


def test_a_trial_that_was_proposed_and_not_recorded_failed_to_optuna(tmp_path: Path) -> None:
    first = opened(tune_job(tmp_path))
    complete(first, [0.9])
    first.study.ask(1)  # and killed

    second = opened(tune_job(tmp_path))

    assert [each.state.name for each in study(second).trials] == ["COMPLETE", "FAIL"]
    following = second.next()
    assert following is not None
    assert following[0] == 1


def test_a_lost_study_is_made_again_from_the_records(tmp_path: Path) -> None:
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


def test_a_line_that_a_kill_cut_off_does_not_spoil_the_journal(tmp_path: Path) -> None:
    complete(opened(tune_job(tmp_path)), [0.9])
    journal = tmp_path / "sweep" / "study.journal"
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 4, "wor')

    second = opened(tune_job(tmp_path))
    complete(second, [0.8])

    assert [each.value for each in study(second).trials] == [0.9, 0.8]


def test_a_database_keeps_the_study_of_several_sweeps(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    for name in ("one", "two"):
        job = tune_job(tmp_path, name=name, study=url, study_name="shared", trials=2)
        complete(opened(job), [0.9])
        complete(opened(job), [0.8])

    shared = optuna.load_study(study_name="shared", storage=url)
    assert [each.value for each in shared.trials] == [0.9, 0.8, 0.9, 0.8]
    assert not (tmp_path / "one" / "study.journal").exists()


def test_a_database_that_can_not_be_reached_is_said_without_the_password(tmp_path: Path) -> None:
    job = tune_job(tmp_path, study="nosuchdb://me:secret@nowhere/db")

    with pytest.raises(ConfigError, match=r"tune\.study nosuchdb://nowhere/db: ") as error:
        opened(job)
    assert "secret" not in str(error.value).partition(": ")[0]


def test_a_study_of_other_objectives_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    opened(tune_job(tmp_path, name="one", study=url, study_name="shared"))

    with pytest.raises(ConfigError, match=r"the study there has 1 objectives and tune\.mode pareto has 3"):
        opened(tune_job(tmp_path, name="two", study=url, study_name="shared", mode="pareto"))


# Budgets, and what a command may go on with


def test_epochs_of_all_trials_are_a_budget(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path, max_epochs=3))
    complete(sweep, [0.9, 0.8])
    assert sweep.spent == ""
    complete(sweep, [0.9])

    assert sweep.spent == "tune.max_epochs 3"
    assert sweep.next() is None
    assert opened(tune_job(tmp_path, max_epochs=9)).next() is not None


def test_hours_are_a_budget(tmp_path: Path) -> None:
    assert opened(tune_job(tmp_path, max_hours=1e-9)).spent == "tune.max_hours 1e-09"


def test_a_finished_sweep_is_refused_unless_more_is_asked_for(tmp_path: Path) -> None:
    sweep = opened(tune_job(tmp_path, trials=1))
    complete(sweep, [0.9])
    sweep.write_record("1 trials")

    with pytest.raises(ConfigError, match=r"has finished \(1 trials\); --add 10 makes 10 trials more"):
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


def test_nothing_is_added_to_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add 5: there is no sweep"):
        planned(tune_job(tmp_path, add=5))


def test_a_sweep_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    opened(tune_job(tmp_path))

    with pytest.raises(ConfigError, match=r"tune\.name sweep: the sweep .* has other settings or data"):
        planned(tune_job(tmp_path, seed=1))
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
    ],
)
def test_trials_that_fit(nodes: list[dict[str, float]], config: dict[str, Any], fits: int) -> None:
    assert trials_that_fit(nodes, TrainConfig(**config)) == fits


def test_a_share_of_a_gpu_is_for_one_worker() -> None:
    with pytest.raises(ValueError, match="NCCL takes no two workers of one run on one GPU"):
        TrainConfig(use_gpu=True, gpus_per_worker=0.5, num_workers=2)

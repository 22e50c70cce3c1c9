"""Sweeps on a small cluster: trials that end, raise, diverge, and are not repeated."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from sets import SIDE_PX, prepared_set

from agr_ray.config import ModelConfig, TrainConfig, TrainJob, TuneConfig, TuneJob, parse
from agr_ray.data.prepared import open_prepared
from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.runtime.train import settings_digest
from agr_ray.runtime.tune import tune
from agr_ray.schema import TRIALS
from agr_ray.storage import Storage

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]  # a trial costs more than a training

SPLITS = {"train": 40, "val": 14}
EPOCHS = 2
SPACE = {
    "loss.race_weight": {"uniform": (0.1, 2.0)},
    "train.lr": {"log_uniform": (1e-4, 1e-2)},
    "train.optimizer": {"choice": ("adam", "adamw")},
    "train.weight_decay": {"log_uniform": (1e-3, 1e-1), "when": {"train.optimizer": "adamw"}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_set(tmp_path_factory.mktemp("tune") / "data", SPLITS)


def tune_job(data: Path, name: str, space: dict[str, Any] = SPACE, *, add: int = 0, **changes: Any) -> TuneJob:
    train = {"batch_size": 8, "epochs": EPOCHS, "threads_per_worker": 1, "schedule": "constant"}
    settings = {"trials": 3, "max_concurrent": 2, "asha": False, "out": str(data.parent / "sweeps"), "name": name}
    return TuneJob(
        model=ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX, bn_momentum=0.1),
        train=TrainConfig(**{"data": os.path.relpath(data), "out": str(data.parent / "runs"), **train}),
        tune=TuneConfig(**{"space": space, **settings, **changes}),
        add=add,
    )


def trials(sweep: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(sweep / "trials.parquet").to_pylist()
    return rows


def weights(sweep: Path) -> list[str]:
    """Return the trials of which checkpoints are kept."""
    return sorted(folder.parent.name for folder in sweep.glob("trials/*/best"))


def wait_until_nothing_is_held() -> None:
    """Fail unless the workers of stopped trials end and release their resources."""
    deadline = time.monotonic() + 60
    held: dict[str, float] = {}
    while time.monotonic() < deadline:
        free = ray.available_resources()
        held = {name: has - free.get(name, 0.0) for name, has in ray.cluster_resources().items() if name == "CPU"}
        if held["CPU"] < 0.01:
            return
        time.sleep(0.5)
    raise AssertionError(f"still held: {held}")


@pytest.fixture(scope="module")
def sweep(data: Path) -> Path:
    best = Path(tune(tune_job(data, "small")))
    assert best.name == "best"
    return best.parent


def test_every_trial_has_a_row(sweep: Path) -> None:
    table = pq.read_table(sweep / "trials.parquet")
    rows = table.to_pylist()

    assert table.schema.names == [*TRIALS.names, *SPACE]
    assert table.schema.field("train.lr").type == pa.float64()
    assert [row["number"] for row in rows] == [0, 1, 2]
    assert {row["state"] for row in rows} == {"complete"}
    assert all(row["epochs"] == EPOCHS and row["objective"] > 0 and row["wall_s"] > 0 for row in rows)
    assert [row["is_best"] for row in rows].count(True) == 1
    assert all((row["train.weight_decay"] is None) == (row["train.optimizer"] == "adam") for row in rows)


def test_the_first_trial_has_the_papers_values(sweep: Path) -> None:
    assert (trials(sweep)[0]["loss.race_weight"], trials(sweep)[0]["train.lr"]) == (0.5, 1e-4)


def test_only_the_best_keeps_its_checkpoints(sweep: Path) -> None:
    (best,) = [row["number"] for row in trials(sweep) if row["is_best"]]

    assert weights(sweep) == [f"{best:04d}"]
    assert sorted(folder.parent.name for folder in sweep.glob("trials/*/checkpoints")) == [f"{best:04d}"]
    assert len(list(sweep.glob("trials/*/history.parquet"))) == 3
    assert not (sweep / "tune").exists()


def test_the_best_checkpoint_matches_the_table(sweep: Path) -> None:
    (row,) = [row for row in trials(sweep) if row["is_best"]]
    metrics = read_checkpoint(sweep / "best").meta["metrics"]

    assert metrics["epoch"] == row["best_epoch"]
    assert metrics["val"]["age"]["mae_years"] == pytest.approx(row["age_mae_years"])
    assert 1 - metrics["val"]["gender"]["balanced_accuracy"] == pytest.approx(row["gender_error"])


def test_best_toml_repeats_the_training_of_the_best_trial(sweep: Path, data: Path) -> None:
    (row,) = [row for row in trials(sweep) if row["is_best"]]
    job = parse(TrainJob, ["--config", str(sweep / "best.toml")], {})

    assert (job.loss.race_weight, job.train.lr) == (row["loss.race_weight"], row["train.lr"])
    assert job.train.name == "small-best"
    record = json.loads((sweep / "trials" / f"{row['number']:04d}" / "run.json").read_text())
    assert settings_digest(job, [open_prepared(Storage(), str(data), "train.data")]) == record["settings_digest"]


def test_the_study_contains_the_same_trials(sweep: Path) -> None:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(sweep / "study.journal")))
    study = optuna.load_study(study_name="small", storage=storage)

    assert [each.state.name for each in study.trials] == ["COMPLETE"] * 3
    assert [each.value for each in study.trials] == pytest.approx([row["objective"] for row in trials(sweep)])
    assert [sorted(each.intermediate_values) for each in study.trials] == [[1, 2]] * 3


def test_there_is_a_report(sweep: Path) -> None:
    page = (sweep / "report.html").read_text()

    assert page.lower().startswith("<!doctype html>")
    assert "train.lr" in page


def test_a_finished_sweep_is_rejected_and_extended_by_add(sweep: Path, data: Path) -> None:
    before = trials(sweep)
    with pytest.raises(ConfigError, match=r"has finished \(3 trials\); --add 10 adds 10 trials"):
        tune(tune_job(data, "small"))

    tune(tune_job(data, "small", add=1))

    after = trials(sweep)
    assert len(after) == 4
    assert [(row["objective"], row["wall_s"]) for row in after[:3]] == [
        (row["objective"], row["wall_s"]) for row in before
    ]
    assert json.loads((sweep / "sweep.json").read_text())["finished"] == "4 trials"


def test_a_trial_that_diverges_and_one_that_raises_are_rows(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "no-weights.pt"
    space = {
        "train.lr": {"choice": (1e-3, 1e30)},
        "train.optimizer": {"choice": ("adam", "sgd")},
        "model.pretrained": {"choice": ("none", str(broken))},
    }
    points = [
        {"train.lr": 1e30, "train.optimizer": "sgd", "model.pretrained": "none"},
        {"train.lr": 1e-3, "train.optimizer": "adam", "model.pretrained": str(broken)},
        {"train.lr": 1e-3, "train.optimizer": "adam", "model.pretrained": "none"},
    ]

    job = tune_job(data, "broken", space, points_to_evaluate=points, paper_first=False, asha=True)
    sweep = Path(tune(job)).parent

    diverged, raised, complete = trials(sweep)
    assert diverged["state"] == raised["state"] == "failed"
    assert diverged["why"].startswith("diverged: epoch 1, step ")
    assert diverged["num_failures"] == 0
    assert "no-weights.pt" in raised["why"]
    assert raised["why"].startswith("raised: ")
    assert raised["num_failures"] == 2
    assert (complete["state"], complete["is_best"]) == ("complete", True)


def test_halving_stops_trials(data: Path) -> None:
    # What learns nothing stays as good as guessing; what steps too far is much worse.
    space = {"train.lr": {"choice": (1e-9, 0.1)}}
    points = [{"train.lr": 1e-9}, {"train.lr": 0.1}, {"train.lr": 0.1}]
    job = tune_job(
        data,
        "halved",
        space,
        points_to_evaluate=points,
        paper_first=False,
        asha=True,
        grace_epochs=1,
        reduction=2,
        max_concurrent=1,
    )

    sweep = Path(tune(job)).parent

    rows = trials(sweep)
    assert rows[0]["state"] == "complete"
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert pruned
    # Not how many epochs they made: such small ones are over before Tune has looked at the first.
    assert all("after epoch 1 not among the best 1 of 2" in row["why"] for row in pruned)
    assert weights(sweep) == ["0000"]
    assert not list(sweep.glob("trials/0001/checkpoints"))
    wait_until_nothing_is_held()


def test_an_unfinished_trial_resumes_and_finished_ones_are_not_repeated(sweep: Path, data: Path) -> None:
    job = tune_job(data, "hours", trials=2, max_epochs=1, max_concurrent=1)
    tune(job)
    folder = Path(job.tune.out) / "hours"
    assert [row["state"] for row in trials(folder)] == ["unfinished"]

    tune(tune_job(data, "hours", trials=2, max_concurrent=1))

    rows = trials(folder)
    assert [(row["number"], row["state"], row["epochs"]) for row in rows] == [
        (0, "complete", EPOCHS),
        (1, "complete", EPOCHS),
    ]


def test_trials_that_do_not_fit_are_rejected_with_the_available_resources(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"each trial asks for 1 x 1 CPU .* and 2 CPU for reading; .* room for 2"):
        tune(tune_job(data, "large", max_concurrent=5))
    assert not list((data.parent / "sweeps" / "large").iterdir())
    assert ray.is_initialized()

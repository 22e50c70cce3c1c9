"""Logging to MLflow: to a fake server in a few lines, and to MLflow itself where it is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from agr_ray.errors import ConfigError
from agr_ray.learn.tracking import EXPERIMENT, TrackedRun, flat
from agr_ray.schema import HISTORY

SETTINGS = {"train": {"lr": 0.1, "image_sizes": [48, 88]}, "model": {"backbone": "resnet18"}}


class Refused(Exception):
    """In place of MlflowException."""


class Server:
    """A tracking server's memory, and the part of MlflowClient that we use."""

    def __init__(self) -> None:
        self.runs: dict[str, Any] = {}
        self.is_away = False

    def __call__(self, tracking_uri: str) -> Server:
        return self

    def answer(self) -> None:
        if self.is_away:
            raise Refused("no answer\nfrom it")

    def get_experiment_by_name(self, name: str) -> None:
        self.answer()

    def create_experiment(self, name: str) -> str:
        return name

    def search_runs(self, experiments: list[str], filter_string: str, max_results: int) -> list[Any]:
        return [run for run in self.runs.values() if filter_string == f"tags.`agr_ray.run` = '{run.tag}'"]

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
        run = SimpleNamespace(
            info=SimpleNamespace(run_id=str(len(self.runs))),
            data=SimpleNamespace(metrics={}, params={}),
            tag=tags["agr_ray.run"],
            name=run_name,
            logged=[],
            files=[],
            has_ended=False,
        )
        self.runs[run.info.run_id] = run
        return run

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self.answer()
        run = self.runs[run_id]
        run.data.params |= dict(params)
        for key, value, _, step in metrics:
            run.data.metrics[key] = value
            run.logged.append((key, step))

    def log_artifact(self, run_id: str, path: str) -> None:
        self.runs[run_id].files.append(Path(path).name)

    def set_terminated(self, run_id: str) -> None:
        self.runs[run_id].has_ended = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    modules = {
        "mlflow": {"MlflowClient": made},
        "mlflow.entities": {"Param": lambda *of: of, "Metric": lambda *of: of},
        "mlflow.exceptions": {"MlflowException": Refused},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return made


def history(num_epochs: int) -> list[dict[str, Any]]:
    return [
        dict.fromkeys(HISTORY.names, 0.5) | {"epoch": epoch, "val_loss": None} for epoch in range(1, num_epochs + 1)
    ]


def test_a_resumed_run_logs_each_epoch_once_to_the_same_mlflow_run(server: Server) -> None:
    first = TrackedRun("http://tracking", "s3://runs/one", SETTINGS)
    assert first.log(history(1)) == first.log(history(2)) == ""
    again = TrackedRun("http://tracking", "s3://runs/one", SETTINGS)
    again.log(history(4))
    other = TrackedRun("http://tracking", "s3://runs/two", SETTINGS)
    other.log(history(1))

    one, two = server.runs.values()
    assert [step for key, step in one.logged if key == "train_loss"] == [1, 2, 3, 4]
    assert not any(key == "val_loss" for key, _ in one.logged)  # null
    assert [step for key, step in two.logged if key == "epoch"] == [1]
    assert (one.name, one.data.params["train.lr"], one.data.params["model.backbone"]) == ("one", "0.1", "resnet18")


def test_epochs_that_a_server_missed_are_logged_when_it_is_back(server: Server) -> None:
    run = TrackedRun("http://tracking", "runs/one", SETTINGS)
    run.log(history(1))
    server.is_away = True
    assert run.log(history(2)) == "MLflow: no answer from it"
    server.is_away = False
    assert run.log(history(3)) == ""

    assert [step for key, step in server.runs["0"].logged if key == "epoch"] == [1, 2, 3]


def test_an_unreachable_server_at_the_start_gives_one_line(server: Server) -> None:
    server.is_away = True

    with pytest.raises(ConfigError, match=r"^train.mlflow_uri http://tracking: no answer from it$"):
        TrackedRun("http://tracking", "runs/one", SETTINGS)


def test_files_are_kept_when_the_run_ends(server: Server) -> None:
    assert TrackedRun("http://tracking", "runs/one", SETTINGS).finish(["/tmp/history.png"]) == ""

    assert server.runs["0"].files == ["history.png"]
    assert server.runs["0"].has_ended


def test_settings_are_flat_text() -> None:
    assert flat({"train": {"sides": [1, 2], "long": "x" * 1000}}) == {"train.sides": "[1, 2]", "train.long": "x" * 500}


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_finds_the_run_again(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    TrackedRun(uri, "runs/one", SETTINGS).log(history(2))
    TrackedRun(uri, "runs/one", SETTINGS).log(history(3))

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (found,) = client.search_runs([experiment.experiment_id])
    assert [point.step for point in client.get_metric_history(found.info.run_id, "train_loss")] == [1, 2, 3]
    assert found.data.params["train.lr"] == "0.1"

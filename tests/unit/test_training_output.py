"""Training's outputs besides weights, and the content of its batches, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from prepared_sets import SIDE_PX, prepared_set
from ray.data.block import BlockAccessor
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agr_ray.config import ModelConfig, TrainJob
from agr_ray.config.pipeline import Pipeline
from agr_ray.data.crops import training_arrays
from agr_ray.evaluation.audit import metrics_report
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import UTKFACE, Labels
from agr_ray.learn.context import EpochReport
from agr_ray.learn.run import Run
from agr_ray.models.checkpoint import CARD
from agr_ray.models.checkpoint_files import add_to_card
from agr_ray.models.checkpoint_network import load_train_state, save_checkpoint
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.transform import Transform
from agr_ray.runtime.train import _publish
from agr_ray.runtime.training.fence import Fence
from agr_ray.runtime.training.worker import RunLogs, _epoch_line
from agr_ray.schema import HISTORY
from agr_ray.storage import Storage, StorageUnavailable
from agr_ray.storage.lock import LockLost
from agr_ray.storage.retry import Retry

STORAGE = Storage()
TRANSFORM = Transform(SIDE_PX, SIDE_PX)
JOB = TrainJob(model=ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX))


def network() -> MultiTaskNet:
    torch.manual_seed(0)
    return MultiTaskNet(JOB.model, UTKFACE).eval()


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, Any]:
    return training_arrays(pq.read_table(prepared_set(tmp_path / "prepared") / "crops"), SIDE_PX, UTKFACE)


def test_batches_carry_the_ids_of_their_rows_through_ray_data(arrays: dict[str, Any]) -> None:
    assert arrays["image_id"].tolist() == ["a.jpg", "b.jpg", "c.jpg"]
    assert len({len(values) for values in arrays.values()}) == 1

    block = BlockAccessor.for_block(BlockAccessor.batch_to_block(arrays))

    assert block.to_arrow().schema.field("image_id").type in ("string", "large_string")
    assert block.to_batch_format("numpy")["image_id"].tolist() == ["a.jpg", "b.jpg", "c.jpg"]


def run_in(folder: Path) -> Run:
    return Run(
        job=JOB,
        storage=STORAGE,
        uri=str(folder),
        transform=TRANSFORM,
        pipeline=Pipeline(),
        baseline=Baseline(UTKFACE, None, None, None),
        sampler=None,
        num_train_rows=3,
        num_val_rows=3,
        train_images=torch.empty(0, dtype=torch.int64),
        data={},
        git_commit="",
        settings_digest="",
    )


def test_the_last_epoch_adds_a_page_of_samples_to_tensorboard(tmp_path: Path, arrays: dict[str, Any]) -> None:
    run = run_in(tmp_path / "run")
    row = dict.fromkeys(HISTORY.names, 1.0) | {"epoch": 4, "step": 9, "num_train_rows": 3, "num_val_rows": 3}
    report = EpochReport(row, True, "epochs", {}, network(), TRANSFORM, dict)
    STORAGE.write(f"{run.uri}/lock.json", b"token")
    fence = Fence(STORAGE, f"{run.uri}/lock.json", "token", 1.0)
    logs = RunLogs(run, fence, Retry(0.0), epochs_done=0)

    logs.write(row, [row])
    logs.show(arrays, report)

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    (image,) = events.Images("val/samples")
    assert image.step == 4
    assert image.width > image.height > 100
    assert [event.value for event in events.Scalars("val/age_mae_years")] == [1.0]

    STORAGE.write(f"{run.uri}/lock.json", b"another")
    before = (tmp_path / "run" / "history.parquet").stat().st_mtime_ns
    with pytest.raises(LockLost):
        logs.write(row, [row])
    assert (tmp_path / "run" / "history.parquet").stat().st_mtime_ns == before


class Killed(BaseException):
    """The driver is gone."""


class Deadly:
    """Kills the driver right before one of its writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        for name in ("write", "write_table", "upload_tree"):
            monkeypatch.setattr(Storage, name, self.watched(getattr(Storage, name)))
        self.mlflow: list[str] = []
        monkeypatch.setattr("agr_ray.runtime.train.tracked_again", lambda run: (self, ""))

    def watched(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            if self.left == 1:
                self.left = 0
                raise Killed
            self.left -= 1
            return act(*args, **kwargs)

        return watching

    def log(self, history: list[dict[str, Any]]) -> str:
        return ""

    def finish(self, files: list[str]) -> str:
        self.watched(self.mlflow.append)("finished")
        return ""


def test_a_run_killed_before_any_of_its_final_writes_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [dict.fromkeys(HISTORY.names, 1) | {"epoch": epoch} for epoch in (1, 2)]
    lock, console = SimpleNamespace(check=lambda: None), Console(quiet=True)
    checkpoints = [SimpleNamespace(path=f"checkpoints/{name}") for name in ("first", "second")]
    result = SimpleNamespace(checkpoint=checkpoints[1], get_best_checkpoint=lambda *_: checkpoints[0])
    deadly, num_kills, is_killed = Deadly(monkeypatch), 0, True
    while is_killed:
        run = run_in(tmp_path / str(num_kills))
        for epoch, checkpoint in enumerate(checkpoints, 1):
            state = {"history": rows[:epoch], "finished": "epochs" if epoch == 2 else ""}
            save_checkpoint(Path(run.uri, checkpoint.path), network(), TRANSFORM, train_state=state)
        deadly.mlflow.clear()
        deadly.left, is_killed = num_kills + 1, False
        try:
            _publish(run, result, lock, console)  # type: ignore[arg-type]  # all that it uses
        except Killed:
            is_killed, num_kills = True, num_kills + 1
            assert not Path(run.uri, "run.json").exists()  # which would refuse the same command
            _publish(run, result, lock, console)  # type: ignore[arg-type]  # as above

        assert json.loads(Path(run.uri, "run.json").read_text())["finished"] == "epochs"
        assert pq.read_table(f"{run.uri}/history.parquet")["epoch"].to_pylist() == [1, 2]
        assert [len(load_train_state(Path(run.uri, name))["history"]) for name in ("best", "last")] == [1, 2]
        assert Path(run.uri, "history.png").exists()
        assert set(deadly.mlflow) == {"finished"}
    assert num_kills == 6  # best, last, history.parquet, history.png, MLflow, run.json


def test_an_epoch_with_only_age_ranges_reports_their_distance() -> None:
    row = dict.fromkeys(HISTORY.names, 2.0) | {"epoch": 4}
    report = EpochReport(row, True, "", {}, network(), TRANSFORM, dict)
    assert "val age MAE 2.00 years, gender" in _epoch_line(report, 9)
    row["val_age_mae_years"] = None
    assert "loss 2.000, val age outside its range by 2.00 years, gender" in _epoch_line(report, 9)


def measured() -> dict[str, Any]:
    truth = Labels(UTKFACE, np.full(3, 30, np.float32), np.array([0, 1, 1]), np.array([0, 1, 2]))
    guess = {"age": truth.age, "gender": truth.gender.astype(np.float32)}
    said = {"source": "folder", "split": "test", "split_manifest_sha256": "0" * 64, "data": "data"}
    return metrics_report(truth, guess) | {"evaluation": said | {"num_seen_in_training": 0}}


def test_an_evaluation_is_added_to_the_card(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, network(), TRANSFORM)
    card = (tmp_path / CARD).read_text()

    add_to_card(Storage(), str(tmp_path), measured(), Console())

    made = (tmp_path / CARD).read_text()
    assert made.startswith(card.rstrip())
    assert "## Measured on folder, split test, 00000000" in made


def test_a_missing_card_triggers_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path, network(), TRANSFORM)
    (tmp_path / CARD).unlink()

    add_to_card(Storage(), str(tmp_path), measured(), Console())

    assert not (tmp_path / CARD).exists()
    assert "warning: the model card was not updated" in capsys.readouterr().out


def test_a_read_only_checkpoint_keeps_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path, network(), TRANSFORM)
    card = (tmp_path / CARD).read_text()

    class ReadOnly(Storage):
        def write(self, uri: str, *args: Any, **options: Any) -> str:
            raise StorageUnavailable(f"{uri} can't be written: Permission denied")

    add_to_card(ReadOnly(), str(tmp_path), measured(), Console())

    assert (tmp_path / CARD).read_text() == card
    assert "warning: the model card was not updated" in capsys.readouterr().out

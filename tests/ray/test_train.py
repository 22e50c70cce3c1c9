"""Training on Ray Train: two workers, labels with gaps, a run that ends and one whose worker dies."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray.util.state import list_actors
from rich.console import Console
from sets import SIDE_PX, prepared_set
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agr_ray.config import AugmentConfig, EvaluateConfig, EvaluateJob, ModelConfig, TrainConfig, TrainJob, VisionConfig
from agr_ray.data.prepared import open_prepared
from agr_ray.errors import ConfigError, JobError
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.models.checkpoint_network import content_codes, load_train_state
from agr_ray.runtime.crop_stream import training_dataset
from agr_ray.runtime.evaluate import evaluate
from agr_ray.runtime.train import train
from agr_ray.schema import HISTORY
from agr_ray.storage import Storage
from agr_ray.storage.lock import LockLost, run_lock

pytestmark = pytest.mark.usefixtures("ray_cluster")

# Neither is a multiple of the workers, nor of a batch.
SPLITS = {"train": 37, "val": 13, "test": 5}
EPOCHS = 3


def train_job(data: Path, /, *, new_run: bool = False, **changes: Any) -> TrainJob:
    settings = {
        "data": str(data),
        "out": str(data.parent / "runs"),
        "name": "tiny",
        "num_workers": 2,
        "threads_per_worker": 1,
        "batch_size": 8,
        "epochs": EPOCHS,
        "lr": 1e-3,
    }
    return TrainJob(
        model=ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX, bn_momentum=0.1),
        augment=AugmentConfig(brightness=0.1),
        train=TrainConfig(**settings | changes),
        new_run=new_run,
    )


def history(run: Path) -> list[dict[str, Any]]:
    table = pq.read_table(run / "history.parquet")
    assert table.schema.equals(HISTORY)
    return table.to_pylist()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_set(tmp_path_factory.mktemp("train") / "data", SPLITS)


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    best = Path(train(train_job(data)))
    assert best.name == "best"
    return best.parent


def test_the_history_has_every_epoch_once(run: Path) -> None:
    rows = history(run)

    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert np.all(np.diff([row["step"] for row in rows]) > 0)
    assert all(np.isfinite(row["train_loss"]) and np.isfinite(row["val_loss"]) for row in rows)


def test_validation_counts_every_row_once(run: Path) -> None:
    assert [row["num_val_rows"] for row in history(run)] == [13, 13, 13]


def test_training_drops_at_most_one_row_per_worker(run: Path) -> None:
    assert all(37 - 2 < row["num_train_rows"] <= 37 for row in history(run))


def test_the_best_and_the_last_checkpoint_can_be_used(run: Path) -> None:
    rows = history(run)
    best = min(rows, key=lambda row: row["val_objective"])

    for name, row in (("best", best), ("last", rows[-1])):
        loaded = read_checkpoint(run / name)
        assert loaded.meta["metrics"]["epoch"] == row["epoch"]
        assert loaded.meta["metrics"]["val"]["n"] == 13
        assert loaded.meta["metrics"]["val"]["age"]["mae_years"] == pytest.approx(row["val_age_mae_years"])
        assert (loaded.transform.image_size, loaded.transform.crop_side_px) == (SIDE_PX, SIDE_PX)
        assert load_train_state(run / name)["epoch"] == row["epoch"]


def test_a_checkpoint_records_its_training_data(run: Path, data: Path) -> None:
    images = [row["content_hash"] for row in pq.read_table(data / "crops").to_pylist() if row["split"] == "train"]
    loaded = read_checkpoint(run / "best")
    said = loaded.meta["data"]

    assert loaded.pipeline.vision == open_prepared(Storage(), str(data), "data").vision != VisionConfig()
    assert load_train_state(run / "best")["train_images"].tolist() == content_codes(images).tolist()
    assert said["split_manifest_sha256"] == json.loads((data / "prepare.json").read_text())["split_manifest_sha256"]
    assert said["num_train_rows"] == 37


def test_a_tracked_run_records_its_outcome_and_keeps_its_logs(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())

    assert record["finished"] == "epochs"
    assert record["config"]["train"]["batch_size"] == 8
    assert any((run / "tensorboard").iterdir())
    assert (run / "history.png").read_bytes().startswith(b"\x89PNG")


def test_every_checkpoint_has_a_card_of_its_own_epoch(run: Path) -> None:
    for name in ("best", "last"):
        card = (run / name / "model_card.md").read_text()
        assert f"After epoch {read_checkpoint(run / name).meta['metrics']['epoch']}, on 13 images" in card
        assert "| trained on | 37 |" in card
        assert "| by true |" in card
    assert "Not validated." in (run / "initial" / "model_card.md").read_text()


def test_tensorboard_has_one_page_of_samples(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()

    assert [image.step for image in events.Images("val/samples")] == [EPOCHS]


@pytest.mark.usefixtures("run")
def test_a_finished_run_is_rejected(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs/tiny has finished \(epochs\); --new-run starts another"):
        train(train_job(data))


@pytest.mark.slow
def test_a_new_run_survives_a_killed_worker(run: Path, data: Path) -> None:
    before = (run / "run.json").read_bytes()
    second = run.with_name("tiny-2")
    killer = _Killer(second)
    killer.start()

    best = train(train_job(data, new_run=True, epochs=EPOCHS + 2))

    killer.join()
    assert 1 <= killer.killed_after < EPOCHS + 2
    assert best == str(second / "best")
    assert [row["epoch"] for row in history(second)] == list(range(1, EPOCHS + 3))
    assert [row["num_val_rows"] for row in history(second)] == [13] * (EPOCHS + 2)
    assert json.loads((second / "run.json").read_text())["finished"] == "epochs"
    assert (run / "run.json").read_bytes() == before


class _Killer(threading.Thread):
    """Kills one worker once the run has an epoch behind it."""

    def __init__(self, run: Path) -> None:
        super().__init__(daemon=True)
        self._history = run / "history.parquet"
        # Said outright, because there may be other clusters on the machine.
        self._address = ray.get_runtime_context().gcs_address
        self.killed_after = 0

    def run(self) -> None:
        pid = None
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if pid is None:
                alive = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
                pid = next((actor.pid for actor in list_actors(self._address, filters=alive)), None)
            elif self._history.exists():
                os.kill(pid, signal.SIGKILL)
                self.killed_after = pq.read_metadata(self._history).num_rows
                return
            time.sleep(0.05)


@pytest.fixture(scope="module")
def other(data: Path) -> Path:
    return prepared_set(data.parent / "other", {"train": 18, "val": 7}, first_index=100, has_race=False)


def test_every_streamed_block_has_rows_of_all_sets_in_proportion(data: Path, other: Path) -> None:
    storage = Storage()
    sets = [open_prepared(storage, str(folder), "train.data") for folder in (data, other)]

    dataset = training_dataset(storage, sets, "train", sets[0].label_space, use_fallback=True)
    blocks = [batch["set_index"] for batch in dataset.iter_batches(batch_size=None)]

    assert np.bincount(np.concatenate(blocks)).tolist() == [37, 18]
    assert [block.mean() for block in blocks] == pytest.approx([18 / 55] * len(blocks), abs=0.05)


def test_two_sets_of_which_one_has_no_race_are_trained_on_together(data: Path, other: Path) -> None:
    uris = [str(data), str(other)]

    run = Path(train(train_job(data, name="both", data=uris, data_shares=[1, 3], balance="gender"))).parent

    rows = history(run)
    assert [row["num_val_rows"] for row in rows] == [13 + 7] * EPOCHS
    assert all(55 - 2 < row["num_train_rows"] <= 55 for row in rows)
    assert all(np.isfinite(row["train_loss"]) for row in rows)
    loaded = read_checkpoint(run / "best")
    val = loaded.meta["metrics"]["val"]
    assert val["n"] == 20
    assert 0 < val["race"]["n"] <= 13
    assert loaded.meta["data"]["source"] == "rendered"
    assert [(said["uri"], said["num_train_rows"], said["share"]) for said in loaded.meta["data"]["sets"]] == [
        (uris[0], 37, 0.25),
        (uris[1], 18, 0.75),
    ]
    assert "| rendered | " + uris[1] + " |" in (run / "best" / "model_card.md").read_text()
    with pytest.raises(ConfigError, match=r"trained on 18 of its 18 images"):
        evaluate(EvaluateJob(evaluate=EvaluateConfig(checkpoint=str(run / "best"), data=uris[1], split="train")))


def test_an_unfinished_run_is_not_resumed_with_other_settings(data: Path) -> None:
    theirs = train_job(data, name="taken", lr=0.5, outage_s=1.0)
    config = theirs.model_dump(mode="json", exclude={"new_run", "dry_run", "log_format"})
    record = {"finished": "", "settings_digest": "of other settings", "config": config}
    folder = data.parent / "runs" / "taken"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))

    with pytest.raises(ConfigError, match=r"train\.name taken: the unfinished run .* has train\.lr 0\.5, not "):
        train(train_job(data, name="taken"))


def test_a_run_that_another_driver_is_running_is_rejected(data: Path) -> None:
    lock = data.parent / "runs" / "busy" / "lock.json"

    with (
        run_lock(Storage(), str(lock), "another driver", expiry_s=1.0, console=Console(quiet=True)),
        pytest.raises(ConfigError, match=r"busy/lock\.json is held by another driver"),
    ):
        train(train_job(data, name="busy"))


class _Thief(threading.Thread):
    """Takes a run's lock over once the run has an epoch behind it, as another driver does after an outage."""

    def __init__(self, run: Path) -> None:
        super().__init__(daemon=True)
        self._run_folder = run
        self.taken_s = 0.0
        self.epochs_before = 0

    def run(self) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if (self._run_folder / "history.parquet").exists():
                self.epochs_before = pq.read_metadata(self._run_folder / "history.parquet").num_rows
                lock = self._run_folder / "lock.json"
                record = json.loads(lock.read_text()) | {"token": "another", "owner": "another driver"}
                Storage().write(str(lock), json.dumps(record).encode())
                self.taken_s = time.monotonic()
                return
            time.sleep(0.05)


@pytest.mark.slow
def test_a_driver_that_has_lost_its_lock_stops_within_a_few_heartbeats(data: Path) -> None:
    folder = data.parent / "runs" / "stolen"
    thief = _Thief(folder)
    thief.start()

    with pytest.raises(LockLost, match=r"stolen/lock\.json is no longer ours"):
        train(train_job(data, name="stolen", epochs=2000, early_stopping_patience=0, lock_expiry_s=4.0, num_to_keep=2))

    stopped_s = time.monotonic() - thief.taken_s
    left = _contents(folder)
    time.sleep(5.0)
    assert _contents(folder) == left
    assert stopped_s < 20.0
    # One more may have been on its way when the lock was taken.
    assert len(history(folder)) <= thief.epochs_before + 2
    assert json.loads((folder / "run.json").read_text())["finished"] == ""
    assert "another driver" in (folder / "lock.json").read_text()


def _contents(folder: Path) -> list[tuple[str, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_mtime_ns) for path in files]


@pytest.mark.slow
def test_a_non_finite_loss_ends_the_run_with_one_line(data: Path) -> None:
    with pytest.raises(JobError, match=r"epoch 1, step \d+: loss (nan|inf)"):
        train(train_job(data, name="exploding", num_workers=1, lr=1e30, optimizer="sgd"))

    said, *image_ids = (data.parent / "runs" / "exploding" / "failure.txt").read_text().splitlines()
    assert "image_id data-chip-" in said
    assert len(image_ids) == 8
    assert set(image_ids) <= {row["image_id"] for row in pq.read_table(data / "crops").to_pylist()}

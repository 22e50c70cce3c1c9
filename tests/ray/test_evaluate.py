"""Evaluating: one prediction for every labelled crop, and metrics that add up from them."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from sets import checkpoint, prepared_set

from agr_ray.config import EvaluateConfig, EvaluateJob, PredictConfig
from agr_ray.errors import ConfigError, JobError
from agr_ray.evaluation.cells import BREAKDOWNS
from agr_ray.labels import GENDERS, UTKFACE
from agr_ray.runtime import evaluate as module
from agr_ray.runtime.evaluate import evaluate
from agr_ray.schema import PREDICTIONS
from agr_ray.storage import Storage
from agr_ray.storage.lock import LockLost, run_lock

pytestmark = pytest.mark.usefixtures("ray_cluster")

SPLITS = {"train": 20, "val": 6, "test": 31}
BASELINE = {"fitted_on": "train", "age_years": 40.0, "gender": "female", "race": "asian"}


def evaluate_job(model: Path, data: Path, **changes: Any) -> EvaluateJob:
    config = {"checkpoint": str(model), "data": str(data), "batch_size": 8} | changes
    return EvaluateJob(evaluate=EvaluateConfig(**config))


def crops(data: Path) -> pa.Table:
    return pq.read_table(data / "crops")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_set(tmp_path_factory.mktemp("evaluate") / "data", SPLITS)


@pytest.fixture(scope="module")
def model(data: Path) -> Path:
    """Return a checkpoint that was trained on the training split of `data`."""
    images = [row["content_hash"] for row in crops(data).to_pylist() if row["split"] == "train"]
    return checkpoint(data.parent / "model", train_images=images, data={"baseline": BASELINE})


@pytest.fixture(scope="module")
def metrics(model: Path, data: Path) -> dict[str, Any]:
    return evaluate(evaluate_job(model, data, num_workers=2, out=str(data.parent / "evaluated")))


@pytest.fixture(scope="module")
def predictions(metrics: dict[str, Any], data: Path) -> pa.Table:
    assert metrics
    return pq.read_table(data.parent / "evaluated" / "predictions.parquet")


def test_every_crop_of_the_split_has_one_prediction(predictions: pa.Table, data: Path) -> None:
    wanted = {row["key"]: row for row in crops(data).to_pylist() if row["split"] == "test"}
    rows = {row["key"]: row for row in predictions.to_pylist()}

    assert predictions.schema.equals(PREDICTIONS)
    assert (predictions.num_rows, len(rows)) == (31, 31)
    for key, row in rows.items():
        assert {name: row[name] for name in ("age", "gender", "race", "status", "group_id")} == {
            name: wanted[key][name] for name in ("age", "gender", "race", "status", "group_id")
        }
        assert [race for race, _ in row["race_probs"]] == list(UTKFACE.races)
        assert sum(p for _, p in row["race_probs"]) == pytest.approx(1.0, abs=1e-5)
        assert row["race_pred"] == max(row["race_probs"], key=lambda pair: pair[1])[0]
        assert row["gender_pred"] == GENDERS[int(row["p_male"] > 0.5)]
        assert 0 <= row["age_pred"] <= 116


def test_without_other_processes_the_predictions_are_the_same_to_the_last_bit(
    predictions: pa.Table, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cluster", lambda _, **__: pytest.fail("a cluster was joined"))
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(2)
    cv2.setNumThreads(2)
    try:
        evaluate(evaluate_job(model, data, out=str(data.parent / "here")))
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (2, 2)
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])

    assert pq.read_table(data.parent / "here" / "predictions.parquet").equals(predictions)


def test_metrics_add_up_from_the_predictions(metrics: dict[str, Any], predictions: pa.Table) -> None:
    rows = predictions.to_pylist()
    errors = np.array([row["age_pred"] - row["age"] for row in rows if row["age"] is not None])
    right = {
        task: [row[task] == row[f"{task}_pred"] for row in rows if row[task] is not None] for task in ("gender", "race")
    }
    recalls = [
        np.mean([row["race_pred"] == race for row in rows if row["race"] == race])
        for race in UTKFACE.races
        if any(row["race"] == race for row in rows)
    ]

    assert (metrics["n"], metrics["n_fallback"]) == (31, sum(row["status"] == "fallback" for row in rows))
    assert 0 < metrics["n_fallback"] < 31
    assert metrics["age"]["n"] == len(errors) < 31
    assert metrics["age"]["mae_years"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    assert metrics["age"]["bias_years"] == pytest.approx(errors.mean(), rel=1e-5)
    assert metrics["age"]["within_5"] == pytest.approx((np.abs(errors) <= 5).mean())
    assert metrics["age"]["cs"][10] == pytest.approx((np.abs(errors) <= 10).mean())
    for task, words in (("gender", GENDERS), ("race", UTKFACE.races)):
        assert metrics[task]["n"] == len(right[task]) < 31
        assert metrics[task]["accuracy"] == pytest.approx(np.mean(right[task]))
        assert metrics[task]["confusion"] == [
            [sum(row[task] == truth and row[f"{task}_pred"] == said for row in rows) for said in words]
            for truth in words
        ]
    assert metrics["race"]["balanced_accuracy"] == pytest.approx(np.mean(recalls))


def test_the_baseline_is_fitted_on_the_training_labels(metrics: dict[str, Any], predictions: pa.Table) -> None:
    rows = predictions.to_pylist()
    baseline = metrics["baseline"]

    assert baseline["guess"] == BASELINE
    assert baseline["age"]["mae_years"] == pytest.approx(
        np.mean([abs(40.0 - row["age"]) for row in rows if row["age"] is not None]), rel=1e-5
    )
    assert baseline["gender"]["accuracy"] == pytest.approx(
        np.mean([row["gender"] == "female" for row in rows if row["gender"] is not None])
    )
    assert baseline["race"]["accuracy"] == pytest.approx(
        np.mean([row["race"] == "asian" for row in rows if row["race"] is not None])
    )


def test_the_checkpoints_card_contains_the_metrics(metrics: dict[str, Any], model: Path) -> None:
    measured = (model / "model_card.md").read_text().partition("## Measured on rendered, split test, ")[2]

    assert f"| age MAE | {metrics['age']['mae_years']:.2f} years |" in measured


def test_the_file_contains_the_returned_metrics(metrics: dict[str, Any], model: Path, data: Path) -> None:
    written = json.loads((data.parent / "evaluated" / "metrics.json").read_text())

    assert written == json.loads(json.dumps(metrics))
    said = written["evaluation"]
    assert (said["checkpoint"], said["data"], said["split"]) == (str(model), str(data), "test")
    assert said["num_seen_in_training"] == 0


@pytest.mark.parametrize(("split", "num_rows"), [("train", 20), ("all", 57)])
def test_a_split_with_training_images_is_rejected(model: Path, data: Path, split: str, num_rows: int) -> None:
    with pytest.raises(ConfigError, match=f"trained on 20 of its {num_rows} images; --evaluate.allow_overlap"):
        evaluate(evaluate_job(model, data, split=split))


def test_the_same_images_under_other_names_and_subjects_are_rejected(model: Path, data: Path) -> None:
    renamed = prepared_set(data.parent / "renamed", {"test": 4})

    with pytest.raises(ConfigError, match="trained on 4 of its 4 images"):
        evaluate(evaluate_job(model, renamed))


def test_allowed_overlap_is_reported_beside_the_checkpoint(model: Path, data: Path) -> None:
    metrics = evaluate(evaluate_job(model, data, split="train", allow_overlap=True))

    assert (metrics["n"], metrics["evaluation"]["num_seen_in_training"]) == (20, 20)
    (written,) = model.parent.glob("model-eval-train-*/metrics.json")
    assert json.loads(written.read_text())["evaluation"]["num_seen_in_training"] == 20
    assert (written.parent / "predictions.parquet").exists()


def test_a_calibration_on_training_images_says_so_wherever_it_is_used(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = data.parent / "flattered"
    shutil.copytree(model, own)
    fitted = evaluate(evaluate_job(own, data, split="all", calibrate=True, allow_overlap=True))
    said = json.loads((own / "calibration.json").read_text())
    first = capsys.readouterr().out
    measured = evaluate(evaluate_job(own, data))
    second = capsys.readouterr().out

    warning = "the model was trained on 20 of the 57 images that its calibration was fitted on"
    assert (said["n"], said["num_seen_in_training"]) == (57, 20)
    assert fitted["calibration"]["num_seen_in_training"] == measured["calibration"]["num_seen_in_training"] == 20
    assert [first.count(f"warning: {warning}"), second.count(f"warning: {warning}")] == [1, 1]
    assert measured["calibration"]["warning"].startswith(warning)
    assert (own / "model_card.md").read_text().count(f"**Calibration: {warning}") == 2


def test_an_evaluation_is_rejected_while_another_writes_its_result(model: Path, data: Path) -> None:
    out = data.parent / "contested"
    with (
        run_lock(Storage(), f"{out}.lock", "another evaluation", expiry_s=1.0, console=Console(quiet=True)),
        pytest.raises(ConfigError, match=r"contested\.lock is held by another evaluation"),
    ):
        evaluate(evaluate_job(model, data, out=str(out)))
    assert not out.exists()


def test_a_checkpoint_that_another_evaluation_is_calibrating_is_rejected(model: Path, data: Path) -> None:
    with (
        run_lock(Storage(), f"{model}.lock", "another evaluation", expiry_s=1.0, console=Console(quiet=True)),
        pytest.raises(ConfigError, match=r"model\.lock is held by another evaluation"),
    ):
        evaluate(evaluate_job(model, data, split="val", calibrate=True, out=str(data.parent / "unwritten")))
    assert not (model / "calibration.json").exists()


def test_an_evaluation_that_lost_its_lock_writes_nothing(model: Path, data: Path) -> None:
    own, out = data.parent / "taken", data.parent / "taken-out"
    shutil.copytree(model, own)
    lock = Path(f"{own}.lock")
    thief = threading.Thread(target=_take, args=(lock,), daemon=True)
    thief.start()

    with pytest.raises(LockLost, match=r"taken\.lock is no longer ours"):
        evaluate(evaluate_job(own, data, split="val", calibrate=True, out=str(out), lock_expiry_s=0.4, num_workers=1))

    thief.join()
    assert not (own / "calibration.json").exists()
    assert not out.exists()


def _take(lock: Path) -> None:
    deadline = time.monotonic() + 60
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    Storage().write(str(lock), lock.read_bytes().replace(json.loads(lock.read_text())["token"].encode(), b"another"))


def test_a_model_that_predicts_nan_is_rejected(model: Path, data: Path) -> None:
    own, out = data.parent / "diverged", data.parent / "diverged-out"
    shutil.copytree(model, own)
    file = own / "weights.safetensors"
    weights = load_file(file)
    is_float = {name: tensor.is_floating_point() for name, tensor in weights.items()}
    save_file({name: tensor * torch.nan if is_float[name] else tensor for name, tensor in weights.items()}, file)

    with pytest.raises(JobError, match=r"diverged: its predictions for 31 of 31 images are not finite"):
        evaluate(evaluate_job(own, data, out=str(out)))
    assert not out.exists()


def test_another_prepared_source_is_measured_as_a_whole(data: Path) -> None:
    # Trained on nothing that it says: then overlap isn't known, and the baseline is these labels' own.
    silent = checkpoint(data.parent / "silent")
    other = prepared_set(data.parent / "other", {"val": 3, "test": 4}, first_index=500)

    with pytest.raises(ConfigError, match="does not say on which images it was trained"):
        evaluate(evaluate_job(silent, other, split="all"))
    metrics = evaluate(evaluate_job(silent, other, split="all", allow_overlap=True))

    assert metrics["n"] == 7
    assert metrics["evaluation"]["statuses"] == {"bad_label": 1, "fallback": 2, "ok": 5, "unreadable": 1}
    assert metrics["evaluation"]["num_seen_in_training"] is None
    assert metrics["baseline"]["guess"]["fitted_on"] == "evaluated"


def test_results_are_not_written_into_a_foreign_folder(model: Path, data: Path, metrics: dict[str, Any]) -> None:
    assert metrics
    with pytest.raises(ConfigError, match=r"evaluated: holds the evaluation of .*model on split test"):
        evaluate(evaluate_job(model, data, split="val", out=str(data.parent / "evaluated")))
    with pytest.raises(ConfigError, match="holds files, but no evaluation"):
        evaluate(evaluate_job(model, data, out=str(data)))


def test_a_checkpoint_calibrated_on_one_split_is_reported_on_another(
    model: Path, data: Path, metrics: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    own = data.parent / "calibrated"
    shutil.copytree(model, own)
    fitted = evaluate(evaluate_job(own, data, split="val", calibrate=True, coverage=0.5))
    said = json.loads((own / "calibration.json").read_text())
    measured = evaluate(evaluate_job(own, data))
    flipped = PredictConfig(flip_average=True)
    other = evaluate_job(own, data).model_copy(update={"predict": flipped})
    allowed = evaluate_job(own, data, allow_uncalibrated=True).model_copy(update={"predict": flipped})
    printed = " ".join(capsys.readouterr().out.split())

    assert (said["num_seen_in_training"], fitted["calibration"]["warning"]) == (0, "")
    assert (said["n"], said["coverage"], said["model_digest"]) == (6, 0.5, fitted["evaluation"]["model_digest"])
    assert len(said["rows"]["race_pred"]) == len(said["content_codes"]) == 6
    assert fitted["calibration"]["num_seen_in_calibration"] == 6
    assert "calibrated on 6 images: age: 50 % of true ages are within " in printed
    assert "warning: 6 of these images were used to calibrate" in printed
    assert measured["calibration"]["num_seen_in_calibration"] == 0
    assert measured["calibration"]["age"]["nominal"] == 0.5
    assert measured["calibration"]["age"]["n"] == measured["age"]["n"]
    assert {name: measured[name] for name in ("age", "gender", "race")} == {
        name: metrics[name] for name in ("age", "gender", "race")
    }
    assert "calibration" not in metrics
    with pytest.raises(ConfigError, match=r"predict\.flip_average = True, but .* calibrated with False"):
        evaluate(other)
    assert "calibration" not in evaluate(allowed)
    assert "warning: predict.flip_average = True, but the checkpoint was" in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_alone_has_the_same_metrics_as_with_its_recipe(model: Path, data: Path) -> None:
    own, flipped = data.parent / "flipped", PredictConfig(flip_average=True)
    shutil.copytree(model, own)
    meta = json.loads((own / "meta.json").read_text())
    (own / "meta.json").write_text(json.dumps(meta | {"predict": flipped.model_dump()}))
    with_recipe = evaluate_job(own, data, out=str(data.parent / "recipe")).model_copy(update={"predict": flipped})

    alone, recipe = (evaluate(job) for job in (evaluate_job(own, data), with_recipe))
    evaluate(evaluate_job(model, data, out=str(data.parent / "plain")))
    (out,) = data.parent.glob("flipped-eval-test-*")
    folders = (out, data.parent / "recipe", data.parent / "plain")
    tables = [pq.read_table(folder / "predictions.parquet") for folder in folders]

    assert {name: alone[name] for name in ("age", "gender", "race")} == {
        name: recipe[name] for name in ("age", "gender", "race")
    }
    assert tables[0].equals(tables[1])
    assert not tables[0]["p_male"].equals(tables[2]["p_male"])


def test_a_calibration_records_the_settings_that_it_was_fitted_under(model: Path, data: Path) -> None:
    own = data.parent / "fitted-under"
    shutil.copytree(model, own)
    job = evaluate_job(own, data, split="val", calibrate=True)

    evaluate(job.model_copy(update={"predict": PredictConfig(flip_average=True)}))

    said = json.loads((own / "calibration.json").read_text())["pipeline"]
    assert (said["predict"]["flip_average"], said["vision"]["detector"]) == (True, "none")
    assert evaluate(evaluate_job(own, data))["evaluation"]["predict"]["flip_average"] is True


def test_two_checkpoints_are_evaluated_and_compared_on_the_same_images(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = data.parent / "twin"
    shutil.copytree(model, twin)
    compare = json.dumps([str(model), str(twin)])
    config = EvaluateConfig(compare=compare, data=str(data), batch_size=8, out=str(data.parent / "pair"))
    content = evaluate(EvaluateJob(evaluate=config))
    printed = " ".join(capsys.readouterr().out.split())

    assert json.loads((data.parent / "pair" / "paired.json").read_text()) == content
    assert (content["n"], content["tasks"]) == (31, ["age", "gender", "race"])
    assert [each["difference"] for each in content["metrics"].values()] == [0.0] * 5
    assert [content[side]["checkpoint"] for side in ("first", "second")] == [str(model), str(twin)]
    for side, folder in (("first", "model"), ("second", "twin")):
        assert Path(content[side]["evaluation"]).name.startswith(f"{folder}-eval-test-")
    assert "Overall, these images show no difference between the two models." in printed


def test_the_metrics_have_all_that_a_report_needs(metrics: dict[str, Any], predictions: pa.Table) -> None:
    assert metrics["evaluation"]["tasks"] == ["age", "gender", "race"]
    assert metrics["evaluation"]["label_space"] == UTKFACE.to_json()
    assert metrics["uncertainty"]["num_units"] == len(set(predictions["group_id"].to_pylist()))
    assert 0.0 < metrics["gender"]["auc"] < 1.0
    assert [each["threshold_years"] for each in metrics["age_thresholds"]] == [18, 21, 25]
    assert list(metrics["groups"]) == list(metrics["disparities"]) == list(BREAKDOWNS)
    assert metrics["selective"]["race"]["n"] == metrics["race"]["n"]
    assert metrics["selective"]["age"] is None


def test_calibrated_ages_are_selected_by_the_width_of_their_intervals(model: Path, data: Path) -> None:
    own = data.parent / "selected"
    shutil.copytree(model, own)
    fitted = evaluate(evaluate_job(own, data, split="test", calibrate=True, coverage=0.5, age_thresholds=(30,)))

    assert fitted["selective"]["age"]["n"] == fitted["age"]["n"]
    assert fitted["selective"]["age"]["curve"][-1]["risk"] == pytest.approx(fitted["age"]["mae_years"])
    assert [each["threshold_years"] for each in fitted["age_thresholds"]] == [30]

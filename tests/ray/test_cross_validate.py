"""`agr-ray cross-validate` on a small cluster: every image is tested once, by a network that did not see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sets import SIDE_PX, prepared_set

from agr_ray.config import CrossValidateConfig, CrossValidateJob, ModelConfig, TrainConfig
from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint_network import content_codes, load_train_state
from agr_ray.report.status_folders import read_status
from agr_ray.runtime.cross_validate import cross_validate
from agr_ray.schema import FOLDS
from agr_ray.storage import Storage

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


def job_of(data: Path, out: Path, **changes: Any) -> CrossValidateJob:
    return CrossValidateJob(
        model=ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX),
        train=TrainConfig(
            data=str(data), epochs=1, batch_size=8, threads_per_worker=1, lock_expiry_s=4.0, **changes.pop("train", {})
        ),
        cross_validate=CrossValidateConfig(**{"out": str(out), "folds": 2, "val": 0.2} | changes),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_set(tmp_path_factory.mktemp("data") / "set", {"train": 30, "val": 10, "test": 8})


@pytest.fixture(scope="module")
def validated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cv")
    assert cross_validate(job_of(data, out)) == str(out / "predictions.parquet")
    return out


def test_each_image_is_predicted_once_by_a_network_that_did_not_see_it(data: Path, validated: Path) -> None:
    predictions = pq.read_table(validated / "predictions.parquet").to_pylist()
    images = pq.read_table(data / "crops", columns=["image_id", "content_hash", "split", "crop"]).to_pylist()
    expected = sorted(row["image_id"] for row in images if row["split"] and row["crop"])

    assert sorted(row["image_id"] for row in predictions) == expected
    content = {row["image_id"]: row["content_hash"] for row in images}
    for fold in ("fold-0", "fold-1"):
        seen = set(load_train_state(validated / "runs" / fold / "best")["train_images"].tolist())
        tested = [content[row["image_id"]] for row in predictions if row["fold"] == fold]
        assert len(tested) > 10
        assert seen
        assert not seen & set(content_codes(tested).tolist())


def test_the_folds_and_their_mean_are_written(validated: Path) -> None:
    folds = pq.read_table(validated / "folds.parquet")
    summary = {row["metric"]: row for row in pq.read_table(validated / "summary.parquet").to_pylist()}

    assert folds.schema.equals(FOLDS)
    rows = folds.to_pylist()
    assert [row["fold"] for row in rows] == ["fold-0", "fold-1"]
    assert sum(row["num_test"] for row in rows) == 48
    assert summary["age_mae_years"]["mean"] == pytest.approx(sum(row["age_mae_years"] for row in rows) / 2)
    assert summary["age_mae_years"]["std"] > 0
    assert not (validated / "data").exists()
    status = read_status(Storage(), str(validated))
    assert status is not None
    assert (status.published, status.unfinished, status.stuck) == (
        [{"predictions": str(validated / "predictions.parquet"), "folds": 2}],
        [],
        [],
    )


def test_the_same_command_repeats_nothing(data: Path, validated: Path) -> None:
    before = (validated / "runs" / "fold-0" / "run.json").stat().st_mtime_ns

    cross_validate(job_of(data, validated))

    assert (validated / "runs" / "fold-0" / "run.json").stat().st_mtime_ns == before


def test_a_lost_evaluation_is_made_again_without_training(data: Path, validated: Path) -> None:
    before = (validated / "runs" / "fold-1" / "run.json").stat().st_mtime_ns
    (validated / "evaluations" / "fold-1" / "metrics.json").unlink()

    cross_validate(job_of(data, validated))

    assert (validated / "evaluations" / "fold-1" / "metrics.json").exists()
    assert (validated / "runs" / "fold-1" / "run.json").stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_rejected(data: Path, validated: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a cross-validation with cross_validate\.folds 2, not 3"):
        cross_validate(job_of(data, validated, folds=3))


def test_a_set_without_published_folds_is_rejected(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cross_validate\.protocol published_folds: .* has 0 published folds"):
        cross_validate(job_of(data, tmp_path / "cv", protocol="published_folds"))

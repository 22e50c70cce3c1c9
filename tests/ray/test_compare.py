"""`agr-ray compare` on a small cluster: every run is measured once, and the page tells what was found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sets import SIDE_PX, prepared_set

from agr_ray.config import CompareConfig, CompareJob, LossConfig, TrainConfig
from agr_ray.errors import ConfigError, JobError
from agr_ray.runtime.compare import compare
from agr_ray.schema import COMPARED_METRICS, COMPARISON

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]

PRESETS = ("paper", "lightweight", "single_task_age")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_set(tmp_path_factory.mktemp("data") / "set", {"train": 40, "val": 8, "test": 24})


def compare_job(data: Path, out: Path, train: dict[str, Any] | None = None, **changes: Any) -> CompareJob:
    values: dict[str, Any] = {"out": str(out), "presets": PRESETS, "image_size": SIDE_PX} | changes
    shared = {"epochs": 1, "batch_size": 8, "threads_per_worker": 1, "lock_expiry_s": 4.0} | (train or {})
    return CompareJob(
        compare=CompareConfig(**values),
        train=TrainConfig(data=str(data), **shared),
        loss=LossConfig(age_scale_years=10),
    )


@pytest.fixture(scope="module")
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    assert compare(compare_job(data, out)) == str(out / "report.html")
    return out


def test_every_preset_has_a_row(compared: Path) -> None:
    table = pq.read_table(compared / "comparison.parquet")

    assert table.schema.equals(COMPARISON)
    rows = {row["preset"]: row for row in table.to_pylist()}
    assert list(rows) == ["paper", "single_task_age", "lightweight"]
    for row in rows.values():
        assert (row["seeds"], row["failures"], row["side_px"]) == ([0], [], SIDE_PX)
        assert row["age_mae_years_low"] <= row["age_mae_years"] <= row["age_mae_years_high"]
        assert row["score_images_per_s"] > 0
        assert row["train_samples_per_s"] > 0
    assert rows["paper"]["age_mae_years_difference"] is None
    assert rows["lightweight"]["age_mae_years_difference"] == pytest.approx(
        rows["lightweight"]["age_mae_years"] - rows["paper"]["age_mae_years"]
    )
    assert rows["single_task_age"]["race_accuracy"] is None
    assert rows["paper"]["age_mae_years_cited"] == 2.95
    assert rows["lightweight"]["race_accuracy_cited"] is None


def test_figures_are_those_of_the_evaluations(compared: Path) -> None:
    for row in pq.read_table(compared / "comparison.parquet").to_pylist():
        metrics = json.loads((compared / "evaluations" / f"{row['preset']}-0" / "metrics.json").read_text())
        measured = [metrics["age"]["mae_years"], metrics["age"]["within_5"], metrics["age"]["one_off"]]
        measured += [metrics["gender"]["accuracy"], metrics["race"]["accuracy"]]
        assert [row[metric] for metric in COMPARED_METRICS] == pytest.approx(measured)


def test_there_is_a_page_that_loads_nothing(compared: Path) -> None:
    page = (compared / "report.html").read_text()

    assert page.lower().startswith("<!doctype html>")
    assert "single_task_age" in page
    assert re.findall(r'(?:src|href)="(?!#)', page) == []


def test_more_seeds_and_presets_are_added_and_nothing_is_repeated(data: Path, compared: Path) -> None:
    before = (compared / "evaluations" / "paper-0" / "metrics.json").stat().st_mtime_ns

    compare(compare_job(data, compared, presets=("lightweight",), seeds=2))

    assert (compared / "evaluations" / "paper-0" / "metrics.json").stat().st_mtime_ns == before
    rows = pq.read_table(compared / "comparison.parquet").to_pylist()
    assert [(row["preset"], row["seeds"]) for row in rows] == [
        ("paper", [0]),
        ("single_task_age", [0]),
        ("lightweight", [0, 1]),
    ]


def test_other_settings_in_the_same_folder_are_rejected(data: Path, compared: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a comparison with train\.epochs 1, not 2; choose another folder"):
        compare(compare_job(data, compared, {"epochs": 2}))


def test_a_split_without_images_is_rejected(tmp_path: Path) -> None:
    data = prepared_set(tmp_path / "set", {"train": 8, "val": 4})

    with pytest.raises(ConfigError, match=r"compare\.split test: .* has no images in it"):
        compare(compare_job(data, tmp_path / "out"))


def test_a_comparison_of_which_all_runs_fail_is_written(data: Path, tmp_path: Path) -> None:
    job = compare_job(data, tmp_path, {"lr": 1e30, "optimizer": "sgd"}, presets=("lightweight",), image_size=32)

    with pytest.raises(JobError, match=r"1 of 1 runs failed: lightweight-0: .*loss nan"):
        compare(job)

    (row,) = pq.read_table(tmp_path / "comparison.parquet").to_pylist()
    assert "loss nan" in row["failures"][0]
    assert "loss nan" in (tmp_path / "report.html").read_text()


def test_a_run_that_diverges_is_named_and_the_others_are_compared(data: Path, tmp_path: Path) -> None:
    job = compare_job(data, tmp_path, {"lr": 1e30, "optimizer": "sgd"}, presets=("lightweight", "vit"), image_size=32)

    with pytest.raises(JobError, match=r"1 of 2 runs failed: lightweight-0: .*loss nan"):
        compare(job)

    rows = {row["preset"]: row for row in pq.read_table(tmp_path / "comparison.parquet").to_pylist()}
    assert (rows["lightweight"]["seeds"], rows["vit"]["seeds"]) == ([], [0])
    assert "loss nan" in rows["lightweight"]["failures"][0]

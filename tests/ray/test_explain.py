"""`agr-ray evaluate --explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sets import checkpoint, prepared_set

from agr_ray.config import EvaluateConfig, EvaluateJob
from agr_ray.report import explanations
from agr_ray.runtime import explain as module
from agr_ray.runtime.evaluate import evaluate
from agr_ray.schema import NEAREST
from agr_ray.vision.decode import decode_crop, encode_jpeg

SHEETS = [
    *(f"grad_cam_{task}.png" for task in ("age", "gender", "race")),
    *("nearest.parquet", "nearest_features.png", "nearest_hash.png"),
    *(f"worst_{task}.png" for task in ("age", "gender", "race")),
]
LEAKED = ("chip-012.jpg", "chip-003.jpg")
"""A test image that is a copy of a training image."""


def leak(data: Path) -> None:
    """Replace the crop of a test image by a re-encoded, slightly cropped copy of a training image's."""
    files = sorted((data / "crops").glob("*.parquet"))
    rows = {row["key"]: row for file in files for row in pq.read_table(file).to_pylist()}
    image = decode_crop(rows[LEAKED[1]]["crop"])
    side = len(image)
    cropped = cv2.resize(image[1:, 1:], (side, side), interpolation=cv2.INTER_LINEAR)
    for file in files:
        table = pq.read_table(file)
        crops = table["crop"].to_pylist()
        if LEAKED[0] in table["key"].to_pylist():
            crops[table["key"].to_pylist().index(LEAKED[0])] = encode_jpeg(np.asarray(cropped, np.uint8), 80)
        place = table.schema.get_field_index("crop")
        pq.write_table(table.set_column(place, table.schema.field("crop"), pa.array(crops, pa.binary())), file)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepared_set(tmp_path_factory.mktemp("explain") / "data", {"train": 10, "test": 10})
    leak(folder)
    return folder


@pytest.fixture(scope="module")
def model(data: Path) -> Path:
    rows = pq.read_table(data / "crops").to_pylist()
    images = [row["content_hash"] for row in rows if row["split"] == "train"]
    return checkpoint(data.parent / "model", train_images=images)


@pytest.fixture
def blank_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no faces, which takes a second for each sheet."""
    monkeypatch.setattr(explanations, "faces_sheet", lambda *_: b"")


def job(model: Path, data: Path, **changes: Any) -> EvaluateJob:
    config = {"checkpoint": str(model), "data": str(data), "batch_size": 8, "explain": True} | changes
    return EvaluateJob(evaluate=EvaluateConfig(**config))


def nearest(out: Path) -> dict[str, dict[str, Any]]:
    table = pq.read_table(out / "explain" / "nearest.parquet")
    assert table.schema.equals(NEAREST)
    return {row["key"]: row for row in table.to_pylist()}


def test_a_leaked_image_is_found_without_a_cluster(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "cluster", lambda _, **__: pytest.fail("a cluster was joined"))
    out = data.parent / "here"

    metrics = evaluate(job(model, data, out=str(out)))

    printed = " ".join(capsys.readouterr().out.split())
    rows = nearest(out)
    assert sorted(path.name for path in (out / "explain").iterdir()) == SHEETS
    assert len(rows) == 10
    assert rows[LEAKED[0]]["nearest_by_hash"] == LEAKED[1]
    assert rows[LEAKED[0]]["distance_bits"] <= 8
    assert min(rows.values(), key=lambda row: row["distance_bits"])["key"] == LEAKED[0]
    assert all(int(row["nearest_by_features"][5:8]) < 10 for row in rows.values())
    found = metrics["explain"]["nearest"]
    assert (found["num_images"], found["num_train_images"]) == (10, 10)
    assert found["num_near"] == sum(row["distance_bits"] <= 8 for row in rows.values())
    assert "Do not publish them without their consent" in printed
    assert json.loads((out / "metrics.json").read_text())["explain"] == metrics["explain"]


@pytest.mark.usefixtures("blank_sheets")
def test_without_training_images_the_comparison_is_left_out(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = prepared_set(data.parent / "other", {"test": 5}, first_index=100)
    out = data.parent / "foreign"
    metrics = evaluate(job(model, other, out=str(out)))
    first = capsys.readouterr().out
    again = evaluate(job(model, other, out=str(out), explain_train_data=str(data)))

    assert metrics["explain"] == {"nearest": None}
    assert f"not compared with training images: {other} has none" in first
    assert again["explain"]["nearest"]["num_train_images"] == 10
    assert list(nearest(out)) == [f"chip-{k}.jpg" for k in range(100, 105)]


@pytest.mark.usefixtures("blank_sheets")
def test_a_task_without_labels_has_no_sheet(model: Path, data: Path) -> None:
    unlabelled = prepared_set(data.parent / "unlabelled", {"test": 4}, first_index=200, has_race=False)
    out = data.parent / "without"
    evaluate(job(model, unlabelled, out=str(out)))

    assert sorted(path.name for path in (out / "explain").iterdir()) == [
        *("grad_cam_age.png", "grad_cam_gender.png", "worst_age.png", "worst_gender.png")
    ]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_workers_find_what_this_process_does(model: Path, data: Path) -> None:
    evaluate(job(model, data, out=str(data.parent / "alone")))
    evaluate(job(model, data, out=str(data.parent / "workers"), num_workers=2))

    alone, workers = nearest(data.parent / "alone"), nearest(data.parent / "workers")
    assert [row.pop("cosine") for row in alone.values()] == pytest.approx(
        [row.pop("cosine") for row in workers.values()], abs=1e-4
    )
    assert alone == workers

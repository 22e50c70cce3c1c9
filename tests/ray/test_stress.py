"""`agr-ray evaluate --stress`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from sets import checkpoint, prepared_set

from agr_ray.config import EvaluateConfig, EvaluateJob
from agr_ray.predict.stress_folder import StressFolder
from agr_ray.report import stress as report
from agr_ray.runtime import stress as module
from agr_ray.runtime.evaluate import evaluate
from agr_ray.schema import STRESS
from agr_ray.vision.corruptions import CORRUPTIONS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_set(tmp_path_factory.mktemp("stress") / "data", {"train": 4, "test": 25})


@pytest.fixture
def no_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no picture of the corruptions, which takes a second and is the same every time."""
    monkeypatch.setattr(report, "examples_figure", Figure)


@pytest.fixture(scope="module")
def model(data: Path) -> Path:
    return checkpoint(data.parent / "model", train_images=[])


def job(model: Path, data: Path, **changes: Any) -> EvaluateJob:
    config = {"checkpoint": str(model), "data": str(data), "batch_size": 8, "stress": True} | changes
    return EvaluateJob(evaluate=EvaluateConfig(**config))


def measured(out: Path) -> list[dict[str, Any]]:
    table = pq.read_table(out / "stress.parquet")
    assert table.schema.equals(STRESS)
    return table.to_pylist()


def test_few_images_are_corrupted_without_a_cluster(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "cluster", lambda _, **__: pytest.fail("a cluster was joined"))
    out = data.parent / "here"
    few = {"stress_corruptions": ("webcam", "mask"), "stress_images": 12}

    metrics = evaluate(job(model, data, out=str(out), **few))

    printed = " ".join(capsys.readouterr().out.split())
    assert "stress test: 2 corruptions x 5 severities on 12 of 25 images; 120 predictions, about 0:00:" in printed
    rows = measured(out)
    assert [(row["corruption"], row["severity"], row["n"]) for row in rows] == [
        ("clean", 0, 12),
        *(("webcam", severity, 12) for severity in range(1, 6)),
        *(("mask", severity, 12) for severity in range(1, 6)),
        ("yaw", 1, 25),
    ]
    assert rows[-1]["level"] == "unknown"
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["stress"]["num_images"] == 12
    assert metrics["stress"]["corruptions"]["mask"]["severities"]["5"]["age_mae_years"]["value"] == pytest.approx(
        rows[10]["age_mae_years"]
    )
    assert metrics["stress"]["yaw"][0]["age_mae_years"]["value"] == pytest.approx(metrics["age"]["mae_years"], rel=1e-6)
    assert (out / "stress.png").read_bytes()[1:4] == b"PNG"
    assert "<svg" in (out / "stress.svg").read_text()


@pytest.mark.usefixtures("no_examples")
def test_a_killed_stress_test_resumes_with_the_conditions_that_are_not_complete(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, few = data.parent / "killed", {"stress_corruptions": ("webcam",), "stress_images": 8}
    write = StressFolder.write
    written: list[int] = []

    def killed(folder: StressFolder, condition: Any, tables: Any) -> None:
        if condition.severity == 4:
            raise KeyboardInterrupt
        write(folder, condition, tables)

    def counted(folder: StressFolder, condition: Any, tables: Any) -> None:
        written.append(condition.severity)
        write(folder, condition, tables)

    monkeypatch.setattr(StressFolder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(job(model, data, out=str(out), **few))
    assert "stress" not in json.loads((out / "metrics.json").read_text())
    monkeypatch.setattr(StressFolder, "write", counted)
    evaluate(job(model, data, out=str(out), **few))
    resumed = measured(out)
    printed = " ".join(capsys.readouterr().out.split())
    evaluate(job(model, data, out=str(out), **few))
    evaluate(job(model, data, out=str(data.parent / "whole"), **few))

    assert written == [4, 5, 1, 2, 3, 4, 5]
    assert "3 of 5 are complete; 16 predictions" in printed
    assert measured(out) == resumed == measured(data.parent / "whole")


@pytest.mark.usefixtures("no_examples")
def test_another_sample_starts_over(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, few = data.parent / "again", {"stress_corruptions": ("jpeg",)}
    evaluate(job(model, data, out=str(out), stress_images=6, **few))
    evaluate(job(model, data, out=str(out), stress_images=7, **few))

    assert "the predictions of another stress test were deleted" in capsys.readouterr().out
    assert [row["n"] for row in measured(out)[:6]] == [7] * 6


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_workers_predict_what_this_process_does(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"stress_corruptions": ("noise", "patch"), "stress_images": 20}
    evaluate(job(model, data, out=str(data.parent / "alone"), **few))
    evaluate(job(model, data, out=str(data.parent / "workers"), num_workers=2, **few))

    assert measured(data.parent / "workers") == measured(data.parent / "alone")
    files = [sorted((data.parent / name / "stress").glob("*.parquet")) for name in ("alone", "workers")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert all(pq.read_table(one).equals(pq.read_table(other)) for one, other in zip(*files, strict=True))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_all_corruptions_are_measured_by_default(model: Path, data: Path) -> None:
    out = data.parent / "all"
    metrics = evaluate(job(model, data, out=str(out)))

    assert list(metrics["stress"]["corruptions"]) == list(CORRUPTIONS)
    assert pa.array([row["n"] for row in measured(out)]).to_pylist() == [25] * (1 + 5 * len(CORRUPTIONS) + 1)

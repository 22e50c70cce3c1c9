"""The page of an evaluation says what metrics.json holds, whatever the model predicts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluations import NUM_ROWS, random_labels, random_predictions, write_evaluation
from outlines import words

from agr_ray.config import ReportJob
from agr_ray.errors import ConfigError
from agr_ray.evaluation.age_bands import MIN_ROWS, age_bands
from agr_ray.evaluation.robustness import Condition, measure, measure_yaw, stress_rows
from agr_ray.report.evaluation_page import verdict
from agr_ray.report.report import report
from agr_ray.schema import STRESS
from agr_ray.vision.corruptions import CORRUPTIONS, SEVERITIES


def page_of(folder: Path, *others: Path, **options: Any) -> str:
    uri = report(ReportJob(folders=[str(folder), *map(str, others)], **options), quiet=True)
    return words(Path(uri).read_text())


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("evaluation") / "eval"
    metrics = write_evaluation(folder, calibrated=True)
    return folder, metrics, page_of(folder)


def rows_of(folder: Path, section: str) -> Iterator[list[str]]:
    """Yield the rows of the tables of a section of the Markdown."""
    text = (folder / "report.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]


def test_the_headline_is_that_of_the_metrics(evaluation: tuple[Path, dict[str, Any], str]) -> None:
    folder, metrics, text = evaluation

    assert verdict(metrics) in text
    assert f"the age MAE is {metrics['age']['mae_years']:.1f} years" in text
    rows = {row[0]: row[1:] for row in rows_of(folder, "Results")}
    low, high = metrics["intervals"]["age"]["mae_years"]
    expected = [f"{metrics['age']['mae_years']:.2f} years", f"{low:.2f} to {high:.2f}"]
    guess = f"{metrics['baseline']['age']['mae_years']:.2f} years"
    assert rows["age MAE"] == [*expected, guess, f"{metrics['age']['n']:,}"]


@pytest.mark.parametrize(("section", "task"), [("Gender", "gender"), ("Race", "race"), ("Age", "age")])
def test_confusion_matrices_are_those_of_the_metrics(
    evaluation: tuple[Path, dict[str, Any], str], section: str, task: str
) -> None:
    folder, metrics, _ = evaluation
    names = metrics["labels"]["age_group" if task == "age" else task]
    matrix = metrics[task]["confusion"]

    rows = list(rows_of(folder, section))
    assert rows[0] == ["true \\\\ predicted", *names, "images", "accuracy"]
    shown = [[int(cell.replace(",", "") or 0) for cell in row[1 : 1 + len(names)]] for row in rows[2 : 2 + len(names)]]
    assert shown == [line for line in matrix if sum(line)]


def test_every_table_and_figure_of_the_paper_has_a_place(evaluation: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = evaluation

    rows = list(rows_of(folder, "The paper's tables and figures"))
    listed = [row[0] for row in rows if re.fullmatch(r"(table|figure) \d+", row[0])]
    assert listed == [*(f"table {n}" for n in range(1, 13)), *(f"figure {n}" for n in range(1, 11))]
    headings = set(re.findall(r"^## (.*)$", (folder / "report.md").read_text(), flags=re.MULTILINE))
    for row in rows:
        if row[0] in listed:
            sections = {place.split(":")[0].strip() for place in row[2].split(";")}
            assert sections <= headings or row[0] == "figure 4", row
    assert ["figure 4", "sample images", "only with --faces, because it shows people"] in rows


@pytest.mark.usefixtures("blank_pngs")
def test_tables_of_missing_labels_have_no_place(tmp_path: Path) -> None:
    metrics = write_evaluation(tmp_path / "eval")
    metrics["gender"]["n"] = 0
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps(metrics))

    page_of(tmp_path / "eval")

    rows = {row[0]: row[2] for row in rows_of(tmp_path / "eval", "The paper's tables and figures") if len(row) == 3}
    assert (rows["table 3"], rows["figure 10"]) == ("not measured: no such labels or no such head", "Race")


@pytest.mark.usefixtures("blank_pngs")
@pytest.mark.parametrize("tasks", [("age",), ("gender",), ("race",), ("age", "gender")])
def test_a_model_of_some_tasks_has_a_page(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    write_evaluation(tmp_path / "eval", tasks=tasks)

    page_of(tmp_path / "eval")

    text = (tmp_path / "eval" / "report.md").read_text()
    assert [name for name in ("Age", "Gender", "Race") if f"\n## {name}\n" in text] == [
        name.capitalize() for name in tasks
    ]
    assert "not calibrated" in text
    assert not re.search(r"\bNone\b(?! of them)", text)
    assert not re.search(r"\bnan\b", text)


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"num_seen_in_training": 7}, "7 of these images are training images"),
        ({"num_seen_in_training": None}, "does not record its training images"),
        ({"split": "val"}, "chose its best epoch on these images"),
    ],
)
def test_figures_that_are_too_good_are_marked(tmp_path: Path, changes: dict[str, Any], warning: str) -> None:
    write_evaluation(tmp_path / "eval", changes=changes)

    assert warning in page_of(tmp_path / "eval")


@pytest.mark.usefixtures("blank_figures")
def test_the_page_describes_the_measured_network(tmp_path: Path) -> None:
    metrics = write_evaluation(tmp_path / "eval")
    best = Path(metrics["evaluation"]["checkpoint"])
    best.mkdir(parents=True)
    (best / "meta.json").write_text(json.dumps({"git_commit": "of another model"}))

    text = page_of(tmp_path / "eval")

    assert "resnet50" in text
    assert "15,000" in text
    assert "c0ffee" in text
    assert "of another model" not in text


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("change", ["none", "calibrated again", "calibrated", "another model"])
def test_a_calibration_after_the_evaluation_has_a_warning(tmp_path: Path, change: str) -> None:
    text = json.dumps({"model_digest": ("ef" if change == "another model" else "ab") * 32, "n": 520})
    measured = text if change == "none" else f"{text} "
    sha256 = None if change == "calibrated" else hashlib.sha256(measured.encode()).hexdigest()
    metrics = write_evaluation(tmp_path / "eval", changes={"calibration_sha256": sha256})
    best = Path(metrics["evaluation"]["checkpoint"])
    best.mkdir(parents=True)
    (best / "calibration.json").write_text(text)

    is_shown = "The checkpoint was calibrated after this evaluation" in page_of(tmp_path / "eval")

    assert is_shown == (change in ("calibrated", "calibrated again"))


@pytest.mark.usefixtures("blank_figures")
def test_images_without_a_label_are_not_counted_for_its_task(tmp_path: Path) -> None:
    metrics = write_evaluation(tmp_path / "eval")
    numbers = {task: metrics[task]["n"] for task in ("age", "gender", "race")}
    assert set(numbers.values()) == {NUM_ROWS - 5}

    assert f"On {NUM_ROWS - 5:,} images, the age MAE" in page_of(tmp_path / "eval")
    metrics["gender"]["n"] = 12
    assert verdict(metrics).startswith(
        f"The age MAE is {metrics['age']['mae_years']:.1f} years (on {NUM_ROWS - 5:,} images)"
    )
    assert "(on 12 images)" in verdict(metrics)
    rows = {row[0]: row[-1] for row in rows_of(tmp_path / "eval", "Results")}
    assert rows["gender accuracy"] == f"{NUM_ROWS - 5:,}"


def test_intervals_are_called_what_they_are(evaluation: tuple[Path, dict[str, Any], str]) -> None:
    _, _, text = evaluation

    assert "true age, years median middle 80 % the true age" in text
    assert "median 95 % interval" not in text


@pytest.mark.usefixtures("blank_pngs")
def test_a_stress_test_has_curves(tmp_path: Path) -> None:
    metrics = write_evaluation(tmp_path / "eval")
    labels, people = random_labels(), np.arange(NUM_ROWS)
    clean = random_predictions(labels, ("age", "gender", "race"))
    worse = {
        Condition(name, severity): random_predictions(labels, ("age", "gender", "race"), noise=1.0 + severity)
        for name in CORRUPTIONS
        for severity in SEVERITIES
    }
    robustness = measure(labels, clean, worse, people, num_resamples=20)
    yaw = measure_yaw(labels, clean, np.linspace(-60, 60, NUM_ROWS), people, num_resamples=20)
    rows = stress_rows(robustness, yaw, {condition: str(condition.severity) for condition in worse})
    metrics["stress"] = {"num_images": NUM_ROWS, **robustness.to_json()}
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps(metrics))
    pq.write_table(pa.Table.from_pylist(rows, STRESS), tmp_path / "eval" / "stress.parquet")

    text = page_of(tmp_path / "eval")

    assert "Age MAE under each corruption" in text
    assert f"{rows[0]['age_mae_years']:.2f}" in text


@pytest.mark.usefixtures("blank_figures")
def test_faces_are_shown_only_if_asked_for(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "eval")
    with pytest.raises(ConfigError, match="no sheets of faces"):
        page_of(tmp_path / "eval", faces=True)
    sheets = tmp_path / "eval" / "explain"
    sheets.mkdir()
    (sheets / "worst_age.png").write_bytes(b"\x89PNG")

    assert "Do not publish this page" not in page_of(tmp_path / "eval")
    assert "Do not publish this page" in page_of(tmp_path / "eval", faces=True)


@pytest.mark.usefixtures("blank_pngs")
def test_other_data_of_the_same_model_stands_beside(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "eval")
    write_evaluation(tmp_path / "other", source="adience")
    write_evaluation(tmp_path / "foreign", changes={"model_digest": "00" * 32})

    page_of(tmp_path / "eval", tmp_path / "other")

    rows = [row[0] for row in rows_of(tmp_path / "eval", "The paper's tables and figures")]
    assert rows.index("utkface, split test") + 1 == rows.index("adience, split test")
    with pytest.raises(ConfigError, match=r"foreign.*another model.*--compare"):
        page_of(tmp_path / "eval", tmp_path / "foreign")


def test_bands_follow_the_years_of_age() -> None:
    ages = np.repeat([20.0, 21.0, 30.0, 31.0, 32.5], [50, MIN_ROWS - 1, 1, 60, 3])
    bands = age_bands(np.append(ages, np.nan), np.append(ages, 99.0))

    assert [(round(band.true_age_years, 2), band.n) for band in bands] == [(20.0, 50), (21.9, MIN_ROWS), (31.07, 63)]
    assert [band.median_years for band in bands] == [20.0, 21.0, 31.0]
    assert age_bands(np.array([np.nan]), np.array([1.0])) == []

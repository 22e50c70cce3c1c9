"""The page of a cross-validation: its folds, the summary over them, and what was done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from outlines import words

from agr_ray.config import CrossValidateConfig, ReportJob
from agr_ray.errors import ConfigError
from agr_ray.evaluation.folds import Sums, fold_values, summarise
from agr_ray.report.charts import Line, Scale, line_drawing
from agr_ray.report.report import report
from agr_ray.schema import FOLD_METRICS, FOLD_SUMMARY, FOLDS
from agr_ray.storage import Storage

STORAGE = Storage()


def sums(**parts: tuple[float, float]) -> Sums:
    return {metric: parts.get(metric, (0.0, 0.0)) for metric in FOLD_METRICS}


TWO = (
    sums(age_mae_years=(20.0, 4.0), age_exact_group=(1.0, 4.0), gender_accuracy=(3.0, 4.0)),
    sums(age_mae_years=(18.0, 6.0), age_exact_group=(3.0, 6.0), gender_accuracy=(6.0, 6.0)),
)


def write_folds(folder: Path, *folds: Sums, **settings: Any) -> Path:
    rows = [
        {"fold": f"fold-{n}", "num_train": 1400, "num_val": 10, "num_test": 5, "num_left_out": n} | fold_values(each)
        for n, each in enumerate(folds)
    ]
    STORAGE.write_table(pa.Table.from_pylist(rows, FOLDS), str(folder / "folds.parquet"))
    STORAGE.write_table(pa.Table.from_pylist(summarise(folds), FOLD_SUMMARY), str(folder / "summary.parquet"))
    own = CrossValidateConfig(**settings).model_dump(mode="json", exclude={"out", "max_concurrent"})
    record = {"cross_validate": own, "train": {"epochs": 3}, "data": "digest", "runs": [row["fold"] for row in rows]}
    STORAGE.write(str(folder / "cross-validation.json"), json.dumps(record).encode())
    STORAGE.write_table(pa.table({"image_id": ["a", "b", "b", "c"]}), str(folder / "predictions.parquet"))
    return folder


def page_of(folder: Path) -> tuple[str, list[list[str]]]:
    """Return the text of the page, and the cells of its tables."""
    html = Path(report(ReportJob(folders=[str(folder)]), quiet=True)).read_text()
    lines = (folder / "report.md").read_text().splitlines()
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return words(html), cells


def test_the_folds_and_their_summary_are_in_one_table(tmp_path: Path) -> None:
    text, cells = page_of(write_folds(tmp_path / "cv", *TWO))

    assert cells[0] == ["fold", "train", "val", "test", "left out", "age MAE, years", "age group, %", "gender, %"]
    assert cells[2:8] == [
        ["fold-0", "1,400", "10", "5", "0", "5.00", "25.0", "75.0"],
        ["fold-1", "1,400", "10", "5", "1", "3.00", "50.0", "100.0"],
        ["mean", "", "", "", "", "4.00", "37.5", "87.5"],
        ["standard deviation", "", "", "", "", "1.41", "17.7", "17.7"],
        ["standard error", "", "", "", "", "1.00", "12.5", "12.5"],
        ["pooled", "", "", "", "", "3.80", "40.0", "90.0"],
    ]
    assert "Mean age MAE over 2 folds ± standard deviation: 4.00 ± 1.41 years. Over all images at once: 3.80" in text
    assert "train.epochs" in text
    names = sorted(path.name for path in (tmp_path / "cv" / "report-figures").glob("*.png"))
    assert names == ["age-exact-group.png", "age-mae-years.png", "gender-accuracy.png"]


def test_the_page_says_what_was_done(tmp_path: Path) -> None:
    settings = {"protocol": "balanced_halves", "val": 0.2, "near_duplicates": "exclude"}

    text, _ = page_of(write_folds(tmp_path / "cv", *TWO, **settings))

    assert "Protocol balanced_halves, 2 folds, 3 images." in text
    assert "those in neither half were tested by both networks" in text
    assert "20 % were for validation" in text
    assert "left out of its training (1 in all folds together)" in text


def test_accuracies_alone_and_a_metric_of_one_fold_have_a_page(tmp_path: Path) -> None:
    folds = (sums(age_one_off=(3.0, 4.0), race_accuracy=(1.0, 4.0)), sums(age_one_off=(4.0, 4.0)))

    text, cells = page_of(write_folds(tmp_path / "cv", *folds))

    assert "Mean one-off over 2 folds ± standard deviation: 87.5 ± 17.7 %" in text
    assert [row[-1] for row in cells[2:8]] == ["25.0", "", "25.0", "", "", "25.0"]


def test_hundreds_of_folds_fit_on_the_page(tmp_path: Path) -> None:
    text, cells = page_of(write_folds(tmp_path / "cv", *TWO * 100, protocol="leave_one_person_out"))

    assert "200 folds" in text
    assert cells[201][0] == "fold-199"


def test_an_unfinished_cross_validation_is_one_line(tmp_path: Path) -> None:
    folder = write_folds(tmp_path / "cv", *TWO)
    (folder / "predictions.parquet").unlink()

    with pytest.raises(ConfigError, match=r"cv: no finished cross-validation \(.*predictions\.parquet does not"):
        page_of(folder)


def test_points_are_not_connected_and_none_is_left_out() -> None:
    line = Line("fold", range(100), [1.0] * 100, is_points=True)

    (drawn,) = line_drawing("points", "", [line], Scale("fold"), Scale("years")).draw().axes[0].lines

    assert (drawn.get_linestyle(), drawn.get_marker(), drawn.get_markevery()) == ("None", "o", 1)

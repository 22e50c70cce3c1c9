"""The page of a scored bucket says how good the model is, and on what it was trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluations import random_labels, random_predictions
from test_card import evaluation, meta
from test_scores_shares import table

from agr_ray.evaluation.calibration import Calibration
from agr_ray.models.card import model_card, with_measured
from agr_ray.report.page import Paragraph, Table
from agr_ray.report.scores_model import model_blocks, model_warnings
from agr_ray.scoring.record import described_model

META = {
    "data": {"source": "utkface", "num_train_rows": 1690},
    "metrics": {
        "val": {
            "age": {"n": 520, "mae_years": 10.565, "exact_group": 0.41},
            "gender": {"n": 519, "accuracy": 0.6615},
            "race": {"n": 520, "accuracy": 0.4654},
            "baseline": {
                "age": {"mae_years": 15.24, "exact_group": 0.3},
                "gender": {"accuracy": 0.52},
                "race": {"accuracy": 0.43},
            },
        }
    },
}


def test_the_page_gives_the_errors_of_validation() -> None:
    paragraph, rows = model_blocks({"model": described_model(META, None)}, table("gender", {"female": 5}), None)

    assert isinstance(paragraph, Paragraph)
    assert paragraph.text == "The model was trained on utkface (1,690 images)."
    assert isinstance(rows, Table)
    assert [tuple(row) for row in rows.rows] == [
        ("age MAE", "10.56 years", "15.24 years", "520"),
        ("in the right age group", "41.00 %", "30.00 %", "520"),
        ("gender accuracy", "66.15 %", "52.00 %", "519"),
        ("race accuracy", "46.54 %", "43.00 %", "520"),
    ]


def test_the_page_gives_the_errors_on_test_images_where_the_card_has_them() -> None:
    card = with_measured(with_measured(model_card(meta()), evaluation("val")), evaluation("test"))

    _, rows = model_blocks({"model": described_model(META, None, card)}, table("gender", {"female": 5}), None)

    assert isinstance(rows, Table)
    assert rows.columns == ("on utkface, split test", "model", "95 % interval", "baseline", "images")
    assert [row[0] for row in rows.rows] == ["age MAE", "in the right age group", "gender accuracy", "race accuracy"]
    assert list(rows.rows[2])[:2] == ["gender accuracy", "96.00 %"]


def test_the_page_says_how_often_the_model_abstains() -> None:
    labels = random_labels()
    calibration = Calibration.fit(labels, random_predictions(labels, ("age", "gender")), coverage=0.9, risk=0.05)
    described = described_model(META, calibration)["calibration"]
    known = labels.gender >= 0
    accepted = calibration.rows["gender_pred"][known] >= 0
    assert described["gender"]["abstained"] == pytest.approx(1.0 - np.mean(accepted))
    assert described["gender"]["error"] <= 0.05
    assert "race" not in described

    demographics = table("gender", {"female": 30, "male": 50}, undecided=20)
    *_, rows = model_blocks({"model": described_model(META, calibration)}, demographics, 21.34)

    assert isinstance(rows, Table)
    assert rows.columns[2] == "1,500 calibration images"
    width, gender = (tuple(row) for row in rows.rows)
    assert width == ("mean width of the age intervals", "21.3 years", "", "")
    assert gender[:2] == ("abstains on gender", "20.0 %")


def test_a_model_of_unknown_errors_says_so() -> None:
    meta: dict[str, Any] = {"data": {}, "metrics": {}}

    (paragraph,) = model_blocks({"model": described_model(meta, None)}, table("gender", {"female": 5}), None)

    assert isinstance(paragraph, Paragraph)
    assert "Its errors are not known" in paragraph.text


@pytest.mark.parametrize(
    ("source", "warnings"),
    [
        ("utkface", []),
        (
            "rendered",
            ["The model was trained on drawings of faces only. Its predictions for photographs of people mean"],
        ),
        ("utkface + rendered", ["The model was partly trained on drawings"]),
    ],
)
def test_a_model_of_drawings_has_a_warning(source: str, warnings: list[str]) -> None:
    meta = META | {"data": {"source": source}}

    found = model_warnings({"model": described_model(meta, None)})

    assert len(found) == len(warnings)
    assert all(text.startswith(start) for text, start in zip(found, warnings, strict=True))

"""The headline and the shares of a scored bucket do not claim more than the faces show."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from agr_ray.labels import UTKFACE
from agr_ray.report.page import Drawings, Table
from agr_ray.report.scores_shares import headline, shares
from agr_ray.schema import DEMOGRAPHICS

Corrected = tuple[float, float, float]


def table(
    breakdown: str,
    numbers: dict[str, int],
    *,
    undecided: int = 0,
    corrected: dict[str, Corrected] | None = None,
    num_flagged: int = 0,
) -> pa.Table:
    """Return the rows of an attribute: faces by predicted class; share, low and high by class."""
    decided = sum(numbers.values())
    rows: list[dict[str, Any]] = []
    for name, n in numbers.items():
        share, low, high = (corrected or {}).get(name, (None, None, None))
        rows.append(
            dict.fromkeys(DEMOGRAPHICS.names)
            | dict.fromkeys((field.name for field in DEMOGRAPHICS if field.name.startswith("num_")), 0)
            | {"is_total": True, "breakdown": breakdown, breakdown: name, "n": n, "share": n / decided}
            | {"share_corrected": share, "share_low": low, "share_high": high, "suppressed": False}
            | {"num_images": 200, "num_faces": decided + undecided + num_flagged, "num_flagged": num_flagged}
            | {"num_abstained": undecided, "num_unique": None}
        )
    return pa.Table.from_pylist(rows, DEMOGRAPHICS)


def test_the_headline_names_no_class_if_most_faces_are_undecided() -> None:
    text = headline(table("race", {"white": 38, "asian": 1}, undecided=160))

    assert text == "199 faces of 200 photographs were counted. Race: undecided for 80 % (160 of 199 faces)."


def test_the_headline_names_no_class_if_the_intervals_overlap() -> None:
    corrected = {"female": (0.424, 0.229, 0.616), "male": (0.576, 0.385, 0.772)}

    text = headline(table("gender", {"female": 102, "male": 97}, undecided=3, corrected=corrected))

    assert text.endswith(
        "Gender: no class is clearly the most frequent; male 58 % (38 to 77 %), female 42 % (23 to 62 %) of 202 faces, "
        "corrected for the model's errors, with 90 % intervals; 3 undecided."
    )


def test_the_headline_gives_the_interval_of_the_most_frequent_class() -> None:
    corrected = {"female": (0.2, 0.1, 0.3), "male": (0.8, 0.7, 0.9)}

    text = headline(table("gender", {"female": 50, "male": 150}, corrected=corrected))

    assert "Gender: male 80 % (70 to 90 %) of 200 faces, corrected for the model's errors, with 90 % interval" in text


def test_the_headline_says_that_shares_are_not_corrected() -> None:
    text = headline(table("age_group", {"21-30": 60, "31-40": 120}, undecided=20, num_flagged=7))

    assert text == (
        "200 faces of 200 photographs were counted. Age group: 31-40 is predicted most often, for 120 of 200 faces "
        "(60 %), not corrected for the model's errors; 20 undecided."
    )


def test_undecided_faces_have_a_row_and_a_mark() -> None:
    blocks = shares(table("race", {"white": 30, "asian": 10}, undecided=60), UTKFACE)

    tables = [block for block in blocks if isinstance(block, Table)]
    rows = [tuple(row) for row in tables[0].rows]
    assert rows == [
        ("white", "30", "30.0", "", ""),
        ("asian", "10", "10.0", "", ""),
        ("undecided (the model abstained)", "60", "60.0", "", ""),
    ]
    (drawings,) = (block for block in blocks if isinstance(block, Drawings))
    axes = drawings.drawings[0].draw().axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["white  n=30", "asian  n=10", "undecided  n=60"]


def test_a_decided_attribute_has_no_undecided_row() -> None:
    blocks = shares(table("age_group", {"21-30": 30, "31-40": 10}), UTKFACE)

    tables = [block for block in blocks if isinstance(block, Table)]
    assert [row[0] for row in tables[0].rows] == ["21-30", "31-40"]

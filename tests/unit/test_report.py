"""Figures contain the right data. Their looks must be checked by eye."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agr_ray.labels import UTKFACE, Labels
from agr_ray.report.curves import curves_png
from agr_ray.report.samples import describe, samples_page
from agr_ray.schema import HISTORY

NAN = float("nan")


def history(num_epochs: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        dict.fromkeys(HISTORY.names, 1.0 / epoch) | {"epoch": epoch} | changes for epoch in range(1, num_epochs + 1)
    ]


def decoded(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("num_epochs", [1, 3, 100])
def test_curves_are_an_image_of_the_stated_size(num_epochs: int) -> None:
    assert decoded(curves_png(history(num_epochs), "runs/one")).shape == (800, 1500, 3)


def test_the_path_of_a_run_is_not_parsed_as_mathtext() -> None:
    assert decoded(curves_png(history(2), "/data/$x_{$/[1]")).shape == (800, 1500, 3)


def test_curves_change_with_the_metrics() -> None:
    one, other = (decoded(curves_png(history(3, val_age_distance_years=years), "runs/one")) for years in (5.0, 7.0))

    # In the second panel of the upper row, and nowhere else.
    changed = np.argwhere((one != other).any(axis=2))
    assert changed.size
    assert changed[:, 0].max() < 420
    assert 480 < changed[:, 1].min() <= changed[:, 1].max() < 1020


def test_curves_without_validation_can_be_drawn() -> None:
    nothing: dict[str, None] = dict.fromkeys(name for name in HISTORY.names if name.startswith("val_"))

    assert decoded(curves_png(history(2, **nothing), "runs/one")).shape == (800, 1500, 3)


LABELS = Labels(
    UTKFACE, np.array([30, NAN, 60], np.float32), np.array([0, 1, -1], np.int64), np.array([2, -1, 0], np.int64)
)
SAID = {
    "age": np.array([33, 50, 75], np.float32),
    "gender": np.array([0.2, 0.1, 0.9], np.float32),
    "race": np.eye(5, dtype=np.float32)[[2, 1, 0]],
}


@pytest.mark.parametrize(
    ("index", "truth", "said", "is_wrong"),
    [
        (0, "label: 30, female, asian", "model: 33, female, asian", False),
        (1, "label: ?, male, ?", "model: 50, female, black", True),  # of the gender alone
        (2, "label: 60, ?, white", "model: 75, male, white", True),  # fifteen years
    ],
)
def test_samples_are_described_with_their_labels(index: int, truth: str, said: str, is_wrong: bool) -> None:
    assert describe(LABELS, SAID, index) == (truth, said, is_wrong)


def test_a_task_without_head_is_not_described() -> None:
    assert describe(LABELS, {"gender": SAID["gender"]}, 1) == ("label: male", "model: female", True)


def test_the_page_of_samples_shows_the_crops() -> None:
    crops = np.zeros((3, 40, 40, 3), np.uint8)
    crops[1] = (200, 30, 90)

    page = samples_page(crops, LABELS, SAID)

    assert page.dtype == np.uint8
    assert page.shape[2] == 3
    rows, columns = np.nonzero((page == (200, 30, 90)).all(axis=2))
    assert len(rows) > 100 * 100
    assert columns.min() > page.shape[1] / 6 - 20
    assert columns.max() < page.shape[1] / 3 + 20

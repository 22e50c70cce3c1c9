"""What is looked at before training."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agr_ray.config import ConfigError
from agr_ray.runtime.guards import check_no_overlap, class_warnings, detector_warnings
from agr_ray.runtime.prepared import FORMAT_VERSION, PreparedSet
from agr_ray.storage import Storage

COUNTS = {"gender": {"female": 0, "male": 8}, "race": {"white": 5, "black": 1, "asian": 2, "indian": 0, "others": 0}}


def prepared(uri: str, detector: str = "mtcnn") -> PreparedSet:
    return PreparedSet(
        format_version=FORMAT_VERSION,
        finished=True,
        settings={"vision": {"detector": detector}},
        split_manifest_sha256="",
        labels_sha256="",
        splits={},
        counts={},
        uri=uri,
    )


def crops(folder: Path, rows: list[tuple[str, str | None, str | None]]) -> pa.Table:
    table = pa.table(dict(zip(("key", "content_hash", "split"), zip(*rows, strict=True), strict=True)))
    (folder / "crops").mkdir(parents=True)
    pq.write_table(table, folder / "crops" / "part-0.parquet")
    return table.select(["content_hash", "split"])


def check(table: pa.Table, folder: Path) -> None:
    train = table.filter([split == "train" for split in table["split"].to_pylist()])
    check_no_overlap(train, table, prepared(str(folder)), Storage())


def test_an_image_in_training_and_validation_is_refused_by_name(tmp_path: Path) -> None:
    table = crops(
        tmp_path,
        [("a.jpg", "11", "train"), ("b.jpg", "22", "train"), ("c.jpg", "22", "val"), ("d.jpg", "33", "test")],
    )

    with pytest.raises(
        ConfigError, match=r"1 images of val are, .* in train too, such as b.jpg in train, c.jpg in val;"
    ):
        check(table, tmp_path)


@pytest.mark.parametrize(
    "rows",
    [
        [("a.jpg", "11", "train"), ("b.jpg", "11", "train"), ("c.jpg", "22", "val"), ("d.jpg", "22", "test")],
        [("a.jpg", None, "train"), ("b.jpg", None, "val")],  # not read, so not known
        [("a.jpg", "11", "train"), ("b.jpg", "11", None)],  # in no split: a reject, or left out by sampling
    ],
)
def test_splits_that_share_no_image_with_training_pass(
    tmp_path: Path, rows: list[tuple[str, str | None, str | None]]
) -> None:
    check(crops(tmp_path, rows), tmp_path)


def test_classes_that_no_training_row_has_are_named_with_counts() -> None:
    gender, race = class_warnings(COUNTS, ["age", "gender", "race"], prepared("data"))

    assert "no training row has gender female, " in gender
    assert "it has female 0, male 8" in gender
    assert "no training row has race indian or others, " in race


def test_a_class_is_not_missed_where_its_task_has_no_head() -> None:
    assert class_warnings(COUNTS, ["age"], prepared("data")) == []


@pytest.mark.parametrize(("detector", "said"), [("haar", "--vision.detector haar"), ("none", "mtcnn or haar")])
def test_crops_of_another_detector_than_scorings_are_warned_of(detector: str, said: str) -> None:
    (warning,) = detector_warnings(prepared("data", detector))

    assert f"vision.detector {detector}" in warning
    assert said in warning


def test_crops_of_scorings_own_detector_are_not() -> None:
    assert detector_warnings(prepared("data")) == []

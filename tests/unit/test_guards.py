"""Checks before training starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agr_ray.config import LabelsConfig
from agr_ray.data.guards import (
    check_no_overlap,
    check_no_overlaps,
    check_sets,
    class_warnings,
    copies_warnings,
    size_warnings,
    training_space,
    vision_warnings,
)
from agr_ray.data.prepared import FORMAT_VERSION, PreparedSet
from agr_ray.errors import ConfigError
from agr_ray.labels import FAIRFACE, UTKFACE, LabelSpace
from agr_ray.storage import Storage

COUNTS = {"gender": {"female": 0, "male": 8}, "race": {"white": 5, "black": 1, "asian": 2, "indian": 0, "others": 0}}


def prepared(
    uri: str, detector: str = "mtcnn", *, side_px: int = 112, template: str = "five_point_v1", labels: str = ""
) -> PreparedSet:
    return PreparedSet(
        format_version=FORMAT_VERSION,
        finished=True,
        settings={
            "label_space": UTKFACE.to_json(),
            "vision": {"detector": detector},
            "crop_side_px": side_px,
            "template": template,
        },
        split_manifest_sha256="",
        labels_sha256=labels or uri,
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


def test_an_image_in_training_and_validation_is_rejected_by_name(tmp_path: Path) -> None:
    table = crops(
        tmp_path,
        [("a.jpg", "11", "train"), ("b.jpg", "22", "train"), ("c.jpg", "22", "val"), ("d.jpg", "33", "test")],
    )

    with pytest.raises(
        ConfigError, match=r"1 images of val are also, .* in train, such as b.jpg in train, c.jpg in val;"
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
    gender, race = class_warnings(COUNTS, ["age", "gender", "race"], [prepared("data")])

    assert "no training row has gender female, " in gender
    assert "the rows have female 0, male 8" in gender
    assert "no training row has race indian or others, " in race


def test_an_absent_class_does_not_matter_without_a_head_for_its_task() -> None:
    assert class_warnings(COUNTS, ["age"], [prepared("data")]) == []


def test_crops_made_without_a_detector_trigger_a_warning() -> None:
    (warning,) = vision_warnings([prepared("data", "none")])

    assert "train.data data: its crops were made with vision.detector none, which scoring can't use" in warning


def test_an_input_larger_than_the_crops_triggers_a_warning_that_names_the_recipe() -> None:
    data = prepared("data").model_copy(update={"recipe": "utkface_lite"})
    side = data.crop_side_px

    (warning,) = size_warnings([data], 2 * side)

    assert f"the crops of train.data data are {side} px, and model.image_size {2 * side} is larger" in warning
    assert warning.endswith("; --config utkface_lite, with which the set was prepared, may fit")
    assert size_warnings([data], side) == []


def test_crops_of_any_detector_trigger_no_warning() -> None:
    assert vision_warnings([prepared("data"), prepared("more")]) == []
    assert vision_warnings([prepared("data", "haar")]) == []
    assert vision_warnings([prepared("data", "mtcnn"), prepared("more", "mtcnn_int8")]) == []
    assert len(vision_warnings([prepared("data", "mtcnn"), prepared("more", "haar")])) == 1


# Several sets


def test_sets_of_the_same_crop_size_can_be_trained_on_together() -> None:
    check_sets([prepared("one"), prepared("two"), prepared("three", "haar")])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"side_px": 224}, r"the crops of one have crop_side_px 112, those of three 224; prepare one of them again"),
        ({"template": "v0"}, r"the crops of one have template five_point_v1, those of three v0"),
        ({"labels": "two"}, r"two and three are the same set; name it once"),
    ],
    ids=str,
)
def test_incompatible_sets_are_both_named(other: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_sets([prepared("one"), prepared("two"), prepared("three", **other)])


def check_both(tmp_path: Path, *rows: list[tuple[str, str | None, str | None]]) -> None:
    sets = [prepared(str(tmp_path / name)) for name in ("one", "two", "three")[: len(rows)]]
    tables = [crops(Path(each.uri), said) for each, said in zip(sets, rows, strict=True)]
    trained = [table.filter([split == "train" for split in table["split"].to_pylist()]) for table in tables]
    check_no_overlaps(trained, tables, sets, Storage())


APART = [("a.jpg", "11", "train"), ("b.jpg", "22", "val")]


@pytest.mark.parametrize("is_first", [True, False])
def test_an_image_in_training_of_one_set_and_validation_of_another_is_rejected(tmp_path: Path, is_first: bool) -> None:
    seen = [("x.jpg", "33", "train"), ("y.jpg", "11", "test"), ("z.jpg", "44", "test")]
    order = [APART, seen] if is_first else [seen, APART]
    trained, held_back = (tmp_path / name for name in (("one", "two") if is_first else ("two", "one")))

    with pytest.raises(ConfigError) as caught:
        check_both(tmp_path, *order)

    assert f"train.data {held_back}: 1 images of test are also, byte for byte, in train of {trained}" in str(
        caught.value
    )
    assert "such as y.jpg in test; leave them out of one of the two and prepare again" in str(caught.value)


def test_sets_whose_splits_agree_on_an_image_pass(tmp_path: Path) -> None:
    check_both(
        tmp_path,
        APART,
        [("x.jpg", "11", "train"), ("y.jpg", "22", "test"), ("z.jpg", None, "val")],
        [("u.jpg", "55", "train"), ("v.jpg", None, "test")],
    )


def test_images_trained_on_in_two_sets_are_counted() -> None:
    one, two, three = (pa.table({"content_hash": hashes}) for hashes in (["1", "1", "2"], ["2", "3", None], ["3", "2"]))
    sets = [prepared("one"), prepared("two"), prepared("three")]

    (warning,) = copies_warnings([one, two, three], sets)

    assert "train.data one + two + three: 2 images are, byte for byte, in train of more than one set" in warning
    assert copies_warnings([one], sets[:1]) == []
    assert copies_warnings([one.slice(0, 2), two], sets[:2]) == []


def test_sets_from_different_detectors_trigger_a_warning() -> None:
    (different,) = vision_warnings([prepared("one"), prepared("two", "haar")])

    assert "crops of one and two were made with different settings: vision.detector mtcnn and haar;" in different
    assert "its checkpoint stores those of the first" in different


def in_space(uri: str, space: LabelSpace) -> PreparedSet:
    made = prepared(uri)
    return made.model_copy(update={"settings": made.settings | {"label_space": space.to_json()}})


def test_sets_are_trained_in_their_space_or_in_the_configured_one() -> None:
    first, second = in_space("/one", UTKFACE), in_space("/two", FAIRFACE)
    assert training_space([second, second], LabelsConfig()) == FAIRFACE
    assert training_space([first, second], LabelsConfig(space="utkface")) == UTKFACE
    with pytest.raises(
        ConfigError, match=r"/one has the races white, .*others; /two has white, .*; name the label space"
    ):
        training_space([first, second], LabelsConfig())
    ages = in_space("/ages", dataclasses.replace(UTKFACE, age_groups=("0-17", "18+")))
    with pytest.raises(
        ConfigError, match=r"/one has the age_groups 0-10, .*; /ages has 0-17, 18\+; name the label space"
    ):
        training_space([first, ages], LabelsConfig())
    assert (
        training_space([first, in_space("/own", dataclasses.replace(UTKFACE, name="custom"))], LabelsConfig())
        == UTKFACE
    )
    with pytest.raises(ConfigError, match=r"/one: the races of utkface .* do not map onto those of fairface"):
        training_space([first, second], LabelsConfig(space="fairface"))

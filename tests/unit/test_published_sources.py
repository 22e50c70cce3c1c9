"""FairFace and Adience as published: labels, age ranges, splits and damaged rows."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from agr_ray.config import LabelsConfig, SourceConfig, SplitConfig
from agr_ray.data.manifest import Content, SourceRow, build_manifest, content_hash, image_id, in_key_order
from agr_ray.data.sources.label_table import LabelTableError
from agr_ray.data.sources.registry import label_space, source_rows, split_fractions
from agr_ray.data.splits import assign_splits
from agr_ray.errors import ConfigError
from agr_ray.labels import ADIENCE, FAIRFACE, UTKFACE
from agr_ray.storage import Storage

FAIRFACE_HEADER = "file,age,gender,race,service_test\n"
FAIRFACE_TRAIN = (
    FAIRFACE_HEADER
    + "train/1.jpg,50-59,Male,East Asian,True\n"
    + "train/2.jpg,more than 70,Female,Latino_Hispanic,False\n"
    + "train/3.jpg,0-2,Female,Martian,False\n"  # its race is dropped
    + "train/4.jpg,old,?,Elf,False\n"  # nothing that can be read
    + "train/5.jpg,3-9\n"  # cut off
    + ",3-9,Male,White,True\n"
)
FAIRFACE_VAL = FAIRFACE_HEADER + "".join(f"val/{n}.jpg,20-29,Male,Black,True\n" for n in range(1, 41))
ADIENCE_HEADER = (
    "user_id\toriginal_image\tface_id\tage\tgender\tx\ty\tdx\tdy\ttilt_ang\tfiducial_yaw_angle\tfiducial_score\n"
)
POSE = "\t0\t0\t1301\t1301\t-115\t30\t17\n"


def images(folder: Path, keys: Iterable[str]) -> None:
    for key in keys:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(key.encode())


def read(folder: Path, kind: str, notes: list[str] | None = None, **options: Any) -> dict[str, SourceRow]:
    source = SourceConfig(kind=kind, uri=str(folder), **options)  # type: ignore[arg-type]
    space = label_space(source, LabelsConfig())
    note = [].append if notes is None else notes.append
    rows = list(source_rows(source, space, Storage(), note))
    assert len({row.key for row in rows}) == len(rows)
    return {row.key: row for row in rows}


@pytest.fixture
def fairface(tmp_path: Path) -> Path:
    images(tmp_path, [f"train/{n}.jpg" for n in range(1, 6)] + [f"val/{n}.jpg" for n in range(1, 41)])
    (tmp_path / "fairface_label_train.csv").write_text(FAIRFACE_TRAIN)
    (tmp_path / "fairface_label_val.csv").write_text(FAIRFACE_VAL)
    return tmp_path


def said(row: SourceRow) -> tuple[Any, ...]:
    label = row.label
    return (label.age, label.age_low, label.age_high, label.gender, label.race, label.split)


def test_fairface_has_age_ranges_seven_races_and_its_own_split(fairface: Path) -> None:
    notes: list[str] = []
    rows = read(fairface, "fairface", notes)

    assert said(rows["train/1.jpg"]) == (None, 50.0, 59.0, "male", "east_asian", None)
    assert said(rows["train/2.jpg"]) == (None, 70.0, 116.0, "female", "latino_hispanic", None)
    assert said(rows["train/3.jpg"]) == (None, 0.0, 2.0, "female", None, None)
    assert "race 'Martian' is not understood" in str(rows["train/3.jpg"].label.dropped)
    assert any("invalid values of race, dropped: 2" in note for note in notes)
    assert {rows[f"val/{n}.jpg"].label.split for n in range(1, 41)} == {"test"}


def test_damaged_rows_of_fairface_are_bad_labels(fairface: Path) -> None:
    rows = read(fairface, "fairface")

    assert "age 'old' is not a number" in str(rows["train/4.jpg"].label.error)
    assert rows["train/5.jpg"].label.error == "line 6 has 2 values for 5 columns"
    assert rows["fairface_label_train.csv:7"].label.error == "line 7 names no file"
    assert len(rows) == 46


def test_the_published_split_of_fairface_can_be_ignored(fairface: Path) -> None:
    rows = read(fairface, "fairface", published_splits=False)
    assert {row.label.split for row in rows.values()} == {None}
    split = SplitConfig(val=0.1, test=0.3)
    published, own = SourceConfig(kind="fairface"), SourceConfig(kind="fairface", published_splits=False)
    assert split_fractions(published, split) == {"train": 0.9, "val": 0.1, "test": 0.0}
    assert split_fractions(own, split) == split_fractions(SourceConfig(), split) == split.fractions


def test_an_image_of_both_published_sets_is_in_test_only(fairface: Path) -> None:
    (fairface / "train/1.jpg").write_bytes((fairface / "val/1.jpg").read_bytes())
    labels = FAIRFACE_VAL.replace("val/1.jpg,20-29,Male,Black", "val/1.jpg,50-59,Male,East Asian")
    (fairface / "fairface_label_val.csv").write_text(labels)
    rows = in_key_order(read(fairface, "fairface").values(), "fairface")
    contents = {
        image_id(row.uri): Content(content_hash(Path(row.uri).read_bytes())) for row in rows if Path(row.uri).exists()
    }
    table = build_manifest(rows, "fairface", contents)

    splits = assign_splits(table, split_fractions(SourceConfig(kind="fairface"), SplitConfig(val=0.5)), seed=0)

    by_key = dict(zip(splits["key"].to_pylist(), splits["split"].to_pylist(), strict=True))
    assert [by_key[f"train/{n}.jpg"] for n in (1, 4, 5)] == ["test", None, None]
    assert sorted(by_key[f"train/{n}.jpg"] for n in (2, 3)) == ["train", "val"]
    assert {by_key[f"val/{n}.jpg"] for n in range(1, 41)} == {"test"}


def test_each_label_word_of_fairface_has_a_class(fairface: Path) -> None:
    words = ("White", "Black", "Latino_Hispanic", "East Asian", "Southeast Asian", "Indian", "Middle Eastern")
    ages = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")
    (fairface / "fairface_label_train.csv").write_text(
        FAIRFACE_HEADER + "".join(f"val/{n}.jpg,{age},Male,{words[n % 7]},True\n" for n, age in enumerate(ages, 1))
    )
    (fairface / "fairface_label_val.csv").unlink()

    rows = read(fairface, "fairface", published_splits=False)

    labels = [rows[f"val/{n}.jpg"].label for n in range(1, 10)]
    assert [label.race for label in labels] == [FAIRFACE.races[n % 7] for n in range(1, 10)]
    spans = [(label.age_low, label.age_high) for label in labels]
    assert spans == [(float(low), float(high)) for low, high in FAIRFACE.age_ranges_years]


@pytest.fixture
def adience(tmp_path: Path) -> Path:
    keys = [f"{user}/coarse_tilt_aligned_face.{face}.{image}" for user, face, image in (
        ("1@N03", 1, "a_o.jpg"), ("1@N03", 2, "b_o.jpg"), ("2@N03", 7, "a_o.jpg"), ("2@N03", 8, "c_o.jpg"),
    )]  # fmt: skip
    images(tmp_path / "faces", [*keys, "2@N03/coarse_tilt_aligned_face.9.d_o.jpg"])
    images(tmp_path / "aligned", [key.replace("coarse_tilt", "landmark") for key in keys])
    (tmp_path / "fold_0_data.txt").write_text(
        ADIENCE_HEADER + f"1@N03\ta_o.jpg\t1\t(25, 32)\tf{POSE}" + f"1@N03\tb_o.jpg\t2\t35\tm{POSE}"
    )
    (tmp_path / "fold_4_data.txt").write_text(
        ADIENCE_HEADER
        + f"2@N03\ta_o.jpg\t7\tNone\tm{POSE}"
        + f"2@N03\tc_o.jpg\t8\t(60, 100)\tu{POSE}"
        + "2@N03\td_o.jpg\t9\t(8\n"
        + "\tx.jpg\n"
    )
    return tmp_path


def test_adience_has_ranges_exact_ages_and_subjects(adience: Path) -> None:
    rows = read(adience, "adience")

    faces = [rows[key] for key in sorted(rows) if key.startswith(("1@", "2@"))]
    assert [row.key for row in faces] == [
        "1@N03/coarse_tilt_aligned_face.1.a_o.jpg",
        "1@N03/coarse_tilt_aligned_face.2.b_o.jpg",
        "2@N03/coarse_tilt_aligned_face.7.a_o.jpg",
        "2@N03/coarse_tilt_aligned_face.8.c_o.jpg",
        "2@N03/coarse_tilt_aligned_face.9.d_o.jpg",
    ]
    assert [said(row)[:4] for row in faces[:4]] == [
        (None, 25.0, 32.0, "female"),
        (35.0, None, None, "male"),
        (None, None, None, "male"),
        (None, 60.0, 100.0, None),
    ]
    assert [row.label.subject for row in faces[:4]] == ["1@N03", "1@N03", "2@N03", "2@N03"]
    assert faces[4].label.error == "line 4 has 4 values for 12 columns"
    assert rows["fold_4_data.txt:5"].label.error == "line 5 names no image"
    assert [row.missing for row in faces] == [False] * 5


def test_adience_without_faces_reads_aligned(adience: Path) -> None:
    shutil.rmtree(adience / "faces")
    assert "1@N03/landmark_aligned_face.1.a_o.jpg" in read(adience, "adience")


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("fairface", "expected fairface_label_train.csv and fairface_label_val.csv, found neither"),
        ("adience", "expected fold_0_data.txt to fold_4_data.txt, found none"),
    ],
)
def test_a_folder_without_label_files_is_rejected(tmp_path: Path, kind: str, complaint: str) -> None:
    images(tmp_path, ["a.jpg"])
    with pytest.raises(LabelTableError, match=complaint):
        read(tmp_path, kind)


def test_a_label_file_without_a_column_is_rejected(fairface: Path) -> None:
    (fairface / "fairface_label_val.csv").write_text("file,age,gender\nval/1.jpg,0-2,Male\n")
    with pytest.raises(LabelTableError, match="expected the columns file, age, gender, race, found file, age, gender"):
        read(fairface, "fairface")


def test_a_label_file_that_cannot_be_read_is_rejected(fairface: Path) -> None:
    (fairface / "fairface_label_val.csv").unlink()
    (fairface / "fairface_label_val.csv").mkdir()
    with pytest.raises(LabelTableError, match=r"the label file can't be read: .*fairface_label_val\.csv"):
        read(fairface, "fairface")


def test_a_source_with_its_own_labels_rejects_others() -> None:
    fairface, own = SourceConfig(kind="fairface"), LabelsConfig(races=("a", "b"))
    assert label_space(fairface, LabelsConfig()) == FAIRFACE
    assert label_space(SourceConfig(kind="adience"), LabelsConfig(space="adience")) == ADIENCE
    assert label_space(SourceConfig(kind="folder"), LabelsConfig()) == UTKFACE
    assert label_space(SourceConfig(kind="folder"), own).races == ("a", "b")
    with pytest.raises(ConfigError, match="kind fairface has the label space fairface"):
        label_space(fairface, own)

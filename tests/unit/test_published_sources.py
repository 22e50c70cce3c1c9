"""FairFace, Adience, MORPH II, FG-NET and CORAL's lists as published: labels, age ranges, splits and damaged rows."""

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
from agr_ray.labels import ADIENCE, FAIRFACE, FGNET, MORPH2, UTKFACE
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
    assert [row.label.fold for row in faces[:4]] == [0, 0, 4, 4]
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
        ("morph2", r"expected morph_2008_nonCommercial\.csv, found none; source\.labels names a file of another name"),
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


MORPH_HEADER = "id_num,picture_num,dob,doa,race,gender,facial_hair,age,age_diff,glasses,photo\n"
MORPH_ROWS = (
    "009055,1,02/11/1950,03/05/2004,B,M,NULL,54,0,NULL,Album2/009055_1M54.JPG\n",
    "009055,2,02/11/1950,03/05/2005,B,M,NULL,55,365,NULL,Album2/009055_2M55.JPG\n",
    "273546,0,01/01/1980,01/02/2002,H,F,NULL,22,0,NULL,Album2/273546_00F22.JPG\n",
    "301001,0,01/01/1980,01/02/2002,O,F,NULL,22,0,NULL,Album2/301001_00F22.JPG\n",
    "301002,0,01/01/1980,01/02/2002,X,F,NULL,22,0,NULL,Album2/301002_00F22.JPG\n",  # its race is dropped
    "301003,0,01/01/1980,01/02/2002,W,M,22,0,Album2/301003_00M22.JPG\n",  # two values are missing
    "301004,0,01/01/1980,01/02/2002,W,M,NULL,22,0,NULL,\n",
    ",0,01/01/1980,01/02/2002,A,M,NULL,22,0,NULL,Album2/301005_00M22.JPG\n",
)


@pytest.fixture
def morph2(tmp_path: Path) -> Path:
    images(tmp_path, [line.rstrip().rpartition(",")[2] for line in MORPH_ROWS if line.rstrip()[-1] != ","])
    (tmp_path / "morph_2008_nonCommercial.csv").write_text(MORPH_HEADER + "".join(MORPH_ROWS))
    return tmp_path


def test_morph2_has_exact_ages_five_races_and_subjects(morph2: Path) -> None:
    rows = read(morph2, "morph2")

    first, second, third, other, unknown = (rows[line.rstrip().rpartition(",")[2]] for line in MORPH_ROWS[:5])
    assert said(first) == (54.0, None, None, "male", "black", None)
    assert said(second)[0] == 55.0
    assert [first.label.subject, second.label.subject, third.label.subject] == ["9055", "9055", "273546"]
    assert [third.label.race, other.label.race, unknown.label.race] == ["hispanic", "others", None]
    assert third.label.gender == "female"
    assert "race 'X' is not understood" in str(unknown.label.dropped)
    assert [row.missing for row in (first, second, third, other, unknown)] == [False] * 5


def test_damaged_rows_of_morph2_are_bad_labels(morph2: Path) -> None:
    rows = read(morph2, "morph2")

    assert rows["morph_2008_nonCommercial.csv:8"].label.error == "line 8 names no photo"
    assert rows["Album2/301005_00M22.JPG"].label.error == "line 9 names no subject"
    assert rows["Album2/301003_00M22.JPG"].label.error == "no label row in morph_2008_nonCommercial.csv"


def test_a_label_file_of_morph2_with_another_name_and_columns_in_another_order_is_read(morph2: Path) -> None:
    table = "photo,age,race,gender,id_num\nAlbum2/009055_1M54.JPG,54,B,M,9055\n"
    (morph2 / "album.csv").write_text(table)

    rows = read(morph2, "morph2", labels=str(morph2 / "album.csv"))

    assert said(rows["Album2/009055_1M54.JPG"]) == (54.0, None, None, "male", "black", None)
    assert rows["Album2/009055_1M54.JPG"].label.subject == "9055"


def test_fgnet_has_the_age_and_the_subject_in_its_names(tmp_path: Path) -> None:
    names = ["001A02.JPG", "001A43a.JPG", "001A43b.JPG", "082a00.jpg", "001A2.JPG", "1A02.JPG", "001A02ab.JPG"]
    images(tmp_path, [f"images/{name}" for name in names] + ["points/001a02.pts"])

    rows = read(tmp_path, "fgnet")

    assert [rows[f"images/{name}"].label.age for name in names] == [2.0, 43.0, 43.0, 0.0, None, None, None]
    assert [rows[f"images/{name}"].label.subject for name in names] == ["001", "001", "001", "082", None, None, None]
    assert said(rows["images/001A02.JPG"]) == (2.0, None, None, None, None, None)
    expected = r"name does not parse: expected [subject, 3 digits]A[age, 2 digits][letter].JPG"
    assert {rows[f"images/{name}"].label.error for name in names[4:]} == {expected}
    assert len(rows) == 7
    assert label_space(SourceConfig(kind="fgnet"), LabelsConfig()) == FGNET
    assert label_space(SourceConfig(kind="morph2"), LabelsConfig()) == MORPH2


def utkface_name(age: int, number: int) -> str:
    return f"{age}_1_2_2017011616113{number:04d}.jpg.chip.jpg"


@pytest.fixture
def coral(tmp_path: Path) -> Path:
    images(tmp_path / "UTKFace", [utkface_name(age, age) for age in (20, 21, 30, 40, 50, 60, 61)])
    header = ",file,age\n"
    (tmp_path / "utk_train.csv").write_text(
        header + f"0,{utkface_name(21, 21)},0\n2,{utkface_name(30, 30)},9\n3,{utkface_name(40, 40)},18\n"
    )
    (tmp_path / "utk_test.csv").write_text(
        header + f"18896,{utkface_name(60, 60)},39\n18899,{utkface_name(59, 1)},38\n18900,{utkface_name(50, 50)}\n"
    )
    return tmp_path


def test_corals_lists_choose_images_of_utkface_and_their_split(coral: Path) -> None:
    rows = read(coral / "UTKFace", "utkface", labels=str(coral))

    assert [row.key for row in rows.values() if not row.missing] == [utkface_name(a, a) for a in (21, 30, 40, 50, 60)]
    assert said(rows[utkface_name(60, 60)]) == (60.0, None, None, "female", "asian", "test")
    assert said(rows[utkface_name(21, 21)]) == (21.0, None, None, "female", "asian", None)
    assert rows[utkface_name(40, 40)].label.error == "its list gives the age 39, its name 40.0"
    assert rows[utkface_name(50, 50)].label.error == "line 4 has 2 values for 3 columns"
    assert [row.key for row in rows.values() if row.missing] == [utkface_name(59, 1)]
    source = SourceConfig(kind="utkface", labels=str(coral))
    assert split_fractions(source, SplitConfig(val=0.2)) == {"train": 0.8, "val": 0.2, "test": 0.0}


def test_a_validation_list_makes_the_split_of_utkface_complete(coral: Path) -> None:
    (coral / "utk_valid.csv").write_text(f",file,age\n7,{utkface_name(30, 30)},9\n")
    (coral / "utk_train.csv").write_text(f",file,age\n0,{utkface_name(21, 21)},0\n")

    rows = read(coral / "UTKFace", "utkface", labels=str(coral))

    splits = {row.key: row.label.split for row in rows.values() if not row.missing and not row.label.error}
    assert splits == {utkface_name(21, 21): "train", utkface_name(30, 30): "val", utkface_name(60, 60): "test"}


def test_an_image_in_two_lists_is_a_bad_label_and_a_missing_list_is_an_error(coral: Path) -> None:
    with (coral / "utk_test.csv").open("a") as file:
        file.write(f"\n2,{utkface_name(30, 30)},9\n")
    rows = read(coral / "UTKFace", "utkface", labels=str(coral))
    assert rows[utkface_name(30, 30)].label.error == "line 6 of utk_test.csv: is listed twice"

    (coral / "utk_train.csv").unlink()
    with pytest.raises(LabelTableError, match=r"source\.labels .*: expected utk_train\.csv and utk_test\.csv in it"):
        read(coral / "UTKFace", "utkface", labels=str(coral))


def test_a_label_table_may_number_its_folds(tmp_path: Path) -> None:
    images(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    (tmp_path / "labels.csv").write_text("key,age,fold\na.jpg,20,0\nb.jpg,30,2.0\nc.jpg,30,second\n")

    rows = read(tmp_path, "folder")

    assert [rows[key].label.fold for key in ("a.jpg", "b.jpg", "c.jpg")] == [0, 2, None]
    assert rows["c.jpg"].label.error == "fold 'second' is not a number from 0 to 9999"
    manifest = build_manifest(in_key_order(rows.values(), "folder"), "folder", {})
    assert manifest["fold"].to_pylist() == [0, 2, None]

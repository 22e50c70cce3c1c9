"""A folder of images with a table of labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agr_ray.data.folder import LabelTableError, source_rows
from agr_ray.data.manifest import ParsedLabel, build_manifest, content_hashes, group_ids
from agr_ray.storage import Storage

Row = dict[str, object]


def manifest(folder: Path, table: str, name: str = "labels.csv", **options: object) -> dict[str, Row]:
    (folder / name).write_text(table, encoding="utf-8")
    return manifest_of(folder, name, **options)


def manifest_of(folder: Path, name: str, **options: object) -> dict[str, Row]:
    storage = Storage()
    rows = source_rows(storage, str(folder), str(folder / name), **options)  # type: ignore[arg-type]
    built = build_manifest(rows, source="folder", storage=storage)
    return {row["key"]: row for row in built.to_pylist()}


def labels(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("age", "gender", "race", "status"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "sub" / "b.png").write_bytes(b"b")
    return tmp_path


def test_words_are_matched_in_either_case_and_blanks_are_missing(folder: Path) -> None:
    rows = manifest(folder, "key,age,gender,race,note\na.jpg,31.5,FEMALE,Asian,x\nsub/b.png,,male,,y\n")

    assert labels(rows["a.jpg"]) == (31.5, "female", "asian", "ok")
    assert labels(rows["sub/b.png"]) == (None, "male", None, "ok")


def test_parquet_with_numbers_reads_as_csv_does(folder: Path) -> None:
    table = pa.table({"key": ["a.jpg", "sub/b.png"], "age": [31, None], "gender": ["female", None]})
    pq.write_table(table, folder / "labels.parquet")

    rows = manifest_of(folder, "labels.parquet")

    assert labels(rows["a.jpg"]) == (31.0, "female", None, "ok")
    assert labels(rows["sub/b.png"]) == (None, None, None, "ok")


def test_another_column_can_hold_the_path(folder: Path) -> None:
    rows = manifest(folder, "file,age\n./a.jpg,3\nsub/b.png,4\n", key_column="file")

    assert rows["a.jpg"]["age"] == 3.0


def test_codes_mean_something_only_when_given(folder: Path) -> None:
    table = "key,age,gender\na.jpg,3,0\nsub/b.png,4,F\n"

    assert labels(manifest(folder, table)["a.jpg"]) == (None, None, None, "bad_label")
    rows = manifest(folder, table, gender_codes={"0": "male", "f": "female"})
    assert [row["gender"] for row in rows.values()] == ["male", "female"]


def test_a_code_for_an_unknown_word_is_refused(folder: Path) -> None:
    with pytest.raises(LabelTableError, match=r"'man': expected one of female, male"):
        manifest(folder, "key,age\na.jpg,3\n", gender_codes={"0": "man"})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("130,male,white", "age 130 is outside 0 to 116 years"),
        ("nan,male,white", "age nan is outside"),
        ("old,male,white", "age 'old' is not a number"),
        ("30,man,white", "gender 'man' is not understood: expected one of female, male"),
        ("30,male,green", "race 'green' is not understood: expected one of white, black"),
    ],
)
def test_a_label_that_is_not_understood_rejects_the_image(folder: Path, values: str, said: str) -> None:
    row = manifest(folder, f"key,age,gender,race\na.jpg,{values}\n")["a.jpg"]

    assert labels(row) == (None, None, None, "bad_label")
    assert said in str(row["error"])


def test_an_image_without_a_label_row_is_rejected_and_a_label_without_an_image_missing(folder: Path) -> None:
    rows = manifest(folder, "key,age\na.jpg,3\ngone.jpg,4\n")

    assert (rows["sub/b.png"]["status"], rows["sub/b.png"]["error"]) == ("bad_label", "no label row in labels.csv")
    assert (rows["gone.jpg"]["status"], rows["gone.jpg"]["group_id"]) == ("missing", None)
    assert len(rows) == 3


def test_an_image_that_was_hashed_before_is_not_read_again(folder: Path) -> None:
    (folder / "labels.csv").write_text("key,age\na.jpg,3\nsub/b.png,4\n", encoding="utf-8")
    rows = list(source_rows(Storage(), str(folder), str(folder / "labels.csv")))
    first = build_manifest(rows, source="folder", storage=Storage())
    (folder / "a.jpg").unlink()
    (folder / "sub/b.png").unlink()

    again = build_manifest(rows[:1], source="folder", storage=Storage(), known_hashes=content_hashes(first))
    changed = dataclasses.replace(rows[0], etag="other")
    lost = build_manifest([changed], source="folder", storage=Storage(), known_hashes=content_hashes(first))

    assert again.to_pylist() == [row for row in first.to_pylist() if row["key"] == rows[0].key]
    assert lost["status"].to_pylist() == ["missing"]


def test_a_labelled_file_of_any_ending_is_an_image(folder: Path) -> None:
    (folder / "c.heic").write_bytes(b"c")

    assert manifest(folder, "key,age\nc.heic,3\n")["c.heic"]["status"] == "ok"


def test_rows_that_agree_count_once_and_rows_that_disagree_reject(folder: Path) -> None:
    rows = manifest(folder, "key,age\na.jpg,3\na.jpg,3.0\nsub/b.png,4\nsub/b.png,5\n")

    assert labels(rows["a.jpg"]) == (3.0, None, None, "ok")
    assert rows["sub/b.png"]["error"] == "2 label rows disagree"


def test_subjects_and_splits_are_taken_over_as_text(folder: Path) -> None:
    rows = manifest(folder, "key,age,subject,split\na.jpg,3,007,TEST\nsub/b.png,4,,\n")

    assert (rows["a.jpg"]["group_id"], rows["a.jpg"]["split"]) == ("subject:007", "test")
    assert str(rows["sub/b.png"]["group_id"]).startswith("sha256:")


def test_an_unknown_split_is_rejected(folder: Path) -> None:
    row = manifest(folder, "key,age,split\na.jpg,3,dev\n")["a.jpg"]

    assert "split 'dev' is not understood: expected one of train, val, test" in str(row["error"])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("name,age\na.jpg,3\n", "expected 'key'"),
        ("key,years\na.jpg,3\n", "at least one of age, gender, race"),
        ("key,age,age\na.jpg,3,4\n", "two columns of one name"),
        ("key,age\na.jpg,3,4\n", "can't be read as CSV"),
        ("", "can't be read as CSV"),
        ("key,age\n,3\n", "row 1 has no key"),
        ("key,age\n../a.jpg,3\n", "not a path below the folder"),
        ("key,age\n/etc/a.jpg,3\n", "not a path below the folder"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(folder: Path, table: str, said: str) -> None:
    with pytest.raises(LabelTableError, match=said) as caught:
        manifest(folder, table)

    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_table_is_named(folder: Path) -> None:
    (folder / "broken.parquet").write_bytes(b"x")

    with pytest.raises(LabelTableError, match=r"none\.csv"):
        manifest_of(folder, "none.csv")
    with pytest.raises(LabelTableError, match=r"broken\.parquet"):
        manifest_of(folder, "broken.parquet")


def test_a_byte_order_mark_and_quoted_commas_are_read(folder: Path) -> None:
    (folder / "c, d.jpg").write_bytes(b"c")

    assert manifest(folder, '\ufeffkey,age\n"c, d.jpg",3\n')["c, d.jpg"]["age"] == 3.0


def test_equal_content_joins_the_groups_of_two_subjects() -> None:
    people = [ParsedLabel(age=3.0, subject=name) for name in ("bo", "al", "bo", "cy")]

    assert group_ids(people, ["1", "1", "2", "3"]) == ["subject:al"] * 3 + ["subject:cy"]


def test_equal_content_joins_a_subject_and_an_image_without_one() -> None:
    assert group_ids([ParsedLabel(subject="bo"), ParsedLabel()], ["1", "1"]) == ["subject:bo"] * 2


def test_a_subject_with_one_image_under_two_labels_is_marked() -> None:
    people = [ParsedLabel(age=age, subject="bo") for age in (3.0, 4.0, 5.0)]

    assert group_ids(people, ["1", "2", "3"]) == ["subject:bo"] * 3
    assert group_ids(people, ["1", "1", "3"]) == ["conflict:subject:bo"] * 3

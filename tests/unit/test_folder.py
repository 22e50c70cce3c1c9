"""A folder of images with a table of labels."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from manifests import read_manifest

from agr_ray.data.manifest import ParsedLabel, group_ids
from agr_ray.data.sources.folder import source_rows
from agr_ray.data.sources.label_table import LabelTableError, find_labels, given_labels
from agr_ray.labels import UTKFACE
from agr_ray.storage import Storage

Row = dict[str, object]


def manifest(folder: Path, table: str, name: str = "labels.csv", **options: object) -> dict[str, Row]:
    (folder / name).write_text(table, encoding="utf-8")
    return manifest_of(folder, name, **options)


def manifest_of(folder: Path, name: str, **options: object) -> dict[str, Row]:
    storage = Storage()
    rows = source_rows(storage, str(folder), str(folder / name), space=UTKFACE, **options)  # type: ignore[arg-type]
    built = read_manifest(rows, source="folder", storage=storage)
    return {row["key"]: row for row in built.to_pylist()}


def rows_and_notes(
    folder: Path, table: str | bytes, name: str = "labels.csv", **options: object
) -> tuple[list[Row], list[str]]:
    """Return the rows of the manifest, and the notes on the labels."""
    (folder / name).write_bytes(table.encode() if isinstance(table, str) else table)
    notes: list[str] = []
    rows = source_rows(Storage(), str(folder), str(folder / name), space=UTKFACE, note=notes.append, **options)  # type: ignore[arg-type]
    return read_manifest(rows, source="folder", storage=Storage()).to_pylist(), notes


def said(rows: list[Row], *names: str) -> list[tuple[object, ...]]:
    return [tuple(row[name] for name in ("key", *names, "status")) for row in rows]


def refusal(folder: Path, table: str | bytes, name: str = "labels.csv", **options: object) -> str:
    with pytest.raises(LabelTableError) as caught:
        rows_and_notes(folder, table, name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def labels(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("age", "gender", "race", "status"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "sub" / "b.png").write_bytes(b"b")
    return tmp_path


def test_words_match_in_any_case_and_blanks_are_missing(folder: Path) -> None:
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
    rows = manifest(folder, "file,age\n./a.jpg,3\nsub/b.png,4\n", columns={"key": "file"})

    assert rows["a.jpg"]["age"] == 3.0


def test_codes_mean_something_only_when_given(folder: Path) -> None:
    table = "key,age,gender\na.jpg,3,0\nsub/b.png,4,W\n"

    assert [row["gender"] for row in manifest(folder, table).values()] == [None, None]
    rows = manifest(folder, table, gender_codes={"0": "male", "w": "female"})
    assert [row["gender"] for row in rows.values()] == ["male", "female"]


def test_a_code_for_an_unknown_word_is_rejected(folder: Path) -> None:
    with pytest.raises(LabelTableError, match=r"'man': expected one of female, male"):
        manifest(folder, "key,age\na.jpg,3\n", gender_codes={"0": "man"})


@pytest.mark.parametrize(
    ("values", "kept", "error"),
    [
        ("130,male,white", (None, "male", "white"), "age 130 is outside 0 to 116 years"),
        ("-2,male,white", (None, "male", "white"), "age -2 is outside 0 to 116 years"),
        ("inf,male,white", (None, "male", "white"), "age 'inf' is not a number or a range of years"),
        ("abc,male,white", (None, "male", "white"), "age 'abc' is not a number or a range of years"),
        ("9-Mar,male,white", (None, "male", "white"), "age '9-Mar' is not a number or a range of years"),
        ("32-25,male,white", (None, "male", "white"), "age '32-25' is a range that ends before it begins"),
        ("30-120,male,white", (None, "male", "white"), "age 120 is outside 0 to 116 years"),
        ("30,man,white", (30.0, None, "white"), "gender 'man' is not understood: expected one of female, male, m, f"),
        (
            "30,male,green",
            (30.0, "male", None),
            "race 'green' is not understood: expected one of white, black, asian, indian, others",
        ),
    ],
)
def test_only_an_unreadable_value_is_dropped(folder: Path, values: str, kept: tuple[object, ...], error: str) -> None:
    rows, notes = rows_and_notes(folder, f"key,age,gender,race\na.jpg,{values}\nsub/b.png,1,female,asian\n")

    assert said(rows, "age", "gender", "race", "error") == [
        ("a.jpg", *kept, error, "ok"),
        ("sub/b.png", 1.0, "female", "asian", None, "ok"),
    ]
    column = error.partition(" ")[0]
    text = values.split(",")[("age", "gender", "race").index(column)]
    remedy = "" if column == "age" else f"; --source.{column}_codes says what they mean"
    assert notes == [f"labels.csv: invalid values of {column}, dropped: 1 ({text!r}){remedy}"]


def test_a_row_without_a_readable_label_is_a_bad_label(folder: Path) -> None:
    rows, _ = rows_and_notes(folder, "key,age,gender\na.jpg,abc,\nsub/b.png,,\n")

    assert said(rows, "age", "gender", "error") == [
        ("a.jpg", None, None, "age 'abc' is not a number or a range of years", "bad_label"),
        ("sub/b.png", None, None, None, "ok"),
    ]


def test_dropped_values_are_counted_by_column_with_the_first_examples(folder: Path) -> None:
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(bytes([number]))
    lines = ["a.jpg,30,male", "sub/b.png,31,x", *(f"{number}.jpg,old{number},male" for number in range(5))]

    _, notes = rows_and_notes(folder, "\n".join(["key,age,gender", *lines]))

    assert notes == [
        "labels.csv: invalid values of gender, dropped: 1 ('x'); --source.gender_codes says what they mean",
        "labels.csv: invalid values of age, dropped: 5 ('old0', 'old1', 'old2', ...)",
    ]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("0-2", 0, 2),
        ("3-9", 3, 9),
        ("25\u201332", 25, 32),
        (" 25 - 32 ", 25, 32),
        ("(25, 32)", 25, 32),
        ("[25,32]", 25, 32),
        ("(60, 100)", 60, 100),
        ("25 to 32 years", 25, 32),
        ("more than 70", 70, 116),
        ("More Than 70", 70, 116),
        ("70+", 70, 116),
        ("70 +", 70, 116),
        (">70", 70, 116),
        ("60 or more", 60, 116),
        ("60 and over", 60, 116),
        ("under 3", 0, 3),
    ],
)
def test_an_age_range_is_not_an_age(folder: Path, text: str, low: float, high: float) -> None:
    rows, notes = rows_and_notes(folder, f'key,age,gender\na.jpg,"{text}",male\nsub/b.png,30,\n')

    assert said(rows, "age", "age_low", "age_high", "gender", "error") == [
        ("a.jpg", None, low, high, "male", None, "ok"),
        ("sub/b.png", 30.0, None, None, None, None, "ok"),
    ]
    assert notes == []


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (",25,32", (None, 25.0, 32.0, None)),
        (",60,", (None, 60.0, 116.0, None)),
        (",,2", (None, 0.0, 2.0, None)),
        ("30,25,32", (30.0, None, None, None)),
        (",30,30", (30.0, None, None, None)),
        ("25-32,25,32", (None, 25.0, 32.0, None)),
        ("30,,", (30.0, None, None, None)),
        (",32,25", (None, None, None, "age_low 32 is above age_high 25")),
        (",x,25", (None, None, None, "age_low 'x' is not a number of years")),
        (",25,130", (None, None, None, "age_high: age 130 is outside 0 to 116 years")),
        ("40,25,32", (None, None, None, "age 40 contradicts age_low and age_high, 25 to 32")),
    ],
)
def test_columns_can_give_the_range(folder: Path, values: str, kept: tuple[object, ...]) -> None:
    rows, _ = rows_and_notes(folder, f"key,age,age_low,age_high,gender\na.jpg,{values},male\nsub/b.png,,,,female\n")

    assert said(rows, "age", "age_low", "age_high", "error", "gender") == [
        ("a.jpg", *kept, "male", "ok"),
        ("sub/b.png", None, None, None, None, "female", "ok"),
    ]


@pytest.mark.parametrize(
    "header",
    ["Key,AGE,Gender,Subject,Split", " key , age, gender ,subject\t, split", "\ufeffKEY,Age,gender,subject,SPLIT"],
)
def test_columns_are_found_whatever_their_case_and_blanks(folder: Path, header: str) -> None:
    rows, notes = rows_and_notes(folder, f"{header}\na.jpg,3,male,bo,test\nsub/b.png,4,female,bo,test\n")

    assert said(rows, "age", "gender", "group_id", "split") == [
        ("a.jpg", 3.0, "male", "subject:bo", "test", "ok"),
        ("sub/b.png", 4.0, "female", "subject:bo", "test", "ok"),
    ]
    assert notes == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("genders", "gender"),
        ("gendr", "gender"),
        ("sex", "gender"),
        ("Gender_Label", "gender"),
        ("genderlabel", "gender"),
        ("ethnicity", "race"),
        ("races", "race"),
        ("race (perceived)", "race"),
        ("subject_id", "subject"),
        ("Subject-ID", "subject"),
        ("subjectID", "subject"),
        ("subject id", "subject"),
        ("person_id", "subject"),
        ("identity", "subject"),
        ("splits", "split"),
        ("data split", "split"),
        ("partition", "split"),
        ("min_age", "age_low"),
        ("ageMax", "age_high"),
    ],
)
def test_a_nearly_right_column_name_is_rejected(folder: Path, name: str, meant: str) -> None:
    assert f"{name!r} probably means {meant!r}" in refusal(folder, f"key,age,{name}\na.jpg,3,x\n")


@pytest.mark.parametrize("name", ["label_age", "ages", "age (years)", "Age Group", "years"])
def test_a_column_name_close_to_age_is_rejected(folder: Path, name: str) -> None:
    assert f"{name!r} probably means 'age'" in refusal(folder, f"key,gender,{name}\na.jpg,male,3\n")


def test_all_faults_of_the_columns_are_named_at_once(folder: Path) -> None:
    message = refusal(folder, "file,sex,person id,note,note\na.jpg,male,7,x,y\n", columns={"race": "origin"})

    assert message.endswith(
        "labels.csv has the columns file, sex, person id, note, note: 'note' and 'note' differ only in case or spaces; "
        "source.columns maps race to 'origin', which the table does not have; 'sex' probably means 'gender', 'person "
        "id' "
        "probably means 'subject' (gender= says that the table has no such column); 'key', the path of the image, is "
        "missing; add --source.columns 'key=PATHS,subject=person id,gender=sex'"
    )


def test_a_wrong_guess_about_a_column_can_be_denied(folder: Path) -> None:
    table = "key,age,person_count\na.jpg,3,7\nsub/b.png,4,7\n"
    assert "'person_count' probably means 'subject'" in refusal(folder, table)

    rows = manifest(folder, table, columns={"subject": ""})

    assert len({row["group_id"] for row in rows.values()}) == 2


def test_columns_can_have_other_names(folder: Path) -> None:
    table = "File;SEX;who;gender\na.jpg;female;7;x\nsub/b.png;male;7;y\n"

    rows = manifest(folder, table, columns={"key": "file", "gender": "sex", "subject": "who"})

    assert [row["gender"] for row in rows.values()] == ["female", "male"]
    assert len({row["group_id"] for row in rows.values()}) == 1


def test_other_columns_are_named_and_ignored(folder: Path) -> None:
    table = "key,age,note,age_group,source url,\na.jpg,3,x,y,z,\nsub/b.png,4,x,y,z,\n"

    rows, notes = rows_and_notes(folder, table)

    assert said(rows, "age") == [("a.jpg", 3.0, "ok"), ("sub/b.png", 4.0, "ok")]
    assert notes == ["labels.csv: ignoring the columns 'note', 'age_group', 'source url'"]


@pytest.mark.parametrize(
    "missing", ["nan", "NaN", "None", "NA", "n/a", "N/A", "null", "-1", "-1.0", "u", "U", "Unknown", "?", " "]
)
def test_missing_labels_are_written_in_many_ways(folder: Path, missing: str) -> None:
    blank = ",".join([missing] * 5)
    table = f"key,age,gender,race,subject,split\na.jpg,{blank}\nsub/b.png,4,male,asian,bo,val\n"

    rows, notes = rows_and_notes(folder, table)

    assert said(rows, "age", "gender", "race", "split", "error") == [
        ("a.jpg", None, None, None, None, None, "ok"),
        ("sub/b.png", 4.0, "male", "asian", "val", None, "ok"),
    ]
    assert [str(row["group_id"]).partition(":")[0] for row in rows] == ["sha256", "subject"]
    assert notes == []


def test_missing_values_can_be_set_and_codes_come_before_them(folder: Path) -> None:
    table = "key,age,gender\na.jpg, N. D. ,-1\nsub/b.png,?,1.0\n"

    rows, _ = rows_and_notes(folder, table, missing_values=["n.d.", "-1"], gender_codes={"-1": "female", "1": "male"})

    assert said(rows, "age", "gender", "error") == [
        ("a.jpg", None, "female", None, "ok"),
        ("sub/b.png", None, "male", "age '?' is not a number or a range of years", "ok"),
    ]


@pytest.mark.parametrize("codes", [{"0": "male", "1": "female"}, {"0.0": "male", "1.": "female"}])
@pytest.mark.parametrize("values", [("0", "1"), ("0.0", "1.0"), (" 0 ", "1.00"), ("Male", " FEMALE")])
def test_codes_match_as_numbers_and_words_in_any_case(
    folder: Path, codes: dict[str, str], values: tuple[str, str]
) -> None:
    rows, _ = rows_and_notes(folder, f"key,gender\na.jpg,{values[0]}\nsub/b.png,{values[1]}\n", gender_codes=codes)

    assert said(rows, "gender") == [("a.jpg", "male", "ok"), ("sub/b.png", "female", "ok")]


@pytest.mark.parametrize(
    ("codes", "genders"),
    [(None, ("male", "female")), ({"m": "female", "F": "male"}, ("female", "male"))],
    ids=["no codes", "other codes"],
)
def test_the_letters_m_and_f_are_genders_unless_they_are_configured_otherwise(
    folder: Path, codes: dict[str, str] | None, genders: tuple[str, str]
) -> None:
    rows, notes = rows_and_notes(folder, "key,gender\na.jpg,M\nsub/b.png, f \n", gender_codes=codes)

    assert said(rows, "gender") == [("a.jpg", genders[0], "ok"), ("sub/b.png", genders[1], "ok")]
    assert notes == []


def test_codes_of_a_parquet_table_of_floats_match(folder: Path) -> None:
    table = pa.table({"key": ["a.jpg", "sub/b.png"], "gender": [0.0, None], "race": [float("nan"), 2.0], "age": [3, 4]})
    pq.write_table(table, folder / "labels.parquet")

    rows = manifest_of(folder, "labels.parquet", gender_codes={"0": "male"}, race_codes={"2": "asian"})

    assert said(list(rows.values()), "age", "gender", "race") == [
        ("a.jpg", 3.0, "male", None, "ok"),
        ("sub/b.png", 4.0, None, "asian", "ok"),
    ]


@pytest.mark.parametrize(
    ("codes", "error"),
    [
        ({"m": "male", "M ": "female"}, "gender code 'M ' means 'female' and 'male': leave one out"),
        ({"Male": "female"}, "gender code 'Male' means 'female' and 'male': leave one out"),
    ],
)
def test_a_code_with_two_meanings_is_rejected(folder: Path, codes: dict[str, str], error: str) -> None:
    assert refusal(folder, "key,gender\na.jpg,m\n", gender_codes=codes) == error


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv"])
@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_are_separated_by_commas_tabs_or_semicolons(
    folder: Path, name: str, separator: str, mark: str, end: str
) -> None:
    lines = [["key", "note, or so; and", "age"], ["a.jpg", "x,y;z", "(25, 32)"], ["sub/b.png", "", "4"]]
    table = end.join(separator.join(f'"{value}"' for value in line) for line in lines)

    rows, notes = rows_and_notes(folder, f"{mark}{table}{end}{end}", name)

    assert said(rows, "age", "age_low", "age_high") == [
        ("a.jpg", None, 25.0, 32.0, "ok"),
        ("sub/b.png", 4.0, None, None, "ok"),
    ]
    assert notes == [f"{name}: ignoring the columns 'note, or so; and'"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_that_is_not_utf_8_gives_one_line(folder: Path, encoding: str) -> None:
    line, byte = {"latin-1": (2, "0xe9"), "utf-16": (1, "0xff")}[encoding]

    error = refusal(folder, "key,age\né.jpg,3\n".encode(encoding))

    assert (
        error == f"{folder / 'labels.csv'} is not UTF-8 text: line {line} has the byte {byte}; save the table as UTF-8"
    )


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (["3,male,,bo,", "3.0,MALE,,bo,"], (3.0, None, None, "male", None, None, "ok")),
        (["3,,,,", ",male,,,", ",,asian,,"], (3.0, None, None, "male", "asian", None, "ok")),
        (["3,,,,", "0-5,male,,,"], (3.0, None, None, "male", None, None, "ok")),
        (["x,male,,,", "3,,,,"], (3.0, None, None, "male", None, "age 'x' is not a number or a range of years", "ok")),
        (["3,,,,", "5,,,,"], (None, None, None, None, None, "2 label rows disagree: age is 3 and 5", "bad_label")),
        (
            ["0-2,,,,", "3-9,,,,"],
            (None, None, None, None, None, "2 label rows disagree: age is 0 to 2 and 3 to 9", "bad_label"),
        ),
        (
            ["3,male,,,", "3,,,,", "3,female,,,"],
            (None, None, None, None, None, "3 label rows disagree: gender is 'male' and 'female'", "bad_label"),
        ),
        (
            ["3,,,bo,train", "3,,,al,test"],
            (
                *(None, None, None, None, None),
                "2 label rows disagree: subject is 'bo' and 'al'; split is 'train' and 'test'",
                "bad_label",
            ),
        ),
    ],
)
def test_several_rows_of_an_image_are_merged_unless_they_disagree(
    folder: Path, lines: list[str], kept: tuple[object, ...]
) -> None:
    table = "\n".join(["key,age,gender,race,subject,split", *(f"a.jpg,{line}" for line in lines), "sub/b.png,4,,,,"])

    rows, _ = rows_and_notes(folder, table)

    assert said(rows, "age", "age_low", "age_high", "gender", "race", "error") == [
        ("a.jpg", *kept),
        ("sub/b.png", 4.0, None, None, None, None, None, "ok"),
    ]


@pytest.mark.parametrize("key", ["sub\\b.png", ".\\sub\\b.png", "./sub/b.png", "././sub/b.png", " sub/b.png "])
def test_keys_may_have_backslashes_and_begin_with_a_dot(folder: Path, key: str) -> None:
    rows, notes = rows_and_notes(folder, f"key,age\n./a.jpg,3\n{key},4\n")

    assert said(rows, "age") == [("a.jpg", 3.0, "ok"), ("sub/b.png", 4.0, "ok")]
    assert notes == []


def test_a_backslash_in_a_file_name_is_kept(folder: Path) -> None:
    (folder / "sub\\b.png").write_bytes(b"c")

    rows, _ = rows_and_notes(folder, "key,age\nsub\\b.png,3\nsub/b.png,4\na.jpg,5\n")

    assert said(rows, "age") == [("a.jpg", 5.0, "ok"), ("sub/b.png", 4.0, "ok"), ("sub\\b.png", 3.0, "ok")]


@pytest.mark.parametrize("prefix", ["C:\\faces\\", "/home/bo/faces/", "/", "../", "faces/"])
def test_a_table_whose_keys_match_no_image_is_rejected_with_examples(folder: Path, prefix: str) -> None:
    error = refusal(folder, f"key,age\n{prefix}b.png,3\n{prefix}a.jpg,3\n")

    key = f"{prefix}b.png"
    assert error == (
        f"no key of labels.csv matches an image below {folder}: a key is {key!r}, and an image is 'sub/b.png'; "
        "a key is the path of an image below source.uri, in the same upper and lower case"
    )


def test_if_few_keys_are_images_the_warning_says_how_keys_match(folder: Path) -> None:
    rows, notes = rows_and_notes(folder, "key,age\na.jpg,3\n/x/b.png,4\n/x/c.png,5\n/x/d.png,6\n../e.png,7\n")

    assert said(rows, "age") == [
        ("../e.png", 7.0, "missing"),
        ("/x/b.png", 4.0, "missing"),
        ("/x/c.png", 5.0, "missing"),
        ("/x/d.png", 6.0, "missing"),
        ("a.jpg", 3.0, "ok"),
        ("sub/b.png", None, "bad_label"),
    ]
    assert notes == [
        "labels.csv: labelled images that do not exist: 4 ('/x/b.png', '/x/c.png', '/x/d.png', ...)",
        "labels.csv: images without a label row: 1 ('sub/b.png')",
        "labels.csv: most keys match no image: a key is '/x/b.png', and an image is 'sub/b.png'; "
        "a key is the path of an image below source.uri, in the same upper and lower case",
    ]


def test_keys_that_differ_only_in_case_are_named(folder: Path) -> None:
    rows, notes = rows_and_notes(folder, "key,age\na.jpg,3\nSub\\B.PNG,4\n")

    assert said(rows, "age") == [("Sub/B.PNG", 4.0, "missing"), ("a.jpg", 3.0, "ok"), ("sub/b.png", None, "bad_label")]
    assert notes == [
        "labels.csv: labelled images that do not exist: 1 ('Sub\\\\B.PNG')",
        "labels.csv: images without a label row: 1 ('sub/b.png')",
        "labels.csv: keys that differ from an image's only in case or Unicode form: 1 ('Sub\\\\B.PNG' for 'sub/b.png')",
    ]


def test_an_empty_folder_with_labels_is_rejected(tmp_path: Path) -> None:
    assert refusal(tmp_path, "key,age\na.jpg,3\n") == (
        f"source.uri {tmp_path}: there is no image below it, and labels.csv labels 1"
    )


def test_a_folder_must_have_exactly_one_label_table(folder: Path) -> None:
    with pytest.raises(
        LabelTableError, match=r"there is no labels\.parquet, labels\.csv or labels\.tsv in .*; add one, or name"
    ):
        find_labels(Storage(), str(folder))

    (folder / "labels.csv").write_text("key,age\na.jpg,3\n")
    assert find_labels(Storage(), str(folder)) == str(folder / "labels.csv")

    pq.write_table(pa.table({"key": ["a.jpg"], "age": [4]}), folder / "labels.parquet")
    with pytest.raises(LabelTableError) as caught:
        find_labels(Storage(), str(folder))
    assert str(caught.value) == (
        f"source.labels: there are several label tables, {folder / 'labels.parquet'} and {folder / 'labels.csv'}; "
        "name the one to use"
    )


def test_an_image_without_a_label_row_is_rejected_and_a_label_without_an_image_missing(folder: Path) -> None:
    rows = manifest(folder, "key,age\na.jpg,3\ngone.jpg,4\n")

    assert (rows["sub/b.png"]["status"], rows["sub/b.png"]["error"]) == ("bad_label", "no label row in labels.csv")
    assert (rows["gone.jpg"]["status"], rows["gone.jpg"]["group_id"]) == ("missing", None)
    assert len(rows) == 3


def test_a_labelled_file_of_any_ending_is_an_image(folder: Path) -> None:
    (folder / "c.heic").write_bytes(b"c")

    assert manifest(folder, "key,age\nc.heic,3\n")["c.heic"]["status"] == "ok"


def test_rows_that_agree_count_once_and_rows_that_disagree_reject(folder: Path) -> None:
    rows = manifest(folder, "key,age\na.jpg,3\na.jpg,3.0\nsub/b.png,4\nsub/b.png,5\n")

    assert labels(rows["a.jpg"]) == (3.0, None, None, "ok")
    assert rows["sub/b.png"]["error"] == "2 label rows disagree: age is 4 and 5"


def test_subjects_and_splits_are_copied_as_text(folder: Path) -> None:
    rows = manifest(folder, "key,age,subject,split\na.jpg,3,007,TEST\nsub/b.png,4,,\n")

    assert (rows["a.jpg"]["group_id"], rows["a.jpg"]["split"]) == ("subject:007", "test")
    assert str(rows["sub/b.png"]["group_id"]).startswith("sha256:")


def test_a_subject_written_as_float_and_integer_is_one_subject(folder: Path) -> None:
    rows, _ = rows_and_notes(folder, "key,age,subject\na.jpg,3,7.0\nsub/b.png,4, 7\n")

    assert [row["group_id"] for row in rows] == ["subject:7", "subject:7"]


def test_an_unknown_split_is_rejected(folder: Path) -> None:
    row = manifest(folder, "key,age,split\na.jpg,3,dev\n")["a.jpg"]

    assert "split 'dev' is not understood: expected one of train, val, test" in str(row["error"])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("name,age\na.jpg,3\n", "'key', the path of the image, is missing"),
        ("key,height\na.jpg,3\n", "at least one of age, age_low, age_high, gender, race"),
        ("key,age_low\na.jpg,3\n", "age_low and age_high must be given together"),
        ("key,age\n", "has no rows"),
        ("key,age,age\na.jpg,3,4\n", "'age' and 'age' differ only"),
        ("key,age,Age \na.jpg,3,4\n", "columns key, age, Age : 'age' and 'Age ' differ only in case or spaces"),
        ("key,age\na.jpg,3,4\n", "can't be read as CSV: line 2 has 3 values for 2 columns"),
        ('key,age\na.jpg,"3\n', "can't be read as CSV: line 2"),
        ("", "can't be read as CSV"),
        ("key,age\n,3\n", "row 1 has no key"),
    ],
)
def test_an_unusable_table_gives_one_line(folder: Path, table: str, said: str) -> None:
    with pytest.raises(LabelTableError, match=said) as caught:
        manifest(folder, table)

    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_table_is_named_in_the_error(folder: Path) -> None:
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


def test_a_table_of_another_name_is_named_with_its_option(folder: Path) -> None:
    (folder / "export.csv").write_text("key,age\na.jpg,3\n")

    with pytest.raises(
        LabelTableError, match=r"; the folder has export\.csv; name it, such as --source\.labels export\.cs"
    ):
        find_labels(Storage(), str(folder))


def test_a_table_is_also_looked_up_in_the_folder_of_the_images(folder: Path) -> None:
    (folder / "export.csv").write_text("key,age\na.jpg,3\n")

    assert given_labels(Storage(), str(folder), "export.csv") == str(folder / "export.csv")
    assert given_labels(Storage(), str(folder), "gone.csv") == str(Path("gone.csv").absolute())


@pytest.mark.parametrize("column", ["gender", "race"])
def test_a_column_of_mostly_invalid_values_is_an_error_that_names_the_option(folder: Path, column: str) -> None:
    valid = {"gender": "male", "race": "white"}[column]
    lines = ["a.jpg," + ("weiss" if number < 7 else valid) for number in range(12)]

    error = refusal(folder, "\n".join([f"key,{column}", *lines]))

    assert f"labels.csv: 7 of 12 values of {column} are not understood ('weiss'): expected" in error
    assert f"--source.{column}_codes weiss=" in error
    assert f"ignore the column with --source.columns {column}=" in error


def test_half_of_the_values_may_be_invalid(folder: Path) -> None:
    lines = ["a.jpg," + ("weiss" if number < 6 else "white") for number in range(12)]

    _, notes = rows_and_notes(folder, "\n".join(["key,race", *lines, "sub/b.png,white"]))

    assert notes == [
        "labels.csv: invalid values of race, dropped: 6 ('weiss'); --source.race_codes says what they mean"
    ]

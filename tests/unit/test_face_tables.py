"""Image rows become rows of faces and rejects, and counts of both."""

from __future__ import annotations

import datetime
import math
from typing import Any

import pyarrow as pa
import pytest

from agr_ray.labels import UTKFACE
from agr_ray.schema import FACES, IMAGES, REJECTS
from agr_ray.tables.demographics import demographics
from agr_ray.tables.face_rows import count_faces, count_images, explode_faces, select_rejects, sum_counts


def face(age: float | None, gender: str | None, race: str | None, **others: Any) -> dict[str, Any]:
    return {"age": age, "gender": gender, "race": race, "flags": [], "abstain": []} | others


def image(name: str, status: str = "ok", faces: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "image_id": name,
        "uri": f"s3://bucket/{name}",
        "status": status,
        "faces": faces or [],
        "run_id": "run",
        "model_digest": "model",
        "config_digest": "config",
        "calibrated": False,
        "detector": "mtcnn",
        "scored_at": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "schema_version": 1,
    }


ROWS = [
    image("two", faces=[face(10.4, "male", "asian"), face(10.5, "female", "white", flags=["small"])]),
    image("none", "no_face"),
    image("broken", "unreadable"),
    image("one", faces=[face(10.0, "male", "asian", abstain=["race"])]),
    image("ages only", faces=[face(85.0, None, None)]),
]


@pytest.fixture(params=["one chunk", "sliced"])
def images(request: pytest.FixtureRequest) -> pa.Table:
    if request.param == "one chunk":
        return pa.Table.from_pylist(ROWS, schema=IMAGES)
    return pa.Table.from_pylist([ROWS[0], *ROWS, ROWS[0]], schema=IMAGES).slice(1, len(ROWS))


def test_every_face_is_a_row_with_its_image_id(images: pa.Table) -> None:
    faces = explode_faces(images)

    assert faces.schema.equals(FACES)
    rows = [(row["image_id"], row["face_index"], row["age"]) for row in faces.to_pylist()]
    assert rows == [("two", 0, pytest.approx(10.4)), ("two", 1, 10.5), ("one", 0, 10.0), ("ages only", 0, 85.0)]


def test_columns_of_the_image_can_be_copied(images: pa.Table) -> None:
    images = images.append_column("day", pa.array(["1", "2", "3", "4", "5"]))

    assert explode_faces(images, ("day",))["day"].to_pylist() == ["1", "1", "4", "5"]


def test_no_image_gives_no_face_but_all_columns() -> None:
    assert explode_faces(IMAGES.empty_table()).schema.equals(FACES)


def test_rejects_are_the_images_that_could_not_be_scored(images: pa.Table) -> None:
    rejects = select_rejects(images)

    assert rejects.schema.equals(REJECTS)
    assert rejects["image_id"].to_pylist() == ["broken"]


def test_flagged_faces_are_not_counted_and_abstained_attributes_count_as_such(images: pa.Table) -> None:
    counted = count_faces(explode_faces(images), (), UTKFACE).to_pylist()

    cells = {(row["age_group"], row["gender"], row["race"]): row["n"] for row in counted}
    assert cells == {
        ("0-10", "male", "asian"): 1,
        ("0-10", "male", "abstained"): 1,
        ("81+", "abstained", "abstained"): 1,
    }


def test_a_face_without_an_age_counts_in_no_age_group() -> None:
    faces = [face(math.nan, "male", "asian"), face(None, "male", "asian"), face(30.0, "male", "asian")]
    images = pa.Table.from_pylist([image("three", faces=faces)], schema=IMAGES)

    counted = count_faces(explode_faces(images), (), UTKFACE)

    rows = [(row["age_group"], row["gender"], row["n"]) for row in counted.to_pylist()]
    assert sorted(rows) == [("21-30", "male", 1), ("abstained", "male", 2)]
    groups = count_images(images, explode_faces(images), ())
    joint = demographics(counted, groups, None, UTKFACE.classes).to_pylist()[-1]
    assert joint["num_faces"] == 3
    assert joint["num_abstained"] == 2


def test_images_and_faces_are_counted_by_group(images: pa.Table) -> None:
    images = images.append_column("day", pa.array(["mon", "mon", "tue", "tue", None]))

    rows = count_images(images, explode_faces(images, ("day",)), ("day",)).to_pylist()
    counted = {row.pop("day"): row for row in rows}

    names = ("num_images", "num_no_face", "num_rejected", "num_faces", "num_flagged", "num_abstained")
    assert {day: tuple(row[name] for name in names) for day, row in counted.items()} == {
        "mon": (2, 1, 0, 2, 1, 0),
        "tue": (2, 0, 1, 1, 0, 1),
        None: (1, 0, 0, 1, 0, 0),
    }


def test_counts_of_several_files_add_up(images: pa.Table) -> None:
    one = count_faces(explode_faces(images), (), UTKFACE)

    added = sum_counts([one, one], ["age_group", "gender", "race"])

    assert sorted(row["n"] for row in added.to_pylist()) == [2, 2, 2]


def test_counts_without_groups_add_up_to_one_row(images: pa.Table) -> None:
    counted = count_images(images, explode_faces(images), ())

    assert (counted.num_rows, counted["num_images"].to_pylist(), counted["num_faces"].to_pylist()) == (1, [5], [4])

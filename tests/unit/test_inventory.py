"""S3 inventories, in both formats, on the local disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inventories import entry, write_inventory

from agr_ray.data.inventory import InventoryError, read_inventory
from agr_ray.storage import Storage

ODD_KEYS = ["a b.jpg", "ünï/日本.jpg", "p%20q%.jpg", "a+b.jpg", "e=1/f.jpg", "d//e.jpg", '/q"u,o.jpg', "new\nline.jpg"]


def objects(uri: str) -> list[dict[str, Any]]:
    return [row for batch in read_inventory(Storage(), uri) for row in batch.to_pylist()]


@pytest.mark.parametrize("file_format", ["CSV", "Parquet"])
def test_objects_of_all_data_files_are_listed_in_order(tmp_path: Path, file_format: str) -> None:
    files = [[entry(key) for key in ODD_KEYS], [entry("last.jpg", e_tag='"quoted-2"', storage_class="GLACIER")]]
    uri = write_inventory(Storage(), str(tmp_path), files, file_format)

    found = objects(uri)

    assert [row["key"] for row in found] == [*ODD_KEYS, "last.jpg"]
    assert [row["uri"] for row in found] == [f"s3://photos/{key}" for key in [*ODD_KEYS, "last.jpg"]]
    first = {"uri": "s3://photos/a b.jpg", "key": "a b.jpg", "etag": "e" * 32, "size_bytes": 7}
    assert found[0] == first | {"storage_class": "STANDARD"}
    assert (found[-1]["etag"], found[-1]["storage_class"]) == ("quoted-2", "GLACIER")


@pytest.mark.parametrize("file_format", ["CSV", "Parquet"])
def test_old_versions_delete_markers_and_folders_are_no_objects(tmp_path: Path, file_format: str) -> None:
    entries = [
        entry("old.jpg", is_latest=False),
        entry("gone.jpg", is_delete_marker=True, size=None, e_tag=None),
        entry("folder/", size=0),
        entry("kept.jpg"),
    ]

    assert [row["key"] for row in objects(write_inventory(Storage(), str(tmp_path), [entries], file_format))] == [
        "kept.jpg"
    ]


@pytest.mark.parametrize("file_format", ["CSV", "Parquet"])
def test_an_inventory_of_current_versions_has_no_version_columns(tmp_path: Path, file_format: str) -> None:
    versions = ("version_id", "is_latest", "is_delete_marker")
    entries = [{name: value for name, value in entry("a.jpg").items() if name not in versions}]

    assert [row["key"] for row in objects(write_inventory(Storage(), str(tmp_path), [entries], file_format))] == [
        "a.jpg"
    ]


def test_a_copy_of_the_manifest_elsewhere_in_the_bucket_has_the_same_objects(tmp_path: Path) -> None:
    storage = Storage()
    uri = write_inventory(storage, str(tmp_path), [[entry("a.jpg")], [entry("b.jpg")]], "Parquet")
    copy = storage.join(str(tmp_path), "newest", "manifest.json")
    storage.write(copy, storage.read(uri))

    assert [row["key"] for row in objects(copy)] == ["a.jpg", "b.jpg"]
    assert objects(copy) == objects(uri)


def test_an_inventory_without_objects_is_empty(tmp_path: Path) -> None:
    assert objects(write_inventory(Storage(), str(tmp_path), [[entry("a")]], "CSV", files=[])) == []


@pytest.mark.parametrize("file_format", ["CSV", "Parquet"])
def test_an_inventory_without_etags_says_which_field_to_add(tmp_path: Path, file_format: str) -> None:
    entries = [{name: value for name, value in entry("a.jpg").items() if name != "e_tag"}]

    with pytest.raises(InventoryError, match="lists no ETag: add it"):
        objects(write_inventory(Storage(), str(tmp_path), [entries], file_format))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fileFormat": "ORC"}, "fileFormat is 'ORC': allowed are CSV, Parquet"),
        ({"files": [{"name": "x"}]}, "files must be a list of tables with a key"),
        ({"files": [{"key": "inv/none.csv.gz"}]}, "data file inv/none.csv.gz does not exist"),
        ({"files": [{"key": "inv/photos/daily/data/0.csv", "MD5checksum": "0" * 32}]}, "is not the one listed"),
        ({"fileFormat": "Parquet"}, "can't be read as Parquet"),
    ],
)
def test_an_inventory_that_cannot_be_used_says_why(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    uri = write_inventory(Storage(), str(tmp_path), [[entry("a.jpg")]], "CSV", **changes)

    with pytest.raises(InventoryError, match=message):
        objects(uri)


@pytest.mark.parametrize("text", ["not json", "[]", '{"fileFormat": "CSV"}'])
def test_a_manifest_that_is_not_an_inventory_is_rejected(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)

    with pytest.raises(InventoryError, match="not an S3 Inventory"):
        objects(str(tmp_path / "manifest.json"))


def test_an_invalid_number_is_rejected_with_the_name_of_its_file(tmp_path: Path) -> None:
    uri = write_inventory(Storage(), str(tmp_path), [[entry("a.jpg", size="many")]], "CSV")

    with pytest.raises(InventoryError, match=r"0\.csv can't be read as CSV"):
        objects(uri)

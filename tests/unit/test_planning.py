"""Planning a scoring run: from a listing, a manifest or an inventory to numbered parts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inventories import entry, write_inventory

from agr_ray.config import ScoreConfig
from agr_ray.data.manifest import image_id
from agr_ray.errors import ConfigError
from agr_ray.schema import SCORE_MANIFEST
from agr_ray.scoring import planning
from agr_ray.scoring.listing import glob_expression
from agr_ray.scoring.planning import (
    SCORED,
    Plan,
    photograph_id,
    plan,
    read_counts,
    scored_ids,
)
from agr_ray.storage import MissingObject, Storage, StorageUnavailable
from agr_ray.storage.parts import PARTS_PER_FILE, read_rows

STORAGE = Storage()


def touch(folder: Path, *keys: str) -> None:
    for key in keys:
        STORAGE.write(str(folder / key), key.encode())


def batches(ids: list[str]) -> Iterator[pa.RecordBatch]:
    rows = [{"image_id": each, "is_archived": False} for each in ids]
    yield pa.RecordBatch.from_pylist(rows, schema=SCORED)


def manifest(path: Path, rows: list[dict[str, Any]]) -> str:
    STORAGE.write_table(pa.Table.from_pylist(rows), str(path))
    return str(path)


def planned(tmp_path: Path, *, scored: Any = (), scored_as: Any = None, **config: Any) -> tuple[Plan, list[Any]]:
    """Plan into a new folder; return the counts and the rows of all parts."""
    out = str(tmp_path / f"plan-{len(list(tmp_path.glob('plan-*')))}")
    made = plan(STORAGE, ScoreConfig(**config), out, scored, scored_as=scored_as)
    assert read_counts(STORAGE, out) == made
    assert made.num_listed == made.num_excluded + made.num_scored + made.num_duplicates + made.num_to_do
    return made, [row for number in range(made.num_parts) for row in read_rows(STORAGE, out, number).to_pylist()]


def names(rows: list[Any]) -> list[str]:
    return [os.path.basename(row["uri"]) for row in rows]


def test_a_folder_becomes_a_manifest_sorted_by_key(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    touch(photos, "b.jpg", "a b/ünï%20.PNG", "notes.txt", "d=1/c+.jpeg")

    made, rows = planned(tmp_path, input=str(photos))

    infos = [info for info in STORAGE.list(str(photos)) if info.key != "notes.txt"]
    assert [(row["uri"], row["etag"], row["size_bytes"]) for row in rows] == [
        (info.uri, info.etag, info.size_bytes) for info in infos
    ]
    assert [row["image_id"] for row in rows] == [image_id(f"{info.uri}\n{info.etag}") for info in infos]
    assert (made.num_listed, made.num_excluded, made.num_to_do) == (4, 1, 3)


def test_every_part_but_the_last_is_a_row_group_of_the_configured_size(tmp_path: Path) -> None:
    num_rows = 2 * PARTS_PER_FILE + 1
    uri = manifest(tmp_path / "in.parquet", [{"uri": f"s3://b/{number}.jpg"} for number in range(num_rows)])

    made = plan(STORAGE, ScoreConfig(input=uri, rows_per_file=2), str(tmp_path / "out"))

    assert made.num_parts == PARTS_PER_FILE + 1
    files = [pq.ParquetFile(tmp_path / "out" / f"parts-{number:06d}.parquet") for number in range(2)]
    sizes = [[file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] for file in files]
    assert sizes == [[2] * PARTS_PER_FILE, [1]]
    assert files[0].schema_arrow == SCORE_MANIFEST
    assert read_rows(STORAGE, str(tmp_path / "out"), PARTS_PER_FILE)["uri"].to_pylist() == [
        f"s3://b/{num_rows - 1}.jpg"
    ]


def test_rows_keep_the_order_of_the_input_over_many_batches(tmp_path: Path) -> None:
    uris = [f"s3://b/{number * 7919 % 200_000}.jpg" for number in range(200_000)]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "in.parquet")

    _, rows = planned(tmp_path, input=str(tmp_path / "in.parquet"), rows_per_file=30_000)

    assert [row["uri"] for row in rows] == uris


def test_nothing_that_matches_is_an_empty_manifest(tmp_path: Path) -> None:
    touch(tmp_path / "photos", "notes.txt")

    made, rows = planned(tmp_path, input=str(tmp_path / "photos"))

    assert (made.num_parts, made.num_to_do, made.num_excluded, rows) == (0, 0, 1, [])


def test_scored_photographs_are_skipped_unless_changed(tmp_path: Path) -> None:
    old = [{"uri": f"s3://b/{name}.jpg", "etag": "1"} for name in "abc"]
    scored = [photograph_id(row["uri"], row["etag"]) for row in old]
    uri = manifest(tmp_path / "in.parquet", [old[0], {"uri": "s3://b/b.jpg", "etag": "2"}, old[2]])

    made, rows = planned(tmp_path, input=uri, scored=batches([*scored, "of another bucket"]))

    assert [(row["uri"], row["etag"]) for row in rows] == [("s3://b/b.jpg", "2")]
    assert (made.num_scored, made.num_to_do) == (2, 1)


def test_a_ledger_may_identify_photographs_by_another_name(tmp_path: Path) -> None:
    uri = manifest(tmp_path / "in.parquet", [{"uri": "s3://b/a.jpg", "etag": "1"}, {"uri": "s3://b/b.jpg"}])
    ledger = batches([photograph_id("s3://b/a.jpg", "1")[::-1]])

    _, rows = planned(tmp_path, input=uri, scored=ledger, scored_as=lambda name: name[::-1])

    assert names(rows) == ["b.jpg"]
    assert rows[0]["image_id"] == photograph_id("s3://b/b.jpg", None)


def test_one_uri_and_etag_is_scored_once(tmp_path: Path) -> None:
    rows = [{"uri": "s3://b/a.jpg", "etag": etag} for etag in ("1", '"1"', "2", None, None)]

    made, todo = planned(tmp_path, input=manifest(tmp_path / "in.parquet", rows))

    assert [row["etag"] for row in todo] == ["1", "2", None]
    assert made.num_duplicates == 2


def test_ids_come_from_all_folders_except_those_of_rows_to_retry(tmp_path: Path) -> None:
    for run, statuses in (("run=1", ["ok", "failed", "missing"]), ("run=2", ["too_large", "changed"])):
        rows = [{"image_id": f"{run}-{status}", "status": status, "error": None} for status in statuses]
        manifest(tmp_path / run / "deep" / "part-0.parquet", rows)

    found = scored_ids(STORAGE, [str(tmp_path / name) for name in ("run=1", "run=2", "none")])

    assert [each for batch in found for each in batch["image_id"].to_pylist()] == ["run=1-ok", "run=2-too_large"]


def test_broken_result_files_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "part-0.parquet").write_bytes(b"PAR1")

    with pytest.raises(StorageUnavailable, match="can't be read"):
        list(scored_ids(STORAGE, [str(tmp_path)]))


@pytest.mark.parametrize("file_format", ["CSV", "Parquet"])
def test_an_inventory_is_planned_without_touching_its_bucket(tmp_path: Path, file_format: str) -> None:
    entries = [entry("a//b c.jpg"), entry("folder/"), entry("table.csv")]
    uri = write_inventory(STORAGE, str(tmp_path), [entries], file_format)

    made, rows = planned(tmp_path, input=uri)

    assert [row["uri"] for row in rows] == ["s3://photos/a//b c.jpg"]
    assert (made.num_listed, made.num_excluded) == (2, 1)


def test_a_manifest_may_be_a_folder_and_its_local_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        manifest(tmp_path / "in" / f"{number}.parquet", [{"uri": f"x/{number}.anything", "size_bytes": number}])

    _, rows = planned(tmp_path, input="in", input_kind="manifest")

    assert [(row["uri"], row["size_bytes"]) for row in rows] == [(f"{tmp_path}/x/{n}.anything", n) for n in range(2)]


def test_include_exclude_and_min_bytes_filter_keys_but_keep_large_files(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    touch(photos, "2025/a.jpg", "2026/b.jpg", "2026/thumbs/c.jpg", "2026/d.raw", "2026/e")
    (photos / "2026" / "huge.jpg").write_bytes(bytes(1_000_000))
    (photos / "2026" / "tiny.jpg").write_bytes(bytes(7))

    made, rows = planned(
        tmp_path, input=str(photos), include=("2026/**/*.jpg", "**/*.raw"), exclude=("**/thumbs/**",), min_bytes=8
    )

    assert names(rows) == ["b.jpg", "d.raw", "huge.jpg"]
    assert made.num_excluded == 4


def test_the_limit_counts_what_the_filters_leave_scored_or_not(tmp_path: Path) -> None:
    touch(tmp_path / "photos", "a.txt", "b.jpg", "c.txt", "d.jpg", "e.jpg")
    config = {"input": str(tmp_path / "photos"), "limit": 2}

    made, rows = planned(tmp_path, **config)
    again, none = planned(tmp_path, **config, scored=batches([row["image_id"] for row in rows]))

    assert (names(rows), made.num_listed, made.num_excluded) == (["b.jpg", "d.jpg"], 4, 2)
    assert (none, again.num_scored) == ([], 2)


@pytest.mark.parametrize(
    ("glob", "matching", "others"),
    [
        ("*.jpg", ["a.jpg", ".jpg", "n\n.jpg"], ["a/b.jpg", "a.JPG", "a.jpg.txt", "ajpg"]),
        ("**/*.jpg", ["a.jpg", "a/b.jpg", "a//b.jpg", "/a.jpg"], ["a.png"]),
        ("2026/**", ["2026/a", "2026/a\n/b"], ["2026", "2025/a"]),
        ("a/**/b", ["a/b", "a/x/y/b"], ["ab", "a/xb"]),
        ("?[0-9][!a-c]", ["日1d", "x0é"], ["/1d", "x1a", "x1/", "xad"]),
        ("[]^\\]&[[]#{x}+(y)$ .%", ["]&[#{x}+(y)$ .%", "^&[#{x}+(y)$ .%", "\\&[#{x}+(y)$ .%"], ["&[#{x}+(y)$ .%"]),
    ],
)
def test_globs_match_whole_keys(glob: str, matching: list[str], others: list[str]) -> None:
    found = pa.compute.match_substring_regex(pa.array([*matching, *others]), glob_expression(glob)).to_pylist()

    assert found == [True] * len(matching) + [False] * len(others)


@pytest.mark.parametrize("glob", ["", "a**/b", "a[bc", "[z-a]"])
def test_an_invalid_glob_is_named_with_its_key(tmp_path: Path, glob: str) -> None:
    touch(tmp_path / "photos", "a.jpg")

    with pytest.raises(ConfigError, match=rf"score\.exclude: {re.escape(repr(glob))} is not understood"):
        planned(tmp_path, input=str(tmp_path / "photos"), exclude=(glob,))


def bad_inputs(tmp_path: Path) -> dict[str, dict[str, str]]:
    (tmp_path / "x.tar").write_bytes(b"x")
    (tmp_path / "broken.parquet").write_bytes(b"x")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    return {
        "is empty": {"input": ""},
        "has the scheme 'gs'": {"input": "gs://b/c"},
        "is a file; give a folder": {"input": str(tmp_path / "x.tar")},
        "there is no such manifest": {"input": str(tmp_path / "none.parquet")},
        "there is no such inventory": {"input": str(tmp_path / "none" / "manifest.json")},
        "not an S3 Inventory": {"input": str(tmp_path / "manifest.json")},
        "Parquet": {"input": str(tmp_path / "broken.parquet")},
        "needs a .parquet file": {"input": str(tmp_path / "empty"), "input_kind": "manifest"},
        "needs the column uri and has url": {"input": manifest(tmp_path / "a.parquet", [{"url": "x"}])},
        "must not be null": {"input": manifest(tmp_path / "b.parquet", [{"uri": "s3://b/a"}, {"uri": None}])},
        "names no key": {"input": manifest(tmp_path / "e.parquet", [{"uri": "s3://b/"}])},
        "names no bucket": {"input": manifest(tmp_path / "f.parquet", [{"uri": "s3:///a"}])},
        "has the scheme 'http'": {"input": manifest(tmp_path / "c.parquet", [{"uri": "http://b/a"}])},
        "many": {"input": manifest(tmp_path / "d.parquet", [{"uri": "s3://b/a", "size_bytes": "many"}])},
    }


def test_a_wrong_kind_of_input_gives_one_line(tmp_path: Path) -> None:
    for message, config in bad_inputs(tmp_path).items():
        with pytest.raises(ConfigError, match=rf"^score\.input.*{re.escape(message)}") as caught:
            plan(STORAGE, ScoreConfig(**config), str(tmp_path / "out"))
        assert config["input"] in str(caught.value)
        assert "\n" not in str(caught.value)


def test_unusual_values_in_a_manifest_are_understood(tmp_path: Path) -> None:
    rows = [
        {"uri": "s3://b/a", "etag": ""},
        {"uri": "s3://b/c", "etag": '"x"'},
        {"uri": "file:///a%FF.jpg", "etag": None},
    ]
    _, planned_rows = planned(tmp_path, input=manifest(tmp_path / "odd.parquet", rows))
    assert [(row["uri"], row["etag"]) for row in planned_rows] == [
        ("s3://b/a", None),
        ("s3://b/c", "x"),
        ("file:///a%FF.jpg", None),
    ]


def test_groups_may_be_named_like_sql_keywords(tmp_path: Path) -> None:
    uris = [{"uri": "s3://b/a"}, {"uri": "s3://b/c"}]
    metadata = manifest(tmp_path / "metadata.parquet", [row | {"order": row["uri"][-1]} for row in uris])
    config = {"input": manifest(tmp_path / "m.parquet", uris), "metadata": metadata}
    _, rows = planned(tmp_path, group_by=("order", "group"), key_pattern="(?P<group>.)$", **config)
    assert [(row["order"], row["group"]) for row in rows] == [("a", "a"), ("c", "c")]
    with pytest.raises(ConfigError, match=r"^score\.group_by order: is named twice"):
        planned(tmp_path, group_by=("order", "Order"), **config)


@pytest.mark.parametrize(
    "name", ["age", "flags", "face_index", "uri", "n", "is_total", "Share", "run", "file_row_number"]
)
def test_a_group_with_the_name_of_a_table_column_is_rejected_before_any_work(tmp_path: Path, name: str) -> None:
    config = {"input": manifest(tmp_path / "m.parquet", [{"uri": "s3://b/a"}]), "group_by": (name,)}

    with pytest.raises(ConfigError, match=rf"^score\.group_by {name}: the tables have a column of that name"):
        planned(tmp_path, key_pattern=f"(?P<{name}>.)$", **config)


def test_more_groups_than_a_table_should_have_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MAX_GROUPS", 2)
    touch(tmp_path / "photos", "a.jpg", "b.jpg", "c.jpg")
    config = {"input": str(tmp_path / "photos"), "group_by": ("name",)}
    with pytest.raises(ConfigError, match=r"^score\.group_by name: makes 3 groups of these photographs; at most 2"):
        planned(tmp_path, key_pattern=r"(?P<name>\w+\.jpg)$", **config)
    assert planned(tmp_path, key_pattern=r"(?P<name>a)?\w*\.jpg$", **config)[0].num_to_do == 3


def test_a_manifest_is_never_replaced_and_no_temporary_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    touch(tmp_path / "photos", "a.jpg")
    config, out = ScoreConfig(input=str(tmp_path / "photos")), str(tmp_path / "out")
    seen: list[tuple[int, str]] = []

    assert read_counts(STORAGE, out) is None
    with pytest.raises(MissingObject, match=r"parts-000000\.parquet"):
        read_rows(STORAGE, out, 0)
    plan(STORAGE, config, out, progress=lambda done, remark: seen.append((done, remark)))
    with pytest.raises(FileExistsError):
        plan(STORAGE, config, out)

    assert seen[-1] == (1, "1 to do")
    assert list((tmp_path / "tmp").iterdir()) == []

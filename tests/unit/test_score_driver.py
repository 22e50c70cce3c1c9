"""A scoring job from its command to the published files, without Ray."""

from __future__ import annotations

import datetime
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import SchemaMismatchError

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from sets import chip_jpeg, with_other_weights
from this_process import ThisProcess, model, workers

from agr_ray.config import GatesConfig, ScoreConfig, ScoreJob, VisionConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_console
from agr_ray.errors import ConfigError
from agr_ray.evaluation.calibration import Calibration
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.checkpoint import CALIBRATION, read_checkpoint
from agr_ray.schema import DEMOGRAPHICS, FACES, IMAGES, REJECTS
from agr_ray.scoring import driver, grouping, unpublished
from agr_ray.scoring import publish as publishing
from agr_ray.scoring.driver import score_input
from agr_ray.scoring.planning import Plan
from agr_ray.scoring.refusals import Refusals, TooManyRefused
from agr_ray.storage import ArchivedObject, ServerFailed, Storage, StorageError, StorageFailed
from agr_ray.storage.lock import LockLost
from agr_ray.storage.parts import Parts
from agr_ray.vision.decode import decode_image, encode_jpeg

__all__ = ["model", "workers"]  # fixtures
NAMES = [f"{number}.jpg" for number in range(6)]


class Bucket:
    """A folder of photographs and its output."""

    def __init__(self, folder: Path, model: Path, workers: ThisProcess) -> None:
        self.folder = folder
        self.input, self.out = folder / "in", folder / "out"
        self._model = model
        self._workers = workers
        self.printed = ""
        self.put(*NAMES)

    def put(self, *keys: str, seed: int = 0) -> None:
        for number, key in enumerate(keys):
            path = self.input / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(chip_jpeg(number, seed))

    def job(self, **changes: Any) -> ScoreJob:
        settings = {"checkpoint": str(self._model), "input": str(self.input), "out": str(self.out), "rows_per_file": 2}
        gates = changes.pop("gates", GatesConfig())
        score = ScoreConfig(**settings | {"batch_size": 2, "outage_s": 0.0} | changes)
        return ScoreJob(vision=VisionConfig(detector="haar"), gates=gates, score=score)

    def score(self, **changes: Any) -> dict[str, Any]:
        log = io.StringIO()
        try:
            return score_input(self.job(**changes), self._workers, make_console(log))
        finally:
            self.printed = log.getvalue()

    def rows(self) -> list[dict[str, Any]]:
        """Return what someone sees who reads the whole folder."""
        return pq.read_table(self.out / "images", partitioning=None).to_pylist() if self.out.exists() else []

    def statuses(self) -> list[tuple[str, str]]:
        return sorted((os.path.basename(row["uri"]), row["status"]) for row in self.rows())

    def query(self, sql: str) -> list[Any]:
        with duckdb.connect() as database:
            database.execute((self.out / "views.sql").read_text())
            return database.sql(sql).fetchall()


@pytest.fixture
def bucket(tmp_path: Path, model: Path, workers: ThisProcess) -> Bucket:
    return Bucket(tmp_path, model, workers)


def refuse(monkeypatch: pytest.MonkeyPatch, refuses: Callable[[str], bool], error: type[Exception]) -> None:
    """Make storage refuse photographs."""
    read = Storage.read

    def read_or_refuse(storage: Storage, uri: str, **kwargs: Any) -> bytes:
        if uri.endswith(".jpg") and refuses(os.path.basename(uri)):
            raise error(f"{uri}: AccessDenied: request {abs(hash(uri))} was denied")
        return read(storage, uri, **kwargs)

    monkeypatch.setattr(Storage, "read", read_or_refuse)


# The same command finishes


@pytest.mark.parametrize("name", sorted({*DEMOGRAPHICS.names, *FACES.names, *IMAGES.names, *REJECTS.names, "run"}))
@pytest.mark.parametrize("spell", [str, str.upper])
def test_a_group_with_the_name_of_a_column_is_rejected_before_scoring(
    bucket: Bucket, name: str, spell: Callable[[str], str]
) -> None:
    with pytest.raises(ConfigError, match=rf"^score\.group_by {spell(name)}: the tables have a column of that name"):
        grouping.check_grouping(bucket.job(group_by=(spell(name),), metadata="m.parquet").score)


@pytest.mark.parametrize(
    "name", ["key", "position", "listed_order", "file_row_number", "scored_id", "num_rows", "listed"]
)
def test_a_group_with_the_name_of_a_planning_column_is_rejected_or_works(bucket: Bucket, name: str) -> None:
    try:
        record = bucket.score(group_by=(name,), key_pattern=rf"(?P<{name}>\d)\.jpg$")
    except ConfigError as error:
        assert str(error).startswith(f"score.group_by {name}: the tables have a column of that name")  # noqa: PT017
        return
    assert record["num_images"] == len(NAMES)
    sql = f"SELECT \"{name}\", num_images FROM demographics WHERE NOT is_total AND breakdown = 'gender' GROUP BY ALL"
    assert sorted(bucket.query(sql)) == [(str(number), 1) for number in range(len(NAMES))]


def test_an_undeletable_work_folder_fails_neither_this_run_nor_the_next(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete_tree = Storage.delete_tree

    def refuse_work(storage: Storage, uri: str) -> None:
        if "out-work" in uri:
            raise StorageFailed(f"{uri}: MissingContentMD5")
        delete_tree(storage, uri)

    monkeypatch.setattr(Storage, "delete_tree", refuse_work)
    assert bucket.score()["num_images"] == len(NAMES)
    assert "warning: the run's work" in bucket.printed
    assert "MissingContentMD5" in bucket.printed

    bucket.put("6.jpg", seed=1)
    last = bucket.score()
    assert last["num_images"] == 1
    assert bucket.score() == last
    assert [name for name, _ in bucket.statuses()] == [*NAMES, "6.jpg"]


def test_weights_that_do_not_fit_the_network_end_the_job_in_one_line(bucket: Bucket, model: Path) -> None:
    bucket._model = with_other_weights(model, bucket.folder / "other")
    bucket._workers = ThisProcess()
    with pytest.raises(ConfigError) as raised:
        bucket.score()
    message = str(raised.value)
    assert message.startswith(f"score.checkpoint {bucket._model}: ")
    assert message.endswith("weights.safetensors: heads.race.layer.bias: expected shape [5], found [7]")
    assert sorted(path.name for path in bucket.folder.iterdir()) == ["in", "other"]


# One driver for each output


def test_the_same_relative_path_in_two_folders_is_two_inputs(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Bucket(bucket.folder / "elsewhere", bucket._model, bucket._workers)
    (elsewhere.input / "5.jpg").unlink()
    monkeypatch.chdir(bucket.folder)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bucket.score(input="in")

    monkeypatch.chdir(elsewhere.folder)
    bucket.score(input="in")

    assert [row["uri"] for row in bucket.rows()] == [str(elsewhere.input / name) for name in NAMES[:5]]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_killed_run_is_planned_again_if_another_was_published_since(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(driver, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bucket.score()

    assert bucket.score(limit=3)["num_images"] == 3
    assert bucket.score()["num_images"] == len(NAMES) - 3

    uris = [row["uri"] for row in bucket.rows()]
    assert sorted(uris) == sorted(str(bucket.input / name) for name in NAMES)
    published = [json.loads(path.read_text())["run_id"] for path in (bucket.out / "_SUCCESS").iterdir()]
    assert len(published) == 2
    assert sorted(uri for (uri,) in bucket.query("SELECT uri FROM images")) == sorted(uris)


@pytest.mark.parametrize("out", ["s3://results", "s3://results/"])
def test_a_whole_bucket_as_output_is_rejected(bucket: Bucket, out: str) -> None:
    with pytest.raises(ConfigError, match=r"^score\.out s3://results/?: is a whole bucket; give a prefix"):
        bucket.score(out=out)


def test_a_job_that_loses_its_lock_while_it_plans_stops_and_leaves_no_plan(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = unpublished.plan

    def plan_and_lose(*args: Any, progress: Any, **kwargs: Any) -> Any:
        progress(0, "")
        lock = bucket.folder / "out-work" / "lock.json"
        record = json.loads(lock.read_text())
        lock.write_text(json.dumps(record | {"token": "of another job"}))
        until = datetime.datetime.now() + datetime.timedelta(seconds=10)
        while datetime.datetime.now() < until:
            progress(1, "")
        return plan(*args, progress=progress, **kwargs)

    monkeypatch.setattr(unpublished, "plan", plan_and_lose)
    with pytest.raises(LockLost):
        bucket.score(lock_expiry_s=0.4)
    assert not list((bucket.folder / "out-work").rglob("plan.json"))


# Lakehouse tables


def test_a_run_whose_table_fails_is_reported_and_committed_by_the_same_command(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agr_ray.storage.retry._RETRY_S", 0.01)
    bucket.score(table="delta")
    bucket.put("new.jpg", seed=1)
    num_attempts, finished = 0, []
    create = DeltaTable.create_write_transaction

    def refuse_commits(*args: Any, **kwargs: Any) -> None:
        nonlocal num_attempts
        num_attempts += 1
        raise SchemaMismatchError("Cannot merge types long and string")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", refuse_commits)
    monkeypatch.setattr(ThisProcess, "finished", lambda _, record: finished.append(record["run_id"]))

    with pytest.raises(StorageError, match=r"demographics: can't be read or written: SchemaMismatchError: ") as caught:
        bucket.score(table="delta", outage_s=60.0)

    (run_id,) = finished
    assert num_attempts == 1  # not retried, though outages are
    assert str(caught.value).endswith(
        f"; run={run_id} is published, and the same command commits it to the delta tables"
    )
    assert "\n" not in str(caught.value)
    assert f"{bucket.out} run={run_id}" in bucket.printed.splitlines()  # of the summary
    assert "workers' time: " in bucket.printed
    assert [row["run_id"] for row in bucket.rows()].count(run_id) == 1

    monkeypatch.setattr(DeltaTable, "create_write_transaction", create)
    assert bucket.score(table="delta")["run_id"] == run_id
    assert f"committed to the delta tables: {run_id}" in bucket.printed
    assert "nothing new since" in bucket.printed
    assert DeltaTable(bucket.out / "images").to_pyarrow_table()["run_id"].to_pylist().count(run_id) == 1


def test_an_outage_of_a_table_is_waited_for(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agr_ray.storage.retry._RETRY_S", 0.01)
    create, num_attempts = DeltaTable.create_write_transaction, 0

    def fail_twice(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_attempts
        num_attempts += 1
        if num_attempts <= 2:
            raise OSError("Generic S3 error: Server returned non-2xx status code: 503 Service Unavailable")
        return create(*args, **kwargs)

    monkeypatch.setattr(DeltaTable, "create_write_transaction", fail_twice)

    record = bucket.score(table="delta", outage_s=60.0)

    assert num_attempts == 2 + 4  # one for each table
    assert f"committed to the delta tables: {record['run_id']}" in bucket.printed


def test_the_records_of_published_runs_are_read_once(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        bucket.put("new.jpg", seed=seed)
        bucket.score(table="delta")
    bucket.put("new.jpg", seed=2)
    read, num_reads = Storage.read, Counter[str]()

    def counted(storage: Storage, uri: str, **kwargs: Any) -> bytes:
        num_reads[uri] += 1
        return read(storage, uri, **kwargs)

    monkeypatch.setattr(Storage, "read", counted)

    bucket.score(table="delta")

    assert [number for uri, number in num_reads.items() if "/_SUCCESS/" in uri] == [1, 1]


def test_workers_learn_that_nothing_was_new(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[str] = []
    monkeypatch.setattr(ThisProcess, "finished", lambda _, record: finished.append(record["run_id"]))

    records = [bucket.score() for _ in range(2)]

    assert finished == [record["run_id"] for record in records]


def test_a_published_run_leaves_no_work_folder(bucket: Bucket) -> None:
    bucket.score()
    assert not (bucket.folder / "out-work").exists()


def test_a_plan_that_another_job_has_deleted_is_planned_again(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_score_parts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bucket.score()
    (record,) = (bucket.folder / "out-work").glob("*/plan.json")
    stale = json.loads(record.read_text()) | {"plan_id": "20260101T000000.000Z-00000000"}
    record.write_text(json.dumps(stale))

    bucket.score()

    assert "the plan 20260101T000000.000Z-00000000 is gone; planning again" in bucket.printed
    assert [name for name, _ in bucket.statuses()] == NAMES


# Readers see each published row once


@pytest.mark.parametrize("next_run", [{}, {"gates": GatesConfig(min_side_px=9)}, {"limit": 4}])
@pytest.mark.parametrize("killed_before", ["views.sql", "_SUCCESS", "images", "demographics"])
def test_leftovers_of_a_killed_publication_are_deleted_by_the_next_job(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, killed_before: str, next_run: dict[str, Any]
) -> None:
    write, move = Storage.write, Storage.move_tree

    def write_or_die(storage: Storage, uri: str, data: bytes, **kwargs: Any) -> str:
        return interrupt() if killed_before in uri else write(storage, uri, data, **kwargs)  # type: ignore[return-value]

    def move_or_die(storage: Storage, source: str, target: str) -> None:
        return interrupt() if killed_before in target else move(storage, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", write_or_die)
        patch.setattr(Storage, "move_tree", move_or_die)
        patch.setattr(Storage, "move", move_or_die)
        with pytest.raises(KeyboardInterrupt):
            bucket.score()

    record = bucket.score(**next_run)

    num_images = next_run.get("limit", len(NAMES))
    assert [name for name, _ in bucket.statuses()] == NAMES[:num_images]
    assert [row["run_id"] for row in bucket.rows()] == [record["run_id"]] * num_images
    for table in ("images", "faces", "rejects", "demographics"):
        assert [path.name for path in (bucket.out / table).iterdir()] == [f"run={record['run_id']}"]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_suspended_job_cannot_publish_after_another_has_run(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, *, is_first: bool
) -> None:
    move, others = Storage.move, []

    def stopped_meanwhile(storage: Storage, source: str, target: str) -> None:
        if is_first:  # the other job has only begun
            publishing.withdraw_waiting(storage, str(bucket.out))
            publishing.delete_unpublished(storage, str(bucket.out))
        else:
            (bucket.out.parent / f"{bucket.out.name}-work" / "lock.json").unlink()  # it has expired
            with monkeypatch.context() as patch:
                patch.setattr(Storage, "move", move)
                others.append(bucket.score(gates=GatesConfig(min_side_px=9))["run_id"])
        move(storage, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "move", stopped_meanwhile)
        with pytest.raises(LockLost):
            bucket.score()
    last = bucket.score()["run_id"]

    for table in ("images", "faces", "rejects", "demographics"):
        assert sorted(path.name for path in (bucket.out / table).iterdir()) == [
            f"run={each}" for each in [*others, last]
        ]
    assert sorted(path.stem for path in (bucket.out / "_SUCCESS").iterdir()) == [
        f"run={each}" for each in [*others, last]
    ]
    assert [path.name for path in bucket.out.parent.glob("*-work/publishing/*")] == []


def test_a_newer_row_without_content_does_not_hide_an_older_one(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.score()
    before = bucket.query("SELECT uri, status FROM images ORDER BY uri")
    num_faces = bucket.query("SELECT count(*) FROM faces")
    assert num_faces != [(0,)]
    refuse(monkeypatch, lambda name: name in NAMES[:3], StorageFailed)

    bucket.score(gates=GatesConfig(min_side_px=9), max_refused=1.0)

    assert sorted(status for _, status in bucket.statuses()).count("failed") == 3
    assert bucket.query("SELECT uri, status FROM images ORDER BY uri") == before
    assert bucket.query("SELECT count(*) FROM faces") == num_faces
    assert bucket.query("SELECT * FROM rejects") == []


# Doing nothing is not success, unless everything is done


def test_a_run_with_nothing_new_publishes_nothing_and_says_so(bucket: Bucket) -> None:
    first = bucket.score()
    files = sorted(bucket.out.rglob("*"))

    again = bucket.score()

    assert again == first
    said = f"nothing new since run {first['run_id']}: {len(NAMES)} photographs are scored already"
    assert bucket.printed.splitlines()[-2] == said
    assert sorted(bucket.out.rglob("*")) == files
    assert not (bucket.folder / "out-work").exists()
    bucket.score(allow_empty=True)
    assert sorted(bucket.out.rglob("*")) == files


def test_a_run_with_nothing_new_and_hidden_counts_gives_no_number(bucket: Bucket) -> None:
    first = bucket.score(min_cell=3)

    bucket.score(min_cell=3)

    assert bucket.printed.splitlines()[-2] == (
        f"nothing new since run {first['run_id']}: all photographs are scored already"
    )


def test_an_empty_input_is_rejected_unless_allowed(bucket: Bucket) -> None:
    empty = bucket.folder / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"^score\.input .*empty: there is no image in this folder; --allow-em"):
        bucket.score(input=str(empty))
    with pytest.raises(ConfigError, match=r"nowhere: there is no such folder$"):
        bucket.score(input=str(bucket.folder / "nowhere"))
    assert not bucket.out.exists()
    assert not (bucket.folder / "out-work").exists()

    assert bucket.score(input=str(empty), allow_empty=True)["num_images"] == 0


def test_the_error_of_an_input_without_photographs_names_its_endings_and_include(bucket: Bucket) -> None:
    odd = bucket.folder / "odd"
    for key in ("a.txt", "b.TXT", "uploads/ab12cd", "c.d/x"):
        (odd / key).parent.mkdir(parents=True, exist_ok=True)
        (odd / key).write_bytes((bucket.input / NAMES[0]).read_bytes())
    with pytest.raises(
        ConfigError, match=r"none of its 4 keys .*: 2 end in \.txt, 2 have no ending; score\.include selects"
    ):
        bucket.score(input=str(odd))

    assert bucket.score(input=str(odd), include=("**",))["num_images"] == 4


def test_the_number_of_ignored_keys_is_printed_by_ending(bucket: Bucket) -> None:
    for key in ("a.txt", "b.md", "c.md", "d"):
        (bucket.input / key).write_text("no photograph")

    record = bucket.score()

    assert "left out: 2 end in .md, 1 end in .txt, 1 have no ending; score.include" in bucket.printed
    assert record["plan"]["endings_left_out"] == {".md": 2, ".txt": 1, "": 1}


@pytest.mark.parametrize("error", [StorageFailed, ServerFailed])
def test_a_mostly_refused_run_publishes_nothing_and_can_be_repeated_after_a_fix(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, lambda name: name in NAMES[:4], error)
        with pytest.raises(TooManyRefused, match=r"^score\.input .*: 4 of 6 photographs .*: failed: AccessDenied"):
            bucket.score()
    assert not bucket.out.exists()

    assert bucket.score()["counts"].keys() <= {"ok", "no_face"}
    assert [name for name, _ in bucket.statuses()] == NAMES


def test_a_few_refused_photographs_become_rows_and_the_rest_is_published(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, lambda name: name in NAMES[2:4], StorageFailed)
        record = bucket.score()
        assert record["counts"]["failed"] == 2
        # The only ones that are left to do are refused again, but not most of the input.
        assert bucket.score()["counts"] == {"failed": 2}

    assert bucket.score()["num_images"] == 2


def test_files_that_are_not_photographs_are_rejected_as_a_whole(bucket: Bucket) -> None:
    for name in NAMES[:5]:
        (bucket.input / name).write_text("no photograph")
    with pytest.raises(TooManyRefused, match=r"5 of 6 photographs .*: not_an_image: "):
        bucket.score()
    assert bucket.score(max_refused=1.0)["counts"]["not_an_image"] == 5


def test_a_run_rejected_for_its_photographs_is_resumed_once_that_is_allowed(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES[:4]:
        (bucket.input / name).write_text("no photograph")
    with pytest.raises(TooManyRefused, match=r"4 of 6 photographs .*: not_an_image: "):
        bucket.score()

    bucket.score(max_refused=1.0)
    assert "resuming: 3 of 3 parts are done" in bucket.printed
    assert [name for name, _ in bucket.statuses()] == NAMES


def test_a_run_rejected_for_its_photographs_is_planned_again_once_they_have_changed(bucket: Bucket) -> None:
    for name in NAMES[:4]:
        (bucket.input / name).write_text("no photograph")
    with pytest.raises(TooManyRefused):
        bucket.score()
    bucket.put(*NAMES[:4], seed=3)
    assert bucket.score()["num_images"] == 6
    assert [status for _, status in bucket.statuses() if status not in ("ok", "no_face")] == []


def test_parts_without_refused_photographs_are_kept_for_the_retry(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, lambda name: name in NAMES[:4], StorageFailed)
        with pytest.raises(TooManyRefused):
            bucket.score()
    bucket.score()
    assert "resuming: 1 of 3 parts are done" in bucket.printed
    assert [name for name, _ in bucket.statuses()] == NAMES


def test_mostly_archived_photographs_do_not_prevent_publishing_the_others(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, lambda name: name in NAMES[:5], ArchivedObject)
    assert bucket.score()["counts"]["archived"] == 5


def test_an_input_with_only_archived_objects_is_rejected(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, lambda _: True, ArchivedObject)
    with pytest.raises(TooManyRefused, match=r"6 of 6 photographs .*: archived: "):
        bucket.score()


def test_the_third_most_frequent_reason_can_fail_a_run() -> None:
    made = Plan(1000, 0, 0, 0, 1000, 10, 100, {}, {})
    refusals = Refusals(ScoreConfig(input="in", max_refused=0.1), made)
    refusals.add({"archived: GLACIER": 400, "archived: DEEP_ARCHIVE": 300, "failed: AccessDenied": 200}, 1000)
    with pytest.raises(TooManyRefused, match=r"200 of 1,000 photographs .*: failed: AccessDenied"):
        refusals.check(at_end=True)


def test_leftovers_that_cannot_be_deleted_do_not_stop_a_run(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    left = bucket.out / "images" / "run=20260101T000000.000Z-0123abcd"
    left.mkdir(parents=True)
    (left / "images-00000.parquet").write_bytes(b"half")
    delete_tree = Storage.delete_tree

    def refuse_leftovers(storage: Storage, uri: str) -> None:
        if "20260101" in uri:
            raise StorageFailed(f"{uri}: no")
        delete_tree(storage, uri)

    monkeypatch.setattr(Storage, "delete_tree", refuse_leftovers)
    assert bucket.score()["num_images"] == len(NAMES)
    assert "can't be deleted" in bucket.printed


def test_bad_metadata_are_found_before_the_input_is_listed(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("listed")

    monkeypatch.setattr(Storage, "list_readable", never)
    with pytest.raises(ConfigError, match=r"^score\.metadata .*: there is no column day"):
        bucket.score(metadata=metadata(bucket, [{"uri": "a", "night": "b"}]), group_by=("day",))


@pytest.mark.parametrize("out", ["s3://", "S3://results", "s3:///x", "S3://results/"])
def test_outputs_without_a_bucket_or_prefix_are_rejected_in_any_spelling(bucket: Bucket, out: str) -> None:
    with pytest.raises(ConfigError, match=r"names no bucket|is a whole bucket"):
        bucket.score(out=out)


def test_a_rejected_run_that_was_killed_is_rejected_again(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, lambda _: True, StorageFailed)
    with monkeypatch.context() as patch:
        patch.setattr(driver.Refusals, "check", lambda *_, **__: interrupt())
        with pytest.raises(KeyboardInterrupt):
            bucket.score()
    with pytest.raises(TooManyRefused, match="6 of 6"):
        bucket.score()


def test_an_archived_photograph_is_retried_only_in_another_storage_class(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def manifest(*classes: str | None) -> str:
        infos = list(Storage().list(str(bucket.input)))
        rows = [
            {"uri": info.uri, "etag": info.etag, "storage_class": storage_class}
            for info, storage_class in zip(infos, classes, strict=True)
        ]
        path = bucket.folder / f"{'-'.join(map(str, classes))}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)

    cold = manifest("GLACIER", None, *["STANDARD"] * 4)
    with monkeypatch.context() as patch:
        refuse(patch, lambda name: name in NAMES[:2], ArchivedObject)
        assert bucket.score(input=cold)["counts"]["archived"] == 2
        bucket.score(input=cold)
        assert bucket.query("SELECT count(*) FROM runs") == [(1,)]

    assert bucket.score(input=manifest("STANDARD", None, *["STANDARD"] * 4))["num_images"] == 1
    assert bucket.score(input=manifest("STANDARD", "STANDARD_IA", *["GLACIER"] * 4))["num_images"] == 1
    assert bucket.query("SELECT count(*) FROM images WHERE status = 'archived'") == [(0,)]


# Groups from a table


def metadata(bucket: Bucket, rows: list[dict[str, Any]]) -> str:
    path = bucket.folder / "metadata.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_metadata_match_any_form_of_a_uri(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bucket.folder)
    forms = [
        f"in/{NAMES[0]}",
        f"{bucket.input}/../in/{NAMES[1]}",
        f"file://{bucket.input}/{NAMES[2]}",
        None,
        "gs://b/k",
    ]
    table = metadata(bucket, [{"uri": uri, "day": "monday"} for uri in forms])

    bucket.score(metadata=table, group_by=("day",))

    groups = "SELECT DISTINCT day, num_images FROM demographics WHERE NOT is_total ORDER BY day"
    assert bucket.query(groups) == [("monday", 3), (None, 3)]
    assert "warning" not in bucket.printed.replace("warning: no age intervals", "")


def test_metadata_that_match_few_photographs_trigger_a_warning(bucket: Bucket) -> None:
    table = metadata(bucket, [{"uri": f"/elsewhere/{name}", "day": "monday"} for name in NAMES])
    bucket.score(metadata=table, group_by=("day",))
    assert "warning: score.group_by day: only 0 of 6 photographs have a value" in bucket.printed


def test_metadata_with_two_rows_for_a_photograph_are_rejected(bucket: Bucket) -> None:
    path = bucket.input / NAMES[0]
    table = metadata(bucket, [{"uri": str(path), "day": "monday"}, {"uri": f"file://{path}", "day": "tuesday"}])
    with pytest.raises(ConfigError, match=rf"^score\.metadata .*: has 2 rows for {path}"):
        bucket.score(metadata=table, group_by=("day",))


# Privacy


def test_pseudonymised_rows_reveal_neither_the_order_of_the_keys_nor_the_input(bucket: Bucket) -> None:
    keys = [f"{number:03d}.jpg" for number in range(40)]
    for key in keys:
        (bucket.input / key).write_bytes(encode_jpeg(np.full((16, 16, 3), 99, np.uint8)) + key.encode())
    key_file = bucket.folder / "key"
    key_file.write_bytes(bytes(range(32)))

    record = bucket.score(pseudonymise=str(key_file))

    rows = bucket.rows()
    assert [row["scored_at"] for row in rows] == [rows[0]["scored_at"]] * len(rows)
    assert str(bucket.input) not in "".join(path.read_text() for path in (bucket.out / "_SUCCESS").iterdir())
    assert "input" not in record
    # Nor in which part, and so in which file, an image was.
    parts = [record for record in bucket.rows() if record]
    assert len(parts) == len(keys) + len(NAMES)


def test_parts_of_a_pseudonymised_run_are_not_in_the_order_of_the_keys(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(*(f"{number:03d}.jpg" for number in range(20)))
    key_file = bucket.folder / "key"
    key_file.write_bytes(bytes(range(32)))
    planned: list[str] = []
    begin = Parts.begin
    monkeypatch.setattr(
        Parts,
        "begin",
        lambda parts, number: planned.extend(parts.rows(number)["uri"].to_pylist()) or begin(parts, number),
    )

    bucket.score(pseudonymise=str(key_file), rows_per_file=100)

    assert len(planned) == 26
    assert planned != sorted(planned)


def test_totals_that_min_cell_withholds_are_not_printed(bucket: Bucket) -> None:
    table = metadata(bucket, [{"uri": str(bucket.input / NAMES[0]), "day": "monday"}])
    record = bucket.score(min_cell=10, metadata=table, group_by=("day",))

    assert "num_faces" not in record
    printed = bucket.printed.replace(str(bucket.folder), "").replace(record["run_id"], "")
    lines = [line for line in printed.splitlines() if not line.startswith("workers' time")]
    assert re.findall(r"\d+", "".join(lines)) == []
    assert "faces" not in bucket.printed.replace("images/ and faces/ still hold every face", "")
    assert "no_face" not in bucket.printed
    assert "withholds its totals" in bucket.printed


# Distinct faces


@pytest.fixture
def copied(bucket: Bucket) -> Bucket:
    """Add a re-encoded, slightly darker copy of each of three photographs, all of which show details."""
    for number, name in enumerate(NAMES):
        (bucket.input / name).write_bytes(chip_jpeg(number, side_px=200))
    for name in NAMES[:3]:
        image = decode_image((bucket.input / name).read_bytes()).rgb
        (bucket.input / "copies").mkdir(exist_ok=True)
        (bucket.input / "copies" / name).write_bytes(encode_jpeg((image * 0.9).astype(np.uint8), 60))
    return bucket


BY_FOLDER = {"group_by": ("folder",), "key_pattern": r"/in/(?P<folder>copies)/"}


def counts_by_folder(bucket: Bucket, name: str) -> dict[str, int]:
    """Return the sums over the genders of a column: without a folder, of the copies, and in total."""
    sql = (
        f"SELECT CASE WHEN is_total THEN 'total' ELSE coalesce(folder, 'originals') END AS label, sum({name}) "
        "FROM demographics WHERE breakdown = 'gender' GROUP BY label"
    )
    return {label: int(number) for label, number in bucket.query(sql)}


def test_near_duplicates_in_other_files_and_groups_count_once(copied: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "PARTS_PER_FILE", 1)

    record = copied.score(near_duplicates="count", **BY_FOLDER)

    num_found = counts_by_folder(copied, "n")
    assert num_found["total"] == record["num_faces"] > num_found["copies"] >= 2
    distinct = counts_by_folder(copied, "n_unique")
    assert distinct == num_found | {"total": num_found["originals"]}
    assert record["num_unique"] == num_found["originals"]
    assert re.search(rf"distinct, of those not flagged\s+.?\s+{record['num_unique']}", copied.printed)
    num_unique = copied.query("SELECT DISTINCT num_unique FROM demographics WHERE is_total")
    assert num_unique == [(record["num_unique"],)]


@pytest.mark.parametrize(("chosen", "is_published"), [("off", False), ("count", False), ("publish", True)])
def test_hashes_are_in_the_rows_only_if_they_are_to_be_published(
    copied: Bucket, chosen: str, *, is_published: bool
) -> None:
    record = copied.score(near_duplicates=chosen)

    hashes = [face["perceptual_hash"] for row in copied.rows() for face in row["faces"]]
    assert [each is not None for each in hashes] == [is_published] * record["num_faces"]
    in_faces = copied.query("SELECT count(*) FROM faces WHERE perceptual_hash IS NOT NULL")
    assert in_faces == [(record["num_faces"] * is_published,)]
    assert (record["num_unique"] is None) == (chosen == "off")
    if is_published:
        identical = copied.query("SELECT count(DISTINCT perceptual_hash) FROM faces")[0][0]
        assert record["num_unique"] <= identical <= record["num_faces"]
    tables = sorted(path.name for path in copied.out.iterdir() if path.is_dir())
    assert tables == ["_SUCCESS", "demographics", "faces", "images", "rejects"]


def test_published_hashes_are_rejected_with_pseudonyms_and_counts_reveal_none(copied: Bucket) -> None:
    key_file = copied.folder / "key"
    key_file.write_bytes(bytes(range(32)))
    with pytest.raises(ConfigError, match=r"^score\.near_duplicates publish: with score\.pseudonymise, anyone who has"):
        copied.score(near_duplicates="publish", pseudonymise=str(key_file))
    private = {"pseudonymise": str(key_file), "ledger": str(copied.folder / "ledger"), "aggregate_only": True}

    record = copied.score(near_duplicates="count", **private)

    assert record["num_unique"] < record["num_faces"]
    assert sorted(path.name for path in copied.out.iterdir()) == ["_SUCCESS", "demographics", "views.sql"]
    for path in [*copied.out.rglob("*.parquet"), *(copied.folder / "ledger").rglob("*.parquet")]:
        assert not any("hash" in name for name in pq.read_schema(path).names)
    assert not list(copied.folder.glob("out-work/*"))


def test_a_killed_job_publishes_the_same_distinct_faces_and_shift(
    copied: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(driver, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            copied.score(near_duplicates="count")

    again = copied.score(near_duplicates="count")

    whole = copied.score(near_duplicates="count", out=str(copied.folder / "other"))
    assert again["num_unique"] == whole["num_unique"]
    assert again["shift"] == whole["shift"]


# The shift alarm


def calibrated(model: Path, folder: Path, values: dict[str, Any]) -> Path:
    """Copy a checkpoint and calibrate it on faces with these quantities."""
    shutil.copytree(model, folder)
    num = len(values["sharpness"])
    labels = Labels(UTKFACE, np.full(num, 30.0, np.float32), np.zeros(num, np.int64), np.zeros(num, np.int64))
    stored = Pipeline(vision=VisionConfig(detector="haar"))
    digest = read_checkpoint(folder).digest
    fitted = Calibration.fit(labels, {}, coverage=0.9, risk=0.1, model_digest=digest, pipeline=stored, quality=values)
    (folder / CALIBRATION).write_text(json.dumps(fitted.to_json()))
    return folder


def test_the_record_compares_faces_with_the_calibration(
    bucket: Bucket, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agr_ray.evaluation.shift.MIN_FACES", 4)
    rng = np.random.default_rng(0)
    quality = {
        "detector_score": rng.uniform(3.0, 12.0, 500),
        "face_px": rng.uniform(20.0, 400.0, 500),
        "sharpness": rng.uniform(1e6, 2e6, 500),
        "yaw": np.full(500, np.nan),
        "pitch": np.full(500, np.nan),
    }
    bucket._model = calibrated(model, bucket.folder / "calibrated", quality)
    bucket.put(*(f"{number}.jpg" for number in range(40)))

    record = bucket.score()
    hidden = bucket.score(min_cell=3, out=str(bucket.folder / "hidden"))

    by_name = {each["quantity"]: each for each in record["shift"]["quantities"]}
    num_faces = record["num_faces"]
    assert by_name["sharpness"]["verdict"] == "shifted"
    assert by_name["sharpness"]["num_faces"] == num_faces
    assert sum(by_name["sharpness"]["shares"]) == pytest.approx(1.0)
    assert by_name["yaw"]["verdict"] == by_name["age"]["verdict"] == "not_compared"
    assert record["shift"]["verdict"] == "photographs_differ"
    assert re.search("warning: the faces differ from the calibration images in .*sharpness", bucket.printed)
    assert [each["quantity"] for each in hidden["shift"]["quantities"]] == list(by_name)[:5]
    assert [each["num_faces"] for each in hidden["shift"]["quantities"]] == [None] * 5


def test_runs_with_and_without_a_shift_are_read_together(
    bucket: Bucket, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agr_ray.evaluation.shift.MIN_FACES", 1)
    bucket.score()
    quality = {name: np.linspace(1.0, 9.0, 200) for name in ("detector_score", "face_px", "sharpness", "yaw", "pitch")}
    bucket._model = calibrated(model, bucket.folder / "calibrated", quality)
    bucket.score()
    bucket.put("another.jpg", seed=9)
    bucket.score(min_cell=3)

    query = "SELECT shift.verdict = 'not_compared', len(shift.quantities) FROM runs ORDER BY started_at"
    assert bucket.query(query) == [(True, 0), (False, 8), (False, 5)]


def test_an_uncalibrated_model_is_not_compared_and_says_why(bucket: Bucket) -> None:
    shift = bucket.score()["shift"]

    assert (shift["verdict"], shift["quantities"]) == ("not_compared", [])
    assert shift["sentence"].startswith(
        "not compared with the calibration images: the checkpoint has no calibration.json"
    )

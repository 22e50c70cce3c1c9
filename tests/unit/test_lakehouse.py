"""Tables of Delta Lake and Iceberg have each published run once, whatever is killed.

DuckDB's own extensions for both are downloads, so DuckDB reads them through deltalake and pyiceberg here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.server
import io
import json
import multiprocessing
import re
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pyiceberg.catalog
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.table import TableAlterer
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.utils.config import Config

import agr_ray
from agr_ray.config import ScoreConfig
from agr_ray.console import make_console
from agr_ray.errors import ConfigError
from agr_ray.schema import DEMOGRAPHICS, FACES, IMAGES, REJECTS, RUN_ID
from agr_ray.scoring.lakehouse import check_table, commit_runs
from agr_ray.scoring.publish import TABLES, delete_unpublished, published_runs, views_sql
from agr_ray.storage import Connection, ObjectInfo, S3Address, Storage, StorageError, StorageUnavailable
from agr_ray.storage.lock import LockLost

KINDS = ("delta", "iceberg")
RUNS = tuple(f"2026010{day}T000000.000Z-0000000{day}" for day in range(1, 6))
SCORED_AT = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
SECRET = "hunter2-swordfish"
FACE = {
    "box": [1.0, 2.0, 3.0, 4.0],
    "landmarks": [float(value) for value in range(10)],
    "age": 31.5,
    "gender": "male",
    "race_probs": [("asian", 0.25), ("white", 0.75)],
    "abstain": ["race"],
    "flags": [],
}


class Lake:
    """A folder of published runs, and its tables."""

    def __init__(self, folder: Path, kind: str, namespace: str = "scores") -> None:
        self.folder, self.kind, self.out, self.namespace = folder, kind, folder / "a b" / "out", namespace
        names = {"iceberg_catalog": "lake", "iceberg_namespace": namespace} if kind == "iceberg" else {}
        self.config = ScoreConfig(table=kind, out=str(self.out), **names)
        self.printed = ""

    def publish(
        self,
        run_id: str,
        *,
        num_images: int = 2,
        images: pa.Schema = IMAGES,
        groups: tuple[str, ...] = (),
        aggregate_only: bool = False,
        is_finished: bool = True,
    ) -> None:
        """Write a run of images with two faces each and no reject, in two files for each table of rows."""
        common = {"run_id": run_id, "model_digest": "model", "config_digest": "config", "calibrated": False}
        common |= {"detector": "mtcnn", "scored_at": SCORED_AT, "schema_version": 2}
        rows = [
            common | {"image_id": f"{run_id}-{n}", "uri": f"s3://bucket/{n}.jpg", "status": "ok", "faces": [FACE, FACE]}
            for n in range(num_images)
        ]
        cell = {"is_total": True, "breakdown": "gender", "gender": "male", "n": 2 * num_images, "suppressed": False}
        cells = pa.schema([*(pa.field(name, pa.string()) for name in groups), *DEMOGRAPHICS, RUN_ID])
        self._write("demographics", run_id, 0, [cell | {"run_id": run_id} | dict.fromkeys(groups, "a")], cells)
        if not aggregate_only:
            for number in range(2):
                half = rows[number * num_images // 2 : (number + 1) * num_images // 2]
                faces = [row | FACE | {"face_index": index} for row in half for index in range(2)]
                self._write("images", run_id, number, half, images)
                self._write("faces", run_id, number, faces, FACES)
                self._write("rejects", run_id, number, [], REJECTS)
        if is_finished:
            record = {"run_id": run_id, "published_at": SCORED_AT.isoformat(), "aggregate_only": aggregate_only}
            (self.out / "_SUCCESS").mkdir(exist_ok=True)
            (self.out / "_SUCCESS" / f"run={run_id}.json").write_text(json.dumps(record))

    def _write(self, name: str, run_id: str, number: int, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
        path = self.out / name / f"run={run_id}" / f"{name}-{number:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)

    def commit(self, check: Callable[[], None] = lambda: None) -> None:
        log = io.StringIO()
        records = published_runs(Storage(), str(self.out))
        commit_runs(Storage(), self.config, str(self.out), records, check, make_console(log))
        self.printed = log.getvalue()

    def delta(self, name: str) -> DeltaTable:
        return DeltaTable(self.out / name)

    def iceberg(self, name: str) -> pyiceberg.table.Table:
        return pyiceberg.catalog.load_catalog("lake").load_table(f"{self.namespace}.{name}")

    def rows(self, name: str, select: str = "*") -> list[dict[str, Any]]:
        """Return the rows of a table as DuckDB sees them, in order."""
        with duckdb.connect() as database:
            if self.kind == "delta":
                database.register("rows", self.delta(name).to_pyarrow_dataset())
            else:
                self.iceberg(name).scan().to_duckdb("rows", connection=database)
            return database.sql(f"SELECT {select} FROM rows ORDER BY ALL").to_arrow_table().to_pylist()

    def runs(self, name: str) -> list[str]:
        """Return the run id of each row of a table."""
        return [row["run_id"] for row in self.rows(name, "run_id")]

    def history(self, name: str) -> list[str]:
        """Return the runs in the order of their transactions."""
        if self.kind == "delta":
            found = [commit.get("run_id") for commit in reversed(self.delta(name).history())]
        else:
            found = [each.summary["agr-ray.run"] for each in self.iceberg(name).metadata.snapshots]
        return [each for each in found if each]

    def assert_has(self, *run_ids: str) -> None:
        """Check that the tables have these runs once, with all their rows: two images, four faces, one cell."""
        assert self.runs("images") == [each for each in run_ids for _ in range(2)]
        assert self.runs("faces") == [each for each in run_ids for _ in range(4)]
        assert self.runs("demographics") == [*run_ids]
        assert self.runs("rejects") == []


def set_catalog(monkeypatch: pytest.MonkeyPatch, **properties: object) -> None:
    """Describe the catalogue `lake` to pyiceberg, which reads its configuration when it is imported."""
    for name, value in properties.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__LAKE__{name}", str(value))
    monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", Config())


@pytest.fixture(params=KINDS)
def lake(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    set_catalog(monkeypatch, URI=f"sqlite:///{tmp_path}/catalog.db", WAREHOUSE=f"file://{tmp_path}/warehouse")
    return Lake(tmp_path, request.param)


# What readers see


def test_tables_have_the_rows_of_the_views(lake: Lake) -> None:
    for run_id in RUNS[:2]:
        lake.publish(run_id)

    lake.commit()

    assert lake.printed == f"committed to the {lake.kind} tables: {RUNS[0]}, {RUNS[1]}\n"
    lake.assert_has(*RUNS[:2])
    with duckdb.connect() as database:
        database.execute(views_sql(Storage(), str(lake.out), has_images=True))
        for name in TABLES:
            files = (
                f"read_parquet('{lake.out}/{name}/run=*/*.parquet', union_by_name = true, hive_partitioning = false)"
            )
            expected = database.sql(f"SELECT * FROM {files} ORDER BY ALL").to_arrow_table().to_pylist()
            assert lake.rows(name) == expected
        assert database.sql("SELECT run_id, n FROM demographics ORDER BY ALL").fetchall() == [
            (run_id, 4) for run_id in RUNS[:2]
        ]
    assert (
        lake.rows("images", "faces")[0]["faces"][1] == dict.fromkeys(IMAGES.field("faces").type.value_type.names) | FACE
    )


def test_no_file_is_copied_and_the_folders_are_read_as_before(lake: Lake) -> None:
    lake.publish(RUNS[0])
    files = sorted(path.relative_to(lake.out) for path in lake.out.rglob("*.parquet"))

    lake.commit()

    assert sorted(path.relative_to(lake.out) for path in lake.out.rglob("*.parquet")) == files
    if lake.kind == "delta":
        for name in TABLES:
            lake.delta(name).create_checkpoint()  # a Parquet file, as after 100 runs
    assert delete_unpublished(Storage(), str(lake.out)) == []
    assert pq.read_table(lake.out / "images", partitioning=None).num_rows == 2
    scores = agr_ray.open_scores(lake.out)
    assert [len(scores.query(f"FROM {name}").fetchall()) for name in TABLES] == [1, 0, 4, 2]


def test_unpublished_folders_are_not_in_the_tables(lake: Lake) -> None:
    lake.publish(RUNS[0])
    lake.publish(RUNS[1], is_finished=False)
    (lake.out / "images" / "by hand").mkdir()

    lake.commit()

    lake.assert_has(RUNS[0])


def test_runs_without_rows_of_images_are_in_demographics_only(lake: Lake) -> None:
    lake.publish(RUNS[0], aggregate_only=True)
    lake.commit()
    lake.publish(RUNS[1])
    lake.commit()

    assert lake.runs("demographics") == [*RUNS[:2]]
    assert lake.runs("images") == [RUNS[1]] * 2


def test_a_run_without_images_is_committed_once_and_quietly(lake: Lake, caplog: pytest.LogCaptureFixture) -> None:
    lake.publish(RUNS[0], num_images=0)
    for _ in range(2):
        lake.commit()

    assert lake.runs("images") == []
    assert lake.printed == ""
    assert lake.runs("demographics") == [RUNS[0]]
    assert caplog.messages == []


def test_runs_with_other_columns_are_in_the_same_tables(lake: Lake) -> None:
    face = IMAGES.field("faces").type.value_type
    smaller = pa.list_(pa.struct([field for field in face if field.name != "perceptual_hash"]))
    older = pa.schema([field if field.name != "faces" else field.with_type(smaller) for field in IMAGES])
    lake.publish(RUNS[0], images=older)
    lake.commit()
    lake.publish(RUNS[1], groups=("day",))
    lake.publish(RUNS[2], groups=("city",))
    lake.commit()
    lake.publish(RUNS[3], images=older)
    lake.commit()

    lake.assert_has(*RUNS[:4])
    cells = lake.rows("demographics", "run_id, day, city")
    assert [(each["day"], each["city"]) for each in cells] == [(None, None), ("a", None), (None, "a"), (None, None)]
    assert "perceptual_hash" in lake.rows("images", "faces")[0]["faces"][0]
    assert lake.history("demographics") == [*RUNS[:4]]


def test_maintenance_of_a_table_deletes_no_published_file(lake: Lake) -> None:
    lake.publish(RUNS[0])
    lake.commit()
    files = sorted(lake.out.rglob("run=*/*.parquet"))
    if lake.kind == "delta":
        with pytest.raises(Exception, match="append-only"):
            lake.delta("images").delete("image_id IS NOT NULL")
        lake.delta("images").optimize.compact()
        lake.delta("images").vacuum(dry_run=False)
    else:
        assert lake.iceberg("images").properties["gc.enabled"] == "false"
        pyiceberg.catalog.load_catalog("lake").drop_table("scores.images")
        lake.commit()

    lake.commit()

    assert sorted(lake.out.rglob("run=*/*.parquet")) == files
    lake.assert_has(RUNS[0])


def test_a_table_that_somebody_else_changed_gets_its_settings_back(lake: Lake) -> None:
    if lake.kind != "iceberg":
        pytest.skip("Delta rejects a second commit itself")
    lake.publish(RUNS[0])
    lake.commit()
    with lake.iceberg("images").transaction() as transaction:
        transaction.set_properties({"commit.retry.num-retries": "4", "gc.enabled": "true"})
    lake.publish(RUNS[1])
    lake.commit()

    properties = lake.iceberg("images").properties
    assert (properties["commit.retry.num-retries"], properties["gc.enabled"]) == ("0", "false")
    lake.assert_has(*RUNS[:2])


# Once, whatever happens


def test_a_repeated_commit_changes_nothing(lake: Lake) -> None:
    for run_id in RUNS[:3]:
        lake.publish(run_id)
        lake.commit()
    files = sorted(lake.folder.rglob("*"))

    lake.commit()

    assert lake.printed == ""
    assert sorted(lake.folder.rglob("*")) == files
    lake.assert_has(*RUNS[:3])
    assert [lake.history(name) for name in TABLES if name != "rejects"] == [[*RUNS[:3]]] * 3


def test_the_table_remembers_its_runs_when_their_snapshots_and_logs_are_gone(lake: Lake) -> None:
    for run_id in RUNS[:2]:
        lake.publish(run_id)
        lake.commit()
    for name in TABLES:
        if lake.kind == "delta":
            lake.delta(name).create_checkpoint()
            for path in (lake.out / name / "_delta_log").glob("*.json"):
                path.unlink()
        elif name != "rejects":
            table = lake.iceberg(name)
            table.maintenance.expire_snapshots().by_id(table.metadata.snapshots[0].snapshot_id).commit()

    lake.commit()

    assert lake.printed == ""
    lake.assert_has(*RUNS[:2])


def test_a_table_with_many_runs_is_read_once(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    for run_id in RUNS:
        lake.publish(run_id, num_images=0)
    lake.commit()
    looked_for: list[str] = []
    monkeypatch.setattr(DeltaTable, "transaction_version", lambda self, run_id: looked_for.append(run_id))

    lake.commit()

    assert looked_for == []  # each would read the whole log
    assert lake.printed == ""


class Killed(BaseException):
    """A kill: no code of ours or of the libraries handles it."""


STEPS = {
    "delta": ((DeltaTable, "create"), (TableAlterer, "add_columns"), (DeltaTable, "create_write_transaction")),
    "iceberg": ((SqlCatalog, "create_namespace"), (SqlCatalog, "create_table"), (SqlCatalog, "commit_table")),
}


@pytest.mark.parametrize("is_done", [False, True])
def test_after_a_kill_at_any_step_the_next_commit_completes_the_tables(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, *, is_done: bool
) -> None:
    def kill_at(step: int, patch: pytest.MonkeyPatch) -> None:
        """Die before or after the n-th change to the tables, from 1."""
        num_steps = 0

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal num_steps
                num_steps += 1
                if num_steps == step and not is_done:
                    raise Killed
                result = real(*args, **kwargs)
                if num_steps == step:
                    raise Killed
                return result

            return call

        for owner, name in STEPS[lake.kind]:
            patch.setattr(owner, name, dying(getattr(owner, name)))

    for step in range(1, 20):
        lake = Lake(lake.folder / "next", lake.kind, f"at{step}")
        lake.publish(RUNS[0], aggregate_only=True)
        lake.publish(RUNS[1], aggregate_only=True, groups=("day",))
        try:
            with monkeypatch.context() as patch:
                kill_at(step, patch)
                lake.commit()
        except Killed:
            lake.commit()
            assert lake.runs("demographics") == [*RUNS[:2]]
            assert lake.history("demographics") == [*RUNS[:2]]
        else:
            break
    assert step == 5  # each of four was killed


@pytest.mark.parametrize("is_first", [True, False])
def test_a_job_that_is_overtaken_adds_no_run_twice(lake: Lake, *, is_first: bool) -> None:
    if not is_first:
        lake.publish(RUNS[0])
        lake.commit()
    lake.publish(RUNS[1])
    num_checks = 0

    def overtake() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 1:
            lake.commit()

    with contextlib.suppress(StorageUnavailable):
        lake.commit(overtake)
    after = lake.history("images")
    lake.commit()

    assert num_checks > 0
    assert after == lake.history("images")
    lake.assert_has(*(RUNS[1:2] if is_first else RUNS[:2]))


def commit_until_done(folder: Path, kind: str, start: Any) -> None:
    """Commit in a process of its own, and again after each conflict."""
    lake = Lake(folder, kind)
    start.wait()
    for _ in range(100):
        try:
            lake.commit()
        except StorageUnavailable:
            continue
        return
    raise AssertionError("each attempt failed")


@pytest.mark.slow  # two processes import everything
def test_two_processes_at_once_add_each_run_once(lake: Lake) -> None:
    for run_id in RUNS:
        lake.publish(run_id, aggregate_only=True)
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=commit_until_done, args=(lake.folder, lake.kind, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0]
    assert lake.runs("demographics") == [*RUNS]
    assert sorted(lake.history("demographics")) == [*RUNS]


def test_a_job_that_may_no_longer_write_adds_nothing(lake: Lake) -> None:
    def lost() -> None:
        raise LockLost

    lake.publish(RUNS[0])
    with pytest.raises(LockLost):
        lake.commit(lost)
    lake.commit()
    lake.assert_has(RUNS[0])


# Before any work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"table": "delta", "out": "/data/a%20b"},
            r"score\.out /data/a%20b: must not contain %, \? or # with",
        ),
        ({"table": "iceberg"}, r"score\.table iceberg: needs score\.iceberg_namespace"),
        ({"iceberg_namespace": "a"}, r"score\.iceberg_namespace a: is only used with score\.table iceberg"),
        (
            {"table": "iceberg", "iceberg_namespace": "a", "iceberg_catalog": "nowhere"},
            r"score\.iceberg_catalog nowhere: .* PYICEBERG_CATALOG__NOWHERE__URI",
        ),
    ],
)
def test_settings_that_cannot_work_are_rejected(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = ScoreConfig(**{"out": str(tmp_path / "out")} | settings)
    with pytest.raises((ConfigError, StorageError), match=f"^{message}"):
        check_table(Storage(), config, config.out)


def test_settings_that_can_work_leave_no_trace(lake: Lake) -> None:
    check_table(Storage(), lake.config, str(lake.out))
    check_table(Storage(), ScoreConfig(), str(lake.out))
    assert not lake.out.exists()


def test_a_missing_library_is_named_with_its_extra(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, {"delta": "deltalake", "iceberg": "pyiceberg"}[lake.kind], None)
    with pytest.raises(ConfigError, match=rf"^score\.table {lake.kind}: needs \w+, .*pip install '\.\[{lake.kind}\]'$"):
        check_table(Storage(), lake.config, str(lake.out))


@pytest.mark.parametrize(
    "properties",
    [
        {"URI": f"postgresql+nothing://me:{SECRET}@127.0.0.1:1/catalog"},
        {"URI": f"sqlite:////nowhere/catalog.db?password={SECRET}"},
        {"URI": "http://127.0.0.1:1", "TYPE": "rest", "CREDENTIAL": f"me:{SECRET}", "TOKEN": SECRET},
        {"TYPE": "nothing", "S3__SECRET_ACCESS_KEY": SECRET},
    ],
)
def test_a_catalogue_that_cannot_be_opened_is_named_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, properties: dict[str, str]
) -> None:
    set_catalog(monkeypatch, **properties)
    lake = Lake(tmp_path, "iceberg")
    kind = StorageUnavailable if properties.get("TYPE") == "rest" else StorageError
    with pytest.raises(kind, match=r"^score\.iceberg_catalog lake: can't be read or written: ") as caught:
        check_table(Storage(), lake.config, str(lake.out))
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_error_of_a_library_becomes_one_plain_line(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)

    def fail(*args: object, **options: object) -> bool:
        raise OSError(
            "Generic S3 error\n   \x1b[31m↳\x1b[0m Error performing GET\n\twith "
            f"{SECRET}\n   0: <unknown>\n  13: clone3\n             at ./misc/clone3.S:81:0\n" + " and more" * 100
        )

    monkeypatch.setattr(DeltaTable, "__init__", fail)
    monkeypatch.setattr(SqlCatalog, "namespace_exists", fail)
    with pytest.raises(StorageError) as caught:
        check_table(Storage(), lake.config, str(lake.out))
    where = f"{lake.out}" if lake.kind == "delta" else "score.iceberg_catalog lake"
    start = f"{where}: can't be read or written: OSError: Generic S3 error Error performing GET with *** and more"
    assert str(caught.value).startswith(start)
    assert len(str(caught.value)) < 700


# Outages pass, other problems do not


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that answers each request with the same status."""

    status: int

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  # names of the base class

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def refusing(status: int) -> Iterator[str]:
    """Run a server that answers with this status, or nobody's port if it is 0; yield its URL."""
    handler = type("Handler", (Refusing,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        if status:
            threading.Thread(target=server.serve_forever).start()
        else:
            server.server_close()
        try:
            yield url
        finally:
            if status:
                server.shutdown()


STATUSES = {0: StorageUnavailable, 403: StorageError, 404: StorageError, 429: StorageUnavailable}
STATUSES |= {500: StorageUnavailable, 503: StorageUnavailable}
"""What an answer means: outages pass."""


@pytest.mark.parametrize(("status", "kind"), STATUSES.items())
def test_outages_of_s3_are_retried_and_refusals_are_not(
    status: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing(status) as url:
        address = S3Address(url, "us-east-1", "path", anonymous=True)
        options = Connection(anonymous=True, timeout_s=5.0, max_attempts=1).delta_options(address)
        monkeypatch.setattr(Storage, "delta_options", lambda *_: options)
        with pytest.raises((StorageError, StorageUnavailable)) as caught:
            check_table(Storage(), ScoreConfig(table="delta"), "s3://bucket/out")
    assert (type(caught.value), "\n" in str(caught.value)) == (kind, False)


@pytest.mark.parametrize(("status", "kind"), STATUSES.items())
def test_outages_of_a_catalogue_are_retried_and_refusals_are_not(
    status: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing(status) as url:
        set_catalog(monkeypatch, URI=url, TYPE="rest")
        with pytest.raises((StorageError, StorageUnavailable)) as caught:
            check_table(Storage(), Lake(tmp_path, "iceberg").config, str(tmp_path))
    assert (type(caught.value), "\n" in str(caught.value)) == (kind, False)


@pytest.mark.parametrize(("status", "kind"), STATUSES.items())
def test_outages_of_files_are_retried_and_refusals_are_not(
    status: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_catalog(monkeypatch, URI=f"sqlite:///{tmp_path}/catalog.db", WAREHOUSE=f"file://{tmp_path}/warehouse")
    lake = Lake(tmp_path, "iceberg")
    lake.publish(RUNS[0], aggregate_only=True)
    listed = Storage.list

    def in_a_bucket(storage: Storage, uri: str, *args: Any) -> Iterator[ObjectInfo]:
        for info in listed(storage, uri, *args):
            yield dataclasses.replace(info, uri=f"s3://bucket/{info.key}") if ".parquet" in info.key else info

    with refusing(status) as url, monkeypatch.context() as patch:
        address = S3Address(url, "us-east-1", "path", anonymous=True)
        properties = Connection(anonymous=True, timeout_s=1.0).iceberg_properties(address)
        patch.setattr(Storage, "iceberg_properties", lambda *_: properties)
        patch.setattr(Storage, "list", in_a_bucket)
        read_footer = Storage.read_footer
        path = next(lake.out.glob("demographics/*/*.parquet"))
        patch.setattr(Storage, "read_footer", lambda storage, _: read_footer(storage, str(path)))
        with pytest.raises((StorageError, StorageUnavailable)) as caught:
            lake.commit()
    assert (type(caught.value), "\n" in str(caught.value)) == (kind, False)
    lake.commit()
    assert lake.runs("demographics") == [RUNS[0]]


def test_a_database_that_another_process_has_locked_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = sqlite3.connect(tmp_path / "catalog.db", isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    set_catalog(monkeypatch, URI=f"sqlite:///{tmp_path}/catalog.db?timeout=0.1", WAREHOUSE=f"file://{tmp_path}")
    with pytest.raises(StorageUnavailable, match="database is locked"):
        check_table(Storage(), Lake(tmp_path, "iceberg").config, str(tmp_path))
    database.close()


def foreign_table(lake: Lake, schema: pa.Schema, partitioned_by: str | None = None) -> None:
    """Make the first table as another program would."""
    if lake.kind == "delta":
        write_deltalake(lake.out / "demographics", schema.empty_table(), partition_by=partitioned_by)
    else:
        catalog = pyiceberg.catalog.load_catalog("lake")
        catalog.create_namespace("scores")
        catalog.create_table("scores.demographics", schema)


def broken_log(lake: Lake, pattern: str, replacement: str) -> None:
    """Commit a run, and then change the beginning of the first table's log."""
    lake.commit()
    lake.publish(RUNS[1], aggregate_only=True)
    first = lake.out / "demographics" / "_delta_log" / "00000000000000000000.json"
    first.write_text(re.sub(pattern, replacement, first.read_text(), count=1, flags=re.DOTALL))


def with_features(lake: Lake, readers: str, writers: str) -> None:
    features = f'"minReaderVersion":3,"minWriterVersion":7,"readerFeatures":{readers},"writerFeatures":{writers}}}'
    broken_log(lake, '"minReaderVersion":.*?}', features)


PROBLEMS: dict[str, tuple[str, Callable[[Lake], None], str]] = {
    "of another program": (
        "both",
        lambda lake: foreign_table(lake, pa.schema([("gender", pa.string())])),
        r"demographics: there is a table that is not one of agr-ray's: it has no column run_id$",
    ),
    "partitioned": (
        "delta",
        lambda lake: foreign_table(lake, pa.schema([RUN_ID, ("day", pa.string())]), "day"),
        r"demographics: there is a table that is not one of agr-ray's: it is partitioned by day$",
    ),
    "other types": (
        "both",
        lambda lake: foreign_table(lake, pa.schema([RUN_ID, ("n", pa.string())])),
        r"demographics: can't be read or written: (SchemaMismatchError: .*Cannot merge types|ValueError: Incompatible)",
    ),
    "damaged log": ("delta", lambda lake: broken_log(lake, ".*", "{no json"), "DeltaError: Kernel error: Json error"),
    "cut log": ("delta", lambda lake: broken_log(lake, ".*", ""), "No table metadata or protocol found"),
    "of a later version": (
        "delta",
        lambda lake: with_features(lake, '["x"]', '["x"]'),
        "DeltaError: Kernel error: Unsupported: Feature 'x' is not supported",
    ),
    "read-only": (
        "delta",
        lambda lake: with_features(lake, "[]", '["rowTracking","domainMetadata"]'),
        "CommitFailedError: Unsupported table features required",
    ),
}
"""Tables that runs can't be added to: of which kind, how they come about, and the message."""


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_table_that_cannot_be_used_is_one_line_that_is_not_retried(lake: Lake, problem: str) -> None:
    kind, make, message = PROBLEMS[problem]
    if kind not in ("both", lake.kind):
        pytest.skip("of Delta Lake")
    lake.publish(RUNS[0], aggregate_only=True)
    make(lake)
    before = {path: path.read_bytes() for path in sorted(lake.folder.rglob("*")) if path.is_file()}

    with pytest.raises(StorageError, match=message) as caught:
        lake.commit()

    assert type(caught.value) is StorageError  # its subclass StorageFailed is retried
    assert "\n" not in str(caught.value)
    if "not one of agr-ray's" in message:
        assert {path: path.read_bytes() for path in sorted(lake.folder.rglob("*")) if path.is_file()} == before


# S3's settings


def test_both_libraries_get_the_settings_of_the_other_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    connection = Connection(timeout_s=7, requester_pays=True)
    address = S3Address("http://host:8333", "eu-west-1", "path", anonymous=False)

    assert connection.delta_options(address) == {
        "aws_region": "eu-west-1",
        "aws_endpoint_url": "http://host:8333",
        "aws_access_key_id": "key-id",
        "aws_secret_access_key": "key",
        "aws_session_token": "token",
        "aws_virtual_hosted_style_request": "false",
        "aws_skip_signature": "false",
        "aws_request_payer": "true",
        "aws_conditional_put": "etag",
        "allow_http": "true",
        "connect_timeout": "7s",
        "timeout": "7s",
        "max_retries": "5",
    }
    assert connection.iceberg_properties(address) == {
        "s3.region": "eu-west-1",
        "s3.endpoint": "http://host:8333",
        "s3.access-key-id": "key-id",
        "s3.secret-access-key": "key",
        "s3.session-token": "token",
        "s3.force-virtual-addressing": "false",
        "s3.anonymous": "false",
        "s3.connect-timeout": "7",
        "s3.request-timeout": "7",
    }


def test_anonymous_clients_and_amazon_itself_need_neither_keys_nor_endpoint() -> None:
    address = S3Address(None, "us-east-1", "auto", anonymous=True)
    connection = Connection(anonymous=True)
    options = connection.delta_options(address) | connection.iceberg_properties(address)
    assert options["aws_skip_signature"] == options["s3.anonymous"] == "true"
    assert not [name for name in options if "key" in name or "token" in name or "endpoint" in name]


def test_local_tables_need_no_settings() -> None:
    assert Storage().delta_options("/data/out") == Storage().iceberg_properties("/data/out") == {}

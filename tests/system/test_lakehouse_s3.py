"""Tables of Delta Lake and Iceberg on a real S3 server: commits are conditional writes, and kills are repaired."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyiceberg.catalog
import pytest
from commands import ROOT
from deltalake import DeltaTable
from pyiceberg.utils.config import Config

sys.path += [str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "ray")]
from this_process import ThisProcess, model, workers

from agr_ray.config import ScoreConfig, ScoreJob, VisionConfig
from agr_ray.console import make_console
from agr_ray.data.rendered import render_chip
from agr_ray.scoring import driver
from agr_ray.scoring.driver import score_input
from agr_ray.scoring.lakehouse import commit_runs
from agr_ray.scoring.publish import TABLES, published_runs
from agr_ray.storage import Storage, StorageUnavailable
from agr_ray.vision.decode import encode_jpeg

__all__ = ["model", "workers"]  # fixtures
KEYS = ("run_id", "image_id", "face_index", "breakdown", "age_group", "gender", "race")


class Lake:
    """A prefix with photographs and the tables of their scores."""

    def __init__(self, root: str, kind: str, model: Path, workers: ThisProcess) -> None:
        self.root, self.kind, self.storage = root, kind, Storage()
        self.out = f"{root}/a b/out"
        self._model, self._workers = model, workers
        self.printed = ""

    def put(self, *numbers: int) -> None:
        for number in numbers:
            self.storage.write(f"{self.root}/in/{number}.jpg", encode_jpeg(render_chip(0, number).image_rgb))

    def config(self, table: str) -> ScoreConfig:
        names = {"iceberg_catalog": "lake", "iceberg_namespace": "scores"} if table == "iceberg" else {}
        where = {"checkpoint": str(self._model), "input": f"{self.root}/in", "out": self.out}
        return ScoreConfig(table=table, outage_s=0.0, **where, **names)

    def score(self, table: str = "") -> dict[str, Any]:
        log = io.StringIO()
        job = ScoreJob(vision=VisionConfig(detector="haar"), score=self.config(table or self.kind))
        try:
            return score_input(job, self._workers, make_console(log))
        finally:
            self.printed = log.getvalue()

    def commit(self, check: Callable[[], None] = lambda: None) -> None:
        records = published_runs(self.storage, self.out)
        commit_runs(self.storage, self.config(self.kind), self.out, records, check, make_console(io.StringIO()))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a table through DuckDB, whose own extensions for these tables are downloads."""
        with duckdb.connect() as database:
            if self.kind == "delta":
                uri = f"{self.out}/{name}"
                table = DeltaTable(uri, storage_options=self.storage.delta_options(uri))
                database.register("rows", table.to_pyarrow_dataset())
            else:
                catalog = pyiceberg.catalog.load_catalog("lake", **self.storage.iceberg_properties(self.out))
                catalog.load_table(f"scores.{name}").scan().to_duckdb("rows", connection=database)
            return in_order(database.sql("FROM rows").to_arrow_table().to_pylist())

    def published(self, name: str) -> list[dict[str, Any]]:
        """Return the rows in the folders of all published runs, read by boto3."""
        runs = [info.key.removesuffix(".json") for info in self.storage.list(f"{self.out}/_SUCCESS")]
        tables = [self.storage.read_table(f"{self.out}/{name}/{run}").to_pylist() for run in runs]
        return in_order([row for rows in tables for row in rows])

    def assert_complete(self, num_runs: int) -> None:
        for name in TABLES:
            assert self.rows(name) == self.published(name)
        assert len({row["run_id"] for row in self.rows("demographics")}) == num_runs


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: [str(row.get(name)) for name in KEYS])


@pytest.fixture(params=["delta", "iceberg"])
def lake(
    request: pytest.FixtureRequest,
    s3_root: str,
    model: Path,
    workers: ThisProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Lake:
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", f"sqlite:///{tmp_path}/catalog.db")
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__WAREHOUSE", f"{s3_root}/warehouse")
    monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", Config())
    return Lake(s3_root, request.param, model, workers)


def test_a_run_whose_job_is_killed_before_its_commit_is_committed_by_the_next(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake.put(0, 1)
    lake.score()
    lake.assert_complete(1)
    lake.put(2)

    def kill_with_news(*args: Any, **kwargs: Any) -> None:
        if len(lake.published("demographics")) > len(lake.rows("demographics")):
            raise KeyboardInterrupt
        commit_runs(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "commit_runs", kill_with_news)
        with pytest.raises(KeyboardInterrupt):
            lake.score()
    assert len({row["run_id"] for row in lake.published("images")}) == 2
    assert len({row["run_id"] for row in lake.rows("images")}) == 1

    record = lake.score()  # nothing is new

    assert f"committed to the {lake.kind} tables: {record['run_id']}" in lake.printed
    lake.assert_complete(2)
    lake.score()
    assert "committed" not in lake.printed
    lake.assert_complete(2)


def test_a_job_that_is_overtaken_adds_no_run_twice(lake: Lake) -> None:
    lake.put(0)
    lake.score()
    lake.put(1)
    lake.score(table="none")

    with pytest.raises(StorageUnavailable, match="demographics: can't be read or written: Commit"):
        lake.commit(check=lake.commit)

    lake.assert_complete(2)
    lake.commit()
    lake.assert_complete(2)

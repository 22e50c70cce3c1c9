"""Scoring's contract under faults: each listed image is published exactly once.

Hypothesis draws sequences of disturbances; real processes run the real driver on a small folder, without Ray, and are
killed by SIGKILL or stopped by SIGSTOP at any change that they make to the disk. After each sequence the same command
must finish, and the whole folder, read as any reader would, must hold each image once. So must the tables of Delta Lake
or Iceberg; at any time, they hold no other rows than those of published runs.

`test_exactly_once.py` runs this file in a fresh interpreter: a process that is forked while another thread holds a lock
waits for that lock for ever.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pyiceberg.catalog
import pytest
from deltalake import DeltaTable
from deltalake.table import TableAlterer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.utils.config import Config

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from this_process import ThisProcess, model, workers

from agr_ray.config import GatesConfig, ScoreConfig, ScoreJob, VisionConfig
from agr_ray.console import make_console
from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.schema import RETRIED_STATUSES
from agr_ray.scoring import driver
from agr_ray.scoring.driver import score_input
from agr_ray.scoring.publish import TABLES
from agr_ray.storage import ServerFailed, Storage, StorageUnavailable, atomic
from agr_ray.storage.lock import LockLost
from agr_ray.vision.decode import encode_jpeg

__all__ = ["model", "workers"]  # fixtures
NUM_SEQUENCES = int(os.environ.get("AGR_TEST_SEQUENCES", "15"))
IS_SEEDED = "AGR_TEST_SEED" in os.environ
"""Another seed draws other sequences, so a large number can be run in several commands; without one they are fixed."""
EXPIRY_S = 0.25
NAMES = "abcdefg"
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "smaller parts": {"rows_per_file": 3},
    "grouped": {"group_by": ("name",), "key_pattern": r"(?P<name>\w)\.jpg$"},
    "limited": {"limit": 2},
    "other gates": {"gates": GatesConfig(min_side_px=5)},
}
"""The first four produce equal rows, so each skips images that another has scored; the last produces different rows."""
FINISHED, REFUSED, LOST, KILLED = 0, 3, 4, -signal.SIGKILL
DISK = tuple((os, name) for name in ("replace", "rename", "link", "unlink", "rmdir", "mkdir"))
"""The functions with which our code changes the disk."""
COMMITS = (
    *((DeltaTable, name) for name in ("create", "create_write_transaction", "update_incremental")),
    (TableAlterer, "add_columns"),
    *((SqlCatalog, name) for name in ("create_namespace", "create_table", "commit_table")),
)
"""The functions of the libraries that commit to tables. `update_incremental` follows a commit."""
MAX_COMMAND_S = 120
"""A command that takes longer hangs: SIGALRM ends it, and the test fails."""


@dataclass(frozen=True)
class Run:
    """One command, and what happens to it."""

    recipe: str
    strike_at: int | None = None
    """The change, from 1, before which it is killed or stopped; None: never."""
    refused: str = ""
    """Names of the images that storage refuses, each time."""
    refused_once: str = ""
    """Those that it rejects once."""
    in_commits: bool = False
    """Whether changes are counted in COMMITS rather than in DISK."""


@dataclass(frozen=True)
class Change:
    """An image that is added, replaced or deleted between commands."""

    name: str
    delete: bool = False


@dataclass(frozen=True)
class Both:
    """Two commands in parallel."""

    one: Run
    other: Run


@dataclass(frozen=True)
class Stall:
    """A command that is suspended for longer than its lock lasts, and wakes up while or after another has run."""

    stopped: Run
    other: Run


names = st.sampled_from(NAMES)
some_names = st.text(names, max_size=3)
undisturbed = st.builds(Run, st.sampled_from(list(RECIPES)), st.none(), some_names, some_names)
struck = st.one_of(
    st.builds(Run, st.sampled_from(list(RECIPES)), st.integers(1, 80), some_names, some_names),
    st.builds(Run, st.sampled_from(list(RECIPES)), st.integers(1, 12), in_commits=st.just(True)),
)
steps = st.one_of(
    struck,
    undisturbed,
    st.builds(Change, names, st.booleans()),
    st.builds(Both, struck, st.one_of(struck, undisturbed)),
    st.builds(Stall, struck, st.one_of(struck, undisturbed)),
)


@dataclass
class World:
    """A folder of images, its output, and the processes that work on it."""

    folder: Path
    model: Path
    workers: ThisProcess
    table: str
    """`score.table`."""
    num_puts: int = 0
    processes: list[int] = field(default_factory=list)

    def put(self, name: str) -> None:
        """Write an image of a size that no other has: local etags are size and time."""
        self.num_puts += 1
        body = encode_jpeg(np.full((24, 24, 3), 8 * self.num_puts % 256, np.uint8)) + bytes(self.num_puts)
        (self.folder / "in" / f"{name}.jpg").write_bytes(body)

    def job(self, recipe: str) -> ScoreJob:
        knobs = dict(RECIPES[recipe])
        gates = knobs.pop("gates", GatesConfig())
        score = {"rows_per_file": 2, "batch_size": 2, "lock_expiry_s": EXPIRY_S, "outage_s": 0.0, "max_refused": 1.0}
        paths = {name: str(self.folder / name) for name in ("in", "out")}
        score |= {"table": self.table} | ({"iceberg_namespace": "scores"} if self.table == "iceberg" else {})
        return ScoreJob(
            vision=VisionConfig(detector="haar"),
            gates=gates,
            score=ScoreConfig(
                checkpoint=str(self.model), input=paths["in"], out=paths["out"], allow_empty=True, **score | knobs
            ),
        )

    def start(self, run: Run, strike: signal.Signals = signal.SIGKILL) -> int:
        """Start a command as a process of its own."""
        process = os.fork()
        if process:
            self.processes.append(process)
            return process
        status = 1
        log = io.StringIO()
        try:
            signal.alarm(MAX_COMMAND_S)
            atomic._MAX_FLOCK_S = 1.0
            strike_before(run.strike_at, strike, COMMITS if run.in_commits else DISK)
            refuse(run.refused, run.refused_once)
            score_input(self.job(run.recipe), self.workers, make_console(log))
            status = FINISHED
        except ConfigError as error:
            status = REFUSED if "that run is alive" in str(error) else status
            log.write(traceback.format_exc())
        except LockLost:
            status = LOST
        except StorageUnavailable as error:
            status = REFUSED if "is it stopped?" in str(error) else status
            log.write(traceback.format_exc())
        except BaseException:
            log.write(traceback.format_exc())
        if status == 1:
            (self.folder / "failed.log").write_text(log.getvalue())
        os._exit(status)

    def end(self, process: int) -> int:
        """Wait for a command and return how it ended."""
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        self.processes.remove(process)
        log = self.folder / "failed.log"
        assert not log.exists(), log.read_text()
        return status

    def take(self, step: Any) -> None:
        if isinstance(step, Change):
            if step.delete:
                (self.folder / "in" / f"{step.name}.jpg").unlink(missing_ok=True)
            else:
                self.put(step.name)
        elif isinstance(step, Both):
            one, other = self.start(step.one), self.start(step.other)
            statuses = self.end(one), self.end(other)
            assert set(statuses) <= {FINISHED, REFUSED, LOST, KILLED}
        elif isinstance(step, Stall):
            stopped = self.start(step.stopped, signal.SIGSTOP)
            _, status = os.waitpid(stopped, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                self.processes.remove(stopped)
                assert os.waitstatus_to_exitcode(status) in (FINISHED, KILLED)
                return
            # It is refused where the other was stopped while it renewed the lock.
            assert self.end(self.start(step.other)) in (FINISHED, KILLED, REFUSED)
            os.kill(stopped, signal.SIGCONT)
            assert self.end(stopped) in (FINISHED, LOST, REFUSED)
        else:
            assert self.end(self.start(step)) in (FINISHED, KILLED)

    def rows(self) -> list[dict[str, Any]]:
        """Return the result of a query as a reader of the whole folder sees it."""
        images = self.folder / "out" / "images"
        return pq.read_table(images, partitioning=None).to_pylist() if images.exists() else []

    def query(self, sql: str) -> list[Any]:
        with duckdb.connect() as database:
            database.execute((self.folder / "out" / "views.sql").read_text())
            return database.sql(sql).fetchall()

    def check_tables(self, *, have_all: bool) -> None:
        """Check that the tables hold the rows of published runs, each once; those of all runs with `have_all`."""
        out = self.folder / "out"
        published = {path.stem for path in (out / "_SUCCESS").glob("*.json")}
        for name, seen in self.in_fork(self.committed).items():
            files = {run: (out / name / run).glob("*.parquet") for run in published}
            num_rows = {run: sum(pq.read_metadata(file).num_rows for file in files[run]) for run in published}
            expected = {run.removeprefix("run="): number for run, number in num_rows.items() if number}
            assert {run: expected.get(run) for run in seen} == seen
            assert not have_all or seen == expected

    def committed(self) -> dict[str, dict[str, int]]:
        """Return the number of rows of each run in each table, as the library reads them."""
        tables = {}
        for name in TABLES:
            if self.table == "delta":
                uri = str(self.folder / "out" / name)
                rows = DeltaTable(uri).to_pyarrow_table(columns=["run_id"]) if DeltaTable.is_deltatable(uri) else None
            else:
                catalog, identifier = pyiceberg.catalog.load_catalog("default"), f"scores.{name}"
                exists = catalog.table_exists(identifier)
                rows = catalog.load_table(identifier).scan(selected_fields=("run_id",)).to_arrow() if exists else None
            tables[name] = Counter([] if rows is None else rows["run_id"].to_pylist())
        return tables

    def in_fork(self, read: Callable[[], Any]) -> Any:
        """Return the result of a function that starts threads, so that this process has none and can fork."""
        results, to_write = os.pipe()
        process = os.fork()
        if not process:
            status = 1
            try:
                os.write(to_write, json.dumps(read()).encode())
                status = FINISHED
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        os.close(to_write)
        self.processes.append(process)
        with open(results, "rb") as pipe:
            result = json.load(pipe)
        assert self.end(process) == FINISHED
        return result

    def check_published(self) -> None:
        """Check that readers see the published runs, whole, and nothing else, and no image twice."""
        out, rows = self.folder / "out", self.rows()
        runs = self.query("SELECT run_id, num_images FROM runs ORDER BY run_id")
        assert sorted(Counter(row["run_id"] for row in rows).items()) == [each for each in runs if each[1]]
        for table in ("images", "faces", "rejects", "demographics"):
            folders = {path.parent.name for path in (out / table).glob("run=*/*")}
            assert sorted(folders) == [f"run={run_id}" for run_id, _ in runs]
        conclusive = [
            (row["config_digest"], row["uri"], row["etag"]) for row in rows if row["status"] not in RETRIED_STATUSES
        ]
        assert [each for each, number in Counter(conclusive).items() if number > 1] == []
        per_run = Counter((row["run_id"], row["uri"], row["etag"]) for row in rows)
        assert [each for each, number in per_run.items() if number > 1] == []

    def check_complete(self, recipe: str) -> None:
        """Check that each listed image is there, conclusively and once, under the configuration of the last run."""
        if recipe == "limited":
            return
        paths = sorted((self.folder / "in").iterdir())
        expected = [(str(path), f"{path.stat().st_size}-{path.stat().st_mtime_ns}") for path in paths]
        ((digest,),) = self.query("SELECT config_digest FROM runs ORDER BY published_at DESC LIMIT 1")
        rows = [
            (row["uri"], row["etag"])
            for row in self.rows()
            if row["config_digest"] == digest and row["status"] not in RETRIED_STATUSES
        ]
        assert sorted(each for each in rows if each in expected) == expected
        seen = self.query("SELECT uri, etag FROM images")
        assert sorted(each for each in seen if each in expected) == expected
        assert sorted(uri for uri, _ in seen) == sorted({row["uri"] for row in self.rows()})


def strike_before(change: int | None, strike: signal.Signals, functions: Sequence[tuple[Any, str]]) -> None:
    """Send this process a signal just before its n-th call of any of these functions, in any thread."""
    num_changes = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def make_change(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_changes
            num_changes += 1
            if num_changes == change:
                os.kill(os.getpid(), strike)
            return real(*args, **kwargs)

        return make_change

    for owner, name in functions:
        setattr(owner, name, counted(getattr(owner, name)))


def refuse(always: str, once: str) -> None:
    """Make storage refuse images by name."""
    read, seen = Storage.read, set()

    def read_or_refuse(self: Storage, uri: str, **kwargs: Any) -> bytes:
        name = Path(uri).stem
        if uri.endswith(".jpg") and (name in always or (name in once and name not in seen)):
            seen.add(name)
            raise ServerFailed(f"{uri}: SlowDown")
        return read(self, uri, **kwargs)

    Storage.read = read_or_refuse  # type: ignore[method-assign]


@pytest.mark.timeout(0)
@settings(
    max_examples=NUM_SEQUENCES,
    deadline=None,
    database=None,
    derandomize=not IS_SEEDED,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
@given(
    sequence=st.lists(steps, min_size=1, max_size=5),
    recipe=st.sampled_from(list(RECIPES)),
    table=st.sampled_from(["delta", "iceberg"]),
)
def test_after_any_sequence_the_same_command_finishes_and_each_image_is_published_once(
    model: Path, workers: ThisProcess, sequence: list[Any], recipe: str, table: str
) -> None:
    driver.check_network(read_checkpoint(model), str(model), "score.checkpoint")  # here, so not in each process
    folder = Path(tempfile.mkdtemp(prefix="agr-ray-once-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    world = World(folder, model, workers, table)
    os.environ["PYICEBERG_CATALOG__DEFAULT__URI"] = f"sqlite:///{folder}/catalog.db"
    os.environ["PYICEBERG_CATALOG__DEFAULT__WAREHOUSE"] = f"file://{folder}/warehouse"
    pyiceberg.catalog._ENV_CONFIG = Config()
    world.in_fork(world.committed)  # makes the tables of the catalogue itself, which two commands can't do at once
    try:
        (folder / "in").mkdir()
        for name in NAMES[:5]:
            world.put(name)
        for step in sequence:
            world.take(step)
            world.check_tables(have_all=False)
        # The first ends a run that was planned before the last changes; the second scores what it could not know.
        for _ in range(2):
            assert world.end(world.start(Run(recipe))) == FINISHED
            world.check_published()
            world.check_tables(have_all=True)
        world.check_complete(recipe)
    finally:
        for process in world.processes:  # what a failed check has left stopped
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        shutil.rmtree(folder, ignore_errors=True)

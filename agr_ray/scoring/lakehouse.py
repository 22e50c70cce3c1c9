"""Lakehouse tables: each published run is one transaction of each table of Delta Lake or Iceberg.

A transaction names the Parquet files in OUT/TABLE/run=ID/; none is copied. In the same transaction, the table records
the run's id. So a run is in a table as a whole or not at all, and never twice, whatever is killed. If a job is killed
between publishing and `commit_runs`, the tables lack its run until the next command, which calls `commit_runs` first.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
from rich.console import Console

from agr_ray.config import ScoreConfig
from agr_ray.errors import ConfigError, missing_extra
from agr_ray.redact import redacted
from agr_ray.schema import RUN_ID
from agr_ray.scoring.publish import TABLES
from agr_ray.storage import ObjectInfo, Storage, StorageError, StorageUnavailable

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog

_PACKAGES: Final = {"delta": "deltalake", "iceberg": "pyiceberg"}
_DELTA_CONFIGURATION: Final = {"delta.appendOnly": "true", "delta.deletedFileRetentionDuration": "interval 36500 days"}
"""Published files stay: readers of the folders and later runs need them. DELETE would also write files beside them."""
_ICEBERG_PROPERTIES: Final = {"gc.enabled": "false", "commit.retry.num-retries": "0"}
"""Published files stay. And pyiceberg does not repeat a commit that another process has overtaken, which would add a
run twice."""
_NOISE: Final = re.compile(r"\x1b\[[\d;]*m|↳|^ +(?:\d+: |at ).*$|\(Background on this error at: .*\)", re.MULTILINE)
"""What the libraries add to their messages: colours and arrows, backtraces, links."""
_MAX_REASON: Final = 500
"""Maximum length of a library's error in a message, in characters."""
_OUTAGES: Final = {
    "builtins.ConnectionError",
    "builtins.TimeoutError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "pyiceberg.exceptions.AuthorizationExpiredError",  # the next attempt signs in again
    "pyiceberg.exceptions.CommitFailedException",
    "pyiceberg.exceptions.CommitStateUnknownException",
    "pyiceberg.exceptions.ServerError",
    "pyiceberg.exceptions.ServiceUnavailableError",
    "pyiceberg.exceptions.TooManyRequestsError",
    "pyiceberg.exceptions.WaitingForLockException",
    "sqlalchemy.exc.IntegrityError",  # another process made the same namespace or table
    "sqlalchemy.exc.OperationalError",
}
"""Classes of errors after which another attempt may succeed: outages, and commits that another process overtook."""
_OUTAGE_TEXT: Final = re.compile(
    "Failed to commit transaction|table already exists|existing table version"  # deltalake: overtaken
    "|HTTP error|non-2xx status code:? (?:429|5[0-9]{2})"  # deltalake, which has no classes for errors of S3
    "|HTTP status (?:429|5[0-9]{2})"  # pyarrow, by which pyiceberg reads
    "|AWS Error (?:INTERNAL_FAILURE|NETWORK_CONNECTION|REQUEST_TIMEOUT|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING)"
)
"""Matches messages of such errors in other classes."""
_NO_DATABASE: Final = "unable to open database file"
"""SQLite's message for a missing folder. Its class is also that of "database is locked"."""


@dataclass(frozen=True)
class _Run:
    """One table's files of a run."""

    run_id: str
    published_at: datetime.datetime
    schema: pa.Schema
    num_rows: dict[ObjectInfo, int]
    """Of each file."""


def check_table(storage: Storage, config: ScoreConfig, out: str) -> None:
    """Reject settings of tables that can't work, before any work.

    Raises:
        ConfigError: the library is not installed, or a setting is missing or not allowed.
        StorageError: the first table or the catalogue can't be used.
        StorageUnavailable: it can't be reached.
    """
    if config.table != "iceberg" and config.iceberg_namespace:
        raise ConfigError(f"score.iceberg_namespace {config.iceberg_namespace}: is only used with score.table iceberg")
    if config.table == "none":
        return
    if importlib.util.find_spec(_PACKAGES[config.table]) is None:
        raise ConfigError(f"score.table {config.table}: {missing_extra(config.table, [_PACKAGES[config.table]])}")
    if any(character in out for character in "%?#"):  # the libraries parse paths as URLs
        raise ConfigError(f"score.out {config.out}: must not contain %, ? or # with score.table {config.table}")
    if config.table == "delta":
        with _one_line_errors(out):
            _DeltaTable(storage, storage.join(out, TABLES[0]))
    elif not config.iceberg_namespace:
        raise ConfigError("score.table iceberg: needs score.iceberg_namespace, the namespace of its tables")
    else:
        _open_catalog(storage, config, out)


def commit_runs(
    storage: Storage,
    config: ScoreConfig,
    out: str,
    records: Sequence[Mapping[str, Any]],
    check: Callable[[], None],
    console: Console,
) -> None:
    """Add the runs that a table lacks, in their order.

    Args:
        storage: holds the runs.
        config: says which tables.
        out: folder of the results.
        records: of published runs.
        check: called before each transaction; raises if this job may no longer write.
        console: prints the runs that were added.

    Raises:
        StorageError: a table is not one of ours, or can't be used; a retry would not help.
        StorageUnavailable: a table can't be reached, or another process has written to it meanwhile.
    """
    if config.table == "none":
        return
    catalog = _open_catalog(storage, config, out) if config.table == "iceberg" else None
    added: set[str] = set()
    for name in TABLES:
        folder = storage.join(out, name)
        having = [each for each in records if name == "demographics" or not each["aggregate_only"]]
        with _one_line_errors(folder):
            table = _DeltaTable(storage, folder) if catalog is None else _IcebergTable(catalog, config, name)
            missing = table.missing([record["run_id"] for record in having])
        for record in (each for each in having if each["run_id"] in missing):
            run = _read_run(storage, folder, record)
            check()
            with _one_line_errors(folder):
                table.add(run)
            added.add(record["run_id"])
    if added:
        console.print(f"committed to the {config.table} tables: {', '.join(sorted(added))}")


def _read_run(storage: Storage, folder: str, record: Mapping[str, Any]) -> _Run:
    """Return one table's files of a published run."""
    infos = list(storage.list(storage.join(folder, f"run={record['run_id']}"), (".parquet",)))
    if not infos:
        raise StorageError(f"{folder}/run={record['run_id']}: the files of this published run are gone")
    footers = [storage.read_footer(info.uri) for info in infos]
    return _Run(
        run_id=record["run_id"],
        published_at=datetime.datetime.fromisoformat(record["published_at"]),
        schema=footers[0].schema.to_arrow_schema(),
        num_rows={info: each.num_rows for info, each in zip(infos, footers, strict=True)},
    )


class _DeltaTable:
    """A Delta table, whose log is in `folder`/_delta_log/. Each run is an application transaction, named by its id."""

    def __init__(self, storage: Storage, folder: str) -> None:
        from deltalake import DeltaTable
        from deltalake.exceptions import TableNotFoundError

        self._uri, self._options = folder, storage.delta_options(folder)
        self._table: DeltaTable | None = None
        with suppress(TableNotFoundError):  # `is_deltatable` would stop all threads of this process while it waits
            self._table = DeltaTable(folder, storage_options=self._options)
        if self._table is not None:
            columns = [field.name for field in self._table.schema().fields]
            _check_ours(folder, columns, self._table.metadata().partition_columns)

    def missing(self, run_ids: Iterable[str]) -> set[str]:
        """Return the runs that the table lacks, as this process has read it."""
        if self._table is None:
            return set(run_ids)
        # Looking for a transaction reads the log each time, so first look for the files. OPTIMIZE replaces them.
        folders = {uri.split("/")[-2] for uri in self._table.file_uris()}
        return {run_id for run_id in run_ids if f"run={run_id}" not in folders and not self._has(run_id)}

    def _has(self, run_id: str) -> bool:
        return self._table is not None and self._table.transaction_version(run_id) is not None

    def add(self, run: _Run) -> None:
        """Add a run. Fails if another process has added it since this one has read the table."""
        from deltalake import CommitProperties, DeltaTable, Schema, Transaction
        from deltalake.transaction import AddAction, RemoveAction

        schema = Schema.from_arrow(run.schema)
        if self._table is None:
            self._table = DeltaTable.create(
                self._uri, schema, mode="ignore", configuration=_DELTA_CONFIGURATION, storage_options=self._options
            )
        fields = self._table.schema().fields
        if new := [field for field in schema.fields if field not in fields]:
            self._table.alter.add_columns(new)
        if self._has(run.run_id):  # added since `missing`
            return
        actions: list[AddAction | RemoveAction] = [
            AddAction(
                path=f"run={run.run_id}/{info.key}",
                size=info.size_bytes,
                partition_values={},
                modification_time=int(run.published_at.timestamp() * 1000),
                data_change=True,
                stats=_delta_stats(run.run_id, num_rows),
            )
            for info, num_rows in run.num_rows.items()
        ]
        # deltalake fails if a commit since this process has read the table has the same application transaction.
        properties = CommitProperties({RUN_ID.name: run.run_id}, app_transactions=[Transaction(run.run_id, 0)])
        self._table.create_write_transaction(actions, "append", schema, commit_properties=properties)
        self._table.update_incremental()


def _delta_stats(run_id: str, num_rows: int) -> str:
    bound = {RUN_ID.name: run_id}
    return json.dumps({"numRecords": num_rows, "minValues": bound, "maxValues": bound, "nullCount": {RUN_ID.name: 0}})


class _IcebergTable:
    """A table of an Iceberg catalogue. Its properties name its runs: snapshots name them, too, but expire."""

    def __init__(self, catalog: Catalog, config: ScoreConfig, name: str) -> None:
        self._catalog, self._namespace = catalog, config.iceberg_namespace
        self._name = f"{self._namespace}.{name}"
        self._table = catalog.load_table(self._name) if catalog.table_exists(self._name) else None
        if self._table is not None:
            _check_ours(self._name, self._table.schema().column_names)

    def missing(self, run_ids: Iterable[str]) -> set[str]:
        """Return the runs that the table lacks, as this process has read it."""
        return {run_id for run_id in run_ids if self._table is None or _property(run_id) not in self._table.properties}

    def add(self, run: _Run) -> None:
        """Add a run. Fails if another process has written to the table since this one has read it."""
        if self._table is None:
            if not self._catalog.namespace_exists(self._namespace):
                self._catalog.create_namespace_if_not_exists(self._namespace)
            self._table = self._catalog.create_table_if_not_exists(
                self._name, run.schema, properties=_ICEBERG_PROPERTIES
            )
        if not self.missing([run.run_id]):  # added since
            return
        wrong = {key: value for key, value in _ICEBERG_PROPERTIES.items() if self._table.properties.get(key) != value}
        if wrong:  # somebody else made the table, or changed it
            with self._table.transaction() as transaction:
                transaction.set_properties(wrong)
        with self._table.transaction() as transaction:
            with transaction.update_schema() as update:
                update.union_by_name(run.schema)
            transaction.set_properties({_property(run.run_id): run.published_at.isoformat()})
            # Without empty files: pyiceberg warns of each column of theirs.
            if uris := [info.uri for info, num_rows in run.num_rows.items() if num_rows]:
                # The property guards against a second commit. pyiceberg's own check reads all manifests.
                transaction.add_files(uris, {"agr-ray.run": run.run_id}, check_duplicate_files=False)


def _property(run_id: str) -> str:
    return f"agr-ray.run.{run_id}"


def _open_catalog(storage: Storage, config: ScoreConfig, out: str) -> Catalog:
    """Open the catalogue that pyiceberg's configuration describes, and make one request to it."""
    properties = storage.iceberg_properties(out)
    with _one_line_errors(f"score.iceberg_catalog {config.iceberg_catalog}"):
        from pyiceberg.catalog import load_catalog  # which reads its configuration

        catalog = load_catalog(config.iceberg_catalog, **properties)
        catalog.namespace_exists(config.iceberg_namespace)
    return catalog


def _check_ours(name: str, columns: Collection[str], partitioned_by: Sequence[str] = ()) -> None:
    """Reject a table of another program, to which both libraries would add our columns.

    Raises:
        StorageError: it is one.
    """
    problems = [] if RUN_ID.name in columns else [f"has no column {RUN_ID.name}"]
    problems += [f"is partitioned by {column}" for column in partitioned_by]
    if problems:
        raise StorageError(f"{name}: there is a table that is not one of agr-ray's: it {' and '.join(problems)}")


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turn the errors of deltalake and pyiceberg, which have no class in common, into one line.

    Raises:
        StorageError: a retry would not help.
        StorageUnavailable: it may.
    """
    try:
        yield
    except (StorageError, StorageUnavailable):
        raise
    except Exception as error:
        reason = redacted(" ".join(_NOISE.sub("", f"{type(error).__name__}: {error}").split()))[:_MAX_REASON]
        problem = StorageUnavailable if _may_pass(error) else StorageError
        raise problem(f"{what}: can't be read or written: {reason}") from None


def _may_pass(error: Exception) -> bool:
    """Return whether another attempt may succeed. By names, because the classes are of libraries that are optional."""
    text = " ".join(_NOISE.sub("", str(error)).split())
    names = {f"{each.__module__}.{each.__qualname__}" for each in type(error).__mro__}
    return (bool(names & _OUTAGES) or bool(_OUTAGE_TEXT.search(text))) and _NO_DATABASE not in text

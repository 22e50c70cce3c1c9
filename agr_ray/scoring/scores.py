"""Published scoring runs as DuckDB relations."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from agr_ray.errors import ConfigError
from agr_ray.scoring.publish import published_runs, views_sql
from agr_ray.storage import Storage

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation


class Scores:
    """All published runs of a results folder, by the views of its views.sql; see docs/operations.md.

    Each relation has DuckDB's methods, such as `.df()`, `.arrow()`, `.filter("age < 18")` and `.aggregate(...)`.
    """

    def __init__(self, uri: str, connection: DuckDBPyConnection, *, has_images: bool) -> None:
        self.uri = uri
        """Of the results folder."""
        self.connection = connection
        """DuckDB connection with the views that the properties return."""
        self._has_images = has_images

    def __repr__(self) -> str:
        """Return where the results are, how many runs there are, and which relations they have."""
        ((num_runs,),) = self.query("SELECT count(*) FROM runs").fetchall()
        names = ("runs", "demographics", *(("images", "faces", "rejects") if self._has_images else ()))
        return f"<Scores {self.uri}, runs: {num_runs:,}, relations: {', '.join(names)}>"

    @property
    def runs(self) -> DuckDBPyRelation:
        """Return a row for each published run."""
        return self.connection.view("runs")

    @property
    def demographics(self) -> DuckDBPyRelation:
        """Return schema.DEMOGRAPHICS of all runs, each row with its `run_id`."""
        return self.connection.view("demographics")

    @property
    def images(self) -> DuckDBPyRelation:
        """Return schema.IMAGES, each image as it was last scored.

        Raises:
            ConfigError: all runs are aggregate_only, and so published no image rows.
        """
        return self._rows("images")

    @property
    def faces(self) -> DuckDBPyRelation:
        """Return schema.FACES of these images; raises as `images`."""
        return self._rows("faces")

    @property
    def rejects(self) -> DuckDBPyRelation:
        """Return schema.REJECTS of these images; raises as `images`."""
        return self._rows("rejects")

    def query(self, sql: str) -> DuckDBPyRelation:
        """Return the result of a query over the views."""
        return self.connection.sql(sql)

    def _rows(self, name: str) -> DuckDBPyRelation:
        if not self._has_images:
            raise ConfigError(f"there are no {name}: every run was scored with score.aggregate_only")
        return self.connection.view(name)


def open_scores(uri: str | os.PathLike[str], *, storage: Storage | None = None) -> Scores:
    """Open the results of `score`.

    Args:
        uri: `score.out`, a folder or s3:// prefix, or a copy of it.
        storage: reads it; None: storage with default settings.

    Raises:
        ConfigError: no run is published there.
        StorageUnavailable: the S3 server can't be reached.
    """
    import duckdb

    storage = storage or Storage()
    out = storage.absolute(os.fspath(uri)).rstrip("/")
    if not published_runs(storage, out):
        if not storage.exists(out):
            raise ConfigError(f"{uri}: there is no such folder")
        raise ConfigError(f"{uri}: there is no published scoring run (a file _SUCCESS/run=ID.json)")
    has_images = storage.exists(storage.join(out, "images"))
    connection = duckdb.connect()
    connection.execute(views_sql(storage, out, has_images=has_images))
    return Scores(out, connection, has_images=has_images)

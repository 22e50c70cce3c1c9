"""Publish a finished scoring run: its parts become images/, faces/, rejects/ and demographics/.

Each file of the run's manifest becomes one file in each of the first three, under a name that only depends on its
number, so a killed job can publish again. All files are first written to the run's work folder. Once all are complete,
they are moved into OUT: on a local disk one table's folder at a time, on S3 by server-side copies, file by file.
Moving the run's record to `_SUCCESS/run=ID.json` then publishes the run. A job that takes over the lock first deletes
all records that wait to be moved, so a job that was suspended just before that step can no longer publish. If a job is
killed while files are moved, the next job with the same OUT deletes them, whatever it scores; `views.sql` never shows
them.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import re
import urllib.parse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from agr_ray.config.scoring import NearDuplicates
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.shift import Reference
from agr_ray.labels import IntArray, LabelSpace
from agr_ray.schema import DEMOGRAPHIC_ATTRIBUTES, IMAGES, REJECTS, RUN_ID, Status
from agr_ray.storage import MissingObject, Storage, StorageFailed
from agr_ray.storage.lock import LockLost
from agr_ray.storage.parts import PARTS_PER_FILE, Parts
from agr_ray.storage.retry import Retry
from agr_ray.tables.demographics import demographics
from agr_ray.tables.duplicates import MAX_DISTANCE, DistinctFaces, face_codes, joined
from agr_ray.tables.face_rows import (
    count_faces,
    count_images,
    explode_faces,
    hashed_faces,
    select_rejects,
    shift_values,
    sum_counts,
    without_hashes,
)
from agr_ray.tables.suppression import suppress

SUCCESS: Final = "_SUCCESS"
LEDGER_COLUMNS: Final = ("image_id", "status", "storage_class")
TABLES: Final = ("demographics", "rejects", "faces", "images")
"""Tables in publishing order."""
LEDGER: Final = "ledger"
_HASHED: Final = "hashed"
"""Staged rows of `face_rows.hashed_faces`, which are never published."""
_RUN_FOLDER = re.compile(r"run=(\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{8})/")
MAX_FACES: Final = 20_000_000
"""Maximum faces of a run among which near-duplicates are looked for."""
INCONCLUSIVE: Final = (str(Status.CHANGED), str(Status.FAILED), str(Status.ARCHIVED))
"""Statuses that say nothing about an image's content: an earlier row of the image stays valid."""
NUM_READS: Final = 8


class Counts(NamedTuple):
    """Counts of one file, or of several added up."""

    cells: pa.Table
    """`tables.face_rows.count_faces` by the grouping columns."""
    groups: pa.Table
    """`tables.face_rows.count_images` by the grouping columns."""
    statuses: Counter[str]
    """Images by status."""
    bins: Mapping[str, IntArray]
    """`evaluation.shift.Reference.count` of all faces; empty without a reference."""


@dataclass(frozen=True)
class Publication:
    """Settings for turning parts into published files."""

    storage: Storage
    work: str
    out: str
    run_id: str
    started_at: datetime.datetime
    num_parts: int
    attributes: tuple[str, ...]
    space: LabelSpace
    group_by: tuple[str, ...]
    aggregate_only: bool
    ledger: str
    key: bytes
    """Key of the HMACs that replace URIs; empty: URIs are kept."""
    outage_s: float
    reference: Reference | None = None
    """Of the calibration, with which the faces are compared."""
    near_duplicates: NearDuplicates = "off"
    """As in `ScoreConfig`."""

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Return the classes by which faces are counted: those of the predicted attributes."""
        predicted = {"age_group" if name == "age" else name for name in self.attributes}
        return {name: names for name, names in self.space.classes.items() if name in predicted}

    @property
    def num_files(self) -> int:
        """Return the number of files: at least one, so that readers of an empty run find its columns."""
        return max(1, -(-self.num_parts // PARTS_PER_FILE))

    def stage_file(self, file: int) -> Counts:
        """Write one file of each table to the work folder, and return its counts."""
        return Retry(self.outage_s).call(lambda: self._stage_file(file))

    def _stage_file(self, file: int) -> Counts:
        images = self._image_rows(file)
        faces = explode_faces(images, self.group_by)
        counts = Counts(
            count_faces(faces, self.group_by, self.space),
            count_images(images, faces, self.group_by),
            Counter(images["status"].to_pylist()),
            {} if self.reference is None else self.reference.count(shift_values(faces, self.space)),
        )
        if self.near_duplicates != "off":
            self._write(hashed_faces(faces, self.group_by, self.space), _HASHED, file)
        kept = images.select(IMAGES.names)
        if self.near_duplicates != "publish":
            kept = without_hashes(kept)
        if self.key:
            kept = pseudonymised(kept, self.key, self.started_at)
        if self.aggregate_only:
            self._write(kept.select(LEDGER_COLUMNS), LEDGER, file)
        else:
            kept = kept.sort_by("uri")
            for name, table in (
                ("images", kept),
                ("faces", explode_faces(kept)),
                ("rejects", select_rejects(kept)),
            ):
                self._write(table, name, file)
        return counts

    @property
    def targets(self) -> dict[str, str]:
        """Return the folder of each of the run's published tables, in publishing order."""
        folder = f"run={self.run_id}"
        if self.aggregate_only:
            return {
                LEDGER: self.storage.join(self.ledger, folder),
                "demographics": self.storage.join(self.out, "demographics", folder),
            }
        return {name: self.storage.join(self.out, name, folder) for name in TABLES}

    def staged(self, table: str) -> str:
        """Return the folder in which a table is staged before it is published."""
        return self.storage.join(self.work, "staged", self.run_id, table)

    def file(self, table: str, number: int) -> str:
        """Return the URI of a staged file."""
        return self.storage.join(self.staged(table), f"{table}-{number:05d}.parquet")

    def _write(self, table: pa.Table, name: str, file: int) -> None:
        self.storage.write_table(table, self.file(name, file))

    def _image_rows(self, file: int) -> pa.Table:
        """Return the image rows of a file's parts, with the grouping columns of the manifest."""
        first = file * PARTS_PER_FILE
        numbers = range(first, min(first + PARTS_PER_FILE, self.num_parts))
        if not numbers:
            grouping = [pa.field(name, pa.string()) for name in self.group_by]
            return pa.schema([*IMAGES, *grouping]).empty_table()
        with ThreadPoolExecutor(NUM_READS) as pool:
            parts = Parts(self.storage, self.work)  # the caller retries
            images = pa.concat_tables(pool.map(self.storage.read_table, map(parts.uri, numbers)))
            manifest = pa.concat_tables(pool.map(parts.rows, numbers))
        # A part has the rows of its row group, in their order.
        if images["image_id"].combine_chunks() != manifest["image_id"].combine_chunks():
            raise RuntimeError(f"{self.work}: the parts of manifest file {file} do not hold its rows")
        run_ids = pa.array([self.run_id] * images.num_rows, pa.string())
        images = images.set_column(IMAGES.get_field_index(RUN_ID.name), RUN_ID, run_ids)
        for name in self.group_by:
            images = images.append_column(name, manifest[name])
        return images


def pseudonymised(images: pa.Table, key: bytes, scored_at: datetime.datetime) -> pa.Table:
    """Replace everything that names or identifies an image: URI and id by HMACs, etag and size by null.

    Errors quote them, so errors are null too, and only the status says why an image was rejected. All rows get the same
    `scored_at`, the start of the run, because exact times would reveal the order of the keys.
    """
    aliases = [pseudonym(uri, key) for uri in images["uri"].to_pylist()]
    columns = {
        "image_id": pa.array([pseudonym(image, key) for image in images["image_id"].to_pylist()], pa.string()),
        "uri": pa.array(aliases, pa.string()),
        "etag": pa.nulls(images.num_rows, pa.string()),
        "size_bytes": pa.nulls(images.num_rows, pa.int64()),
        "error": pa.nulls(images.num_rows, pa.string()),
        "scored_at": pa.array([scored_at] * images.num_rows, IMAGES.field("scored_at").type),
    }
    return pa.table({name: columns.get(name, images[name]) for name in images.column_names}, schema=images.schema)


def pseudonym(text: str, key: bytes) -> str:
    """Return 32 hex digits of the HMAC-SHA256 of a text."""
    return hmac.digest(key, text.encode(), hashlib.sha256).hex()[:32]


def add_counts(counts: Sequence[Counts], group_by: Sequence[str]) -> Counts:
    """Add up the counts of all files."""
    return Counts(
        sum_counts([each.cells for each in counts], [*group_by, *DEMOGRAPHIC_ATTRIBUTES]),
        sum_counts([each.groups for each in counts], group_by),
        sum((each.statuses for each in counts), Counter()),
        {name: np.sum([each.bins[name] for each in counts], axis=0) for name in counts[0].bins},
    )


def distinct_faces(publication: Publication, groups: pa.Table, progress: Callable[[int], None]) -> DistinctFaces:
    """Find the near-duplicates among the faces of all files; they need about 100 bytes of memory each.

    Args:
        publication: the publication, with the rows of all files staged.
        groups: `Counts.groups` of all files.
        progress: called with the number of files that were read.
    """
    storage, classes, parts = publication.storage, publication.classes, []
    for file in range(publication.num_files):
        uri = publication.file(_HASHED, file)
        table = Retry(publication.outage_s).call(lambda uri=uri: storage.read_table(uri))  # type: ignore[misc]
        parts.append(face_codes(table, groups, publication.group_by, classes))
        progress(file + 1)
    hashes, group, codes = (np.concatenate(each) for each in zip(*parts, strict=True))
    number = joined(hashes, MAX_DISTANCE)
    return DistinctFaces(number, group, dict(zip(classes, codes.T, strict=True)), groups.num_rows)


def stage_demographics(
    publication: Publication,
    counts: Counts,
    calibration: Calibration | None,
    min_cell: int,
    distinct: DistinctFaces | None = None,
) -> None:
    """Write the run's demographic tables to the staging folder."""
    table = demographics(
        counts.cells,
        counts.groups,
        None if calibration is None else calibration.rows,
        publication.classes,
        distinct=distinct,
    )
    if min_cell:
        table = suppress(table, min_cell)
    run_ids = pa.array([publication.run_id] * table.num_rows, pa.string())
    table = table.append_column(RUN_ID, run_ids)
    uri = publication.storage.join(publication.staged("demographics"), "demographics.parquet")
    publication.storage.write_table(table, uri)


def published_runs(storage: Storage, out: str) -> list[dict[str, Any]]:
    """Return the records of all published runs, oldest first."""
    folder = storage.join(out, SUCCESS)
    uris = [info.uri for info in storage.list(folder, (".json",))] if storage.exists(folder) else []
    with ThreadPoolExecutor(NUM_READS) as pool:
        return [json.loads(body) for body in pool.map(storage.read, uris)]


def publish(publication: Publication, record: dict[str, Any], check: Callable[[], None]) -> None:
    """Move the run's files into OUT and mark the run as published; this is the last step.

    Args:
        publication: the publication, with all files written.
        record: content of `_SUCCESS/run=ID.json`.
        check: called before each step; raises if the run may no longer publish.

    Raises:
        LockLost: another job has deleted the waiting record.
    """
    storage, run_id = publication.storage, record["run_id"]
    waiting = _waiting_uri(storage, publication.out, run_id)
    check()
    storage.write(waiting, (json.dumps(record, indent=2) + "\n").encode())
    for name, target in publication.targets.items():
        check()
        storage.move_tree(publication.staged(name), target)
        if not storage.exists(target):
            raise StorageFailed(f"{publication.staged(name)} is gone, so run={run_id} can't be published")
    check()
    has_images = storage.exists(storage.join(publication.out, "images"))
    sql = views_sql(storage, publication.out, has_images=has_images)
    storage.write(storage.join(publication.out, "views.sql"), sql.encode())
    check()
    try:
        storage.move(waiting, _success_uri(storage, publication.out, run_id))
    except MissingObject:
        raise LockLost(f"another job writes to {publication.out}; run={run_id} is not published") from None
    storage.delete_if_empty(_waiting_uri(storage, publication.out))


def withdraw_waiting(storage: Storage, out: str) -> None:
    """Delete the records that wait to be published, so that no job that lost its lock can publish any more."""
    waiting = _waiting_uri(storage, out)
    if storage.exists(waiting):
        for info in storage.list(waiting):
            storage.delete(info.uri)
        storage.delete_if_empty(waiting)


def delete_unpublished(storage: Storage, out: str) -> list[str]:
    """Delete the files in OUT that killed jobs did not publish; return the jobs' run ids.

    Call it only while no other job can publish, after `withdraw_waiting`. Folders not named like runs are left alone.
    """
    left: list[str] = []
    for table in TABLES:
        folder = storage.join(out, table)
        for run_id in run_folders(storage, out, table):
            if not is_published(storage, out, run_id):
                storage.delete_tree(storage.join(folder, f"run={run_id}"))
                left.append(run_id)
        if storage.exists(folder):
            storage.delete_if_empty(folder)
    return list(dict.fromkeys(left))


def run_folders(storage: Storage, out: str, table: str) -> list[str]:
    """Return the ids of the runs that have files in a table's folder, published or not."""
    folder = storage.join(out, table)
    keys = (info.key for info in storage.list(folder)) if storage.exists(folder) else ()
    return list(dict.fromkeys(match[1] for match in map(_RUN_FOLDER.match, keys) if match))


def is_published(storage: Storage, out: str, run_id: str) -> bool:
    """Return whether the run is published."""
    return storage.exists(_success_uri(storage, out, run_id))


def _waiting_uri(storage: Storage, out: str, run_id: str = "") -> str:
    """Return the URI at which a run's record waits to be moved to `_SUCCESS`; without a run, their folder."""
    folder = storage.join(f"{out}-work", "publishing")
    return storage.join(folder, f"run={run_id}.json") if run_id else folder


def _success_uri(storage: Storage, out: str, run_id: str) -> str:
    return storage.join(out, SUCCESS, f"run={run_id}.json")


def views_sql(storage: Storage, out: str, *, has_images: bool) -> str:
    """Return the SQL of DuckDB views over all published runs; without `has_images`, only runs and demographics.

    Columns come only from the files; by default, DuckDB would also derive columns from folders above `out` named
    `name=value`.
    """
    quoted = re.sub(r"([*?\[])", r"[\1]", out).replace("'", "''")  # characters that DuckDB treats as glob patterns
    sql = f"""-- Views over the published runs, for DuckDB: duckdb -init views.sql
{_secret_sql(storage, out)}CREATE OR REPLACE VIEW runs AS
    SELECT * FROM read_json('{quoted}/{SUCCESS}/run=*.json', union_by_name = true, hive_partitioning = false);
CREATE OR REPLACE VIEW demographics AS
    SELECT d.*
    FROM read_parquet('{quoted}/demographics/run=*/*.parquet', union_by_name = true, hive_partitioning = false) AS d
    SEMI JOIN runs USING (run_id);
"""
    if not has_images:
        return sql
    inconclusive = ", ".join(f"'{status}'" for status in INCONCLUSIVE)
    return f"""{sql}
-- Each image has its latest score. A status that says nothing about the content ({", ".join(INCONCLUSIVE)})
-- never hides an earlier row. An image that was deleted from its bucket stays: scoring does not look for
-- deleted keys.
CREATE OR REPLACE VIEW images AS
    SELECT i.*
    FROM read_parquet('{quoted}/images/run=*/*.parquet', union_by_name = true, hive_partitioning = false) AS i
    SEMI JOIN runs USING (run_id)
    QUALIFY row_number() OVER (
        PARTITION BY i.uri ORDER BY i.status IN ({inconclusive}), i.scored_at DESC, i.run_id DESC
    ) = 1;
CREATE OR REPLACE VIEW faces AS
    SELECT f.*
    FROM read_parquet('{quoted}/faces/run=*/*.parquet', union_by_name = true, hive_partitioning = false) AS f
    SEMI JOIN images USING (image_id, run_id);
CREATE OR REPLACE VIEW rejects AS
    SELECT {", ".join(REJECTS.names)} FROM images WHERE status NOT IN ('ok', 'no_face');
"""


def _secret_sql(storage: Storage, out: str) -> str:
    """Return the DuckDB secret for the S3 server of `out`; empty for a local folder."""
    address = storage.s3_address(out)
    if address is None:
        return ""
    settings = {"REGION": address.region, "SCOPE": out}
    if address.endpoint_url:
        settings["ENDPOINT"] = urllib.parse.urlsplit(address.endpoint_url).netloc
        settings["URL_STYLE"] = "vhost" if address.addressing_style == "virtual" else "path"
    lines = ["TYPE s3", *([] if address.anonymous else ["PROVIDER credential_chain"])]
    lines += [f"{name} '{value.replace(chr(39), chr(39) * 2)}'" for name, value in settings.items()]
    if (address.endpoint_url or "").startswith("http://"):
        lines.append("USE_SSL false")
    text = ",\n".join(f"    {line}" for line in lines)
    return f"""-- Credentials come from the usual AWS sources (AWS_ACCESS_KEY_ID, AWS_PROFILE, a role), not this file.
CREATE OR REPLACE SECRET agr_ray (
{text}
);
"""

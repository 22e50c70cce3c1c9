"""What a scoring run is to do, decided once and out of core: an immutable manifest, cut into numbered parts.

    OUT/parts-000000.parquet ...   schema.SCORE_MANIFEST, in the order of the input; PARTS_PER_FILE row groups each
    OUT/plan.json                  counts; written last

A row group is a part: the photographs that one task scores into one output file of the same number, so that a run
that was killed only lists which outputs exist. All parts but the last have the same number of rows.

The input and what is scored already stream through Parquet files in a temporary folder, which DuckDB joins within a
memory limit: neither is ever in memory as a whole.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from agr_ray.config import ScoreConfig
from agr_ray.data.inventory import LISTED, InventoryError, read_inventory
from agr_ray.data.manifest import IMAGE_SUFFIXES, image_id
from agr_ray.errors import ConfigError
from agr_ray.schema import IMAGES, SCORE_MANIFEST, Status
from agr_ray.scoring.grouping import Grouping, make_grouping
from agr_ray.storage import BadUri, MissingObject, Storage, StorageUnavailable
from agr_ray.storage.scratch import scratch_folder

PLAN: Final = "plan.json"
RETRIED: Final = (str(Status.FAILED), str(Status.MISSING), str(Status.CHANGED))
"""What says nothing of the content that was listed: the next run tries it again, if it is still listed."""
MAX_ENDINGS: Final = 10
"""Number of endings of left-out keys that a plan counts."""
MAX_GROUPS: Final = 10_000
"""Of score.group_by: each makes up to a hundred rows of demographics, which are worked out together."""
PARTS_PER_FILE: Final = 256
"""Readers of one part read the footer of its file, which grows with the row groups."""

MEMORY_LIMIT: Final = "1GB"
"""Of DuckDB, which goes to the temporary folder beyond it."""
NUM_THREADS: Final = 4
"""Of DuckDB at most: each takes its share of the memory."""

_BATCH_ROWS = 65_536
_LISTED_ROWS = 8192  # at a time: a trial of a few keys should not list many
_BUFFER_BYTES = 2**23
_FILES_AHEAD = 16
_ENDING = r"(?P<ending>(?:\.[^./]{1,10})?)$"
_GLOB_TOKEN = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^]/]*\]|.", re.DOTALL)
SCORED: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("is_archived", pa.bool_(), nullable=False),
        pa.field("storage_class", pa.string()),
    ]
)
"""Schema of already scored photographs, one row each."""
_STATUSES = pa.schema([IMAGES.field(name) for name in ("image_id", "status", "storage_class")])
_SPOOLED = pa.schema([*SCORE_MANIFEST, pa.field("scored_id", pa.string())])


@dataclass(frozen=True, slots=True)
class Plan:
    """Counts of a planned run: listed = excluded + scored + duplicates + to do."""

    num_listed: int
    """Objects looked at: all of the input, or as many as `limit` needed."""
    num_excluded: int
    """Left out by patterns and min_bytes."""
    num_scored: int
    """Scored before, so skipped."""
    num_duplicates: int
    """Further rows of one URI and etag."""
    num_to_do: int
    """Rows of the manifest."""
    num_parts: int
    rows_per_part: int
    endings_left_out: dict[str, int]
    """Number of left-out keys by lower-case ending, most frequent first; the empty ending stands for none."""
    num_grouped: dict[str, int]
    """Rows of the manifest with a value, by column of score.group_by."""


@dataclass(slots=True)
class _Counter:
    """What the stream of listed objects counts as it flows."""

    listed: int = 0
    kept: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    """Endings of left-out keys."""


def plan(
    storage: Storage,
    config: ScoreConfig,
    out: str,
    scored: Iterable[pa.RecordBatch] = (),
    *,
    scored_as: Callable[[str], str] | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Plan:
    """Write the manifest of a run to the new folder or prefix `out`, whole or not at all, and return its counts.

    The rows are the filtered input, each URI and etag once, without those in `scored`. They are in input order or,
    with `scored_as`, sorted by the mapped ids, which reveals nothing about the keys. The same input always gives the
    same manifest. A manifest without rows has no parts.

    Args:
        storage: of the input and of `out`.
        config: names the input, the filters, the limit and the rows of a part (rows_per_file).
        out: nothing whole is there yet (`read_plan` returns None).
        scored: photographs to skip, with schema `SCORED` (`scored_ids`).
        scored_as: makes the id in `scored` from our image_id, where they differ (an HMAC); none: they are the same.
        progress: called with the number of listed objects and a remark, every few thousand rows and before the
            manifest is written; it may raise to stop the planning.

    Raises:
        ConfigError: the input is not what its kind says, or a pattern can't be understood.
        FileExistsError: `out` holds a whole manifest.
        StorageUnavailable: input or output can't be reached.
    """
    uri, kind = _input(storage, config)
    keeps = _filter(config, kind)
    counter = _Counter()
    report = progress or (lambda _done, _remark: None)
    with scratch_folder() as folder:
        grouping = make_grouping(storage, config, folder)  # first, because listing can take hours
        kept = _kept(_listed(storage, uri, kind), keeps, config.limit, counter)
        listed = _spool(
            (_with_ids(batch, scored_as) for batch in kept),
            f"{folder}/listed.parquet",
            _SPOOLED,
            lambda _: report(counter.listed, "listing"),
        )
        known = _spool(
            scored,
            f"{folder}/scored.parquet",
            SCORED,
            lambda num_rows: report(counter.listed, f"{num_rows:,} scored before"),
        )
        os.mkdir(f"{folder}/manifest")
        with _open_database(folder) as database:
            num_fresh, num_to_do = _select(database, listed, known)
            report(counter.listed, f"{num_to_do:,} to do")
            num_grouped = _check_groups(database, listed, grouping)
            schema = pa.schema([*SCORE_MANIFEST, *grouping.fields])
            rows = _rows_to_do(database, listed, grouping)
            _write_parts(rows, schema, f"{folder}/manifest", config.rows_per_file)
        made = Plan(
            num_listed=counter.listed,
            num_excluded=counter.listed - counter.kept,
            num_scored=counter.kept - num_fresh,
            num_duplicates=num_fresh - num_to_do,
            num_to_do=num_to_do,
            num_parts=-(-num_to_do // config.rows_per_file),
            rows_per_part=config.rows_per_file,
            endings_left_out=dict(counter.endings.most_common(MAX_ENDINGS)),
            num_grouped=num_grouped,
        )
        report(counter.listed, f"{num_to_do:,} to do")
        with open(f"{folder}/manifest/{PLAN}", "w", encoding="utf-8") as file:
            json.dump(asdict(made), file, indent=2)
        storage.upload_tree(f"{folder}/manifest", out, marker=PLAN)
    return made


def read_plan(storage: Storage, out: str) -> Plan | None:
    """Return the counts of the manifest at `out`, or None if there is no whole one."""
    try:
        return Plan(**json.loads(storage.read(storage.join(out, PLAN))))
    except MissingObject:
        return None


def read_part(storage: Storage, out: str, number: int) -> pa.Table:
    """Return the rows of one part, from 0, of the manifest at `out`: schema.SCORE_MANIFEST and the grouping columns.

    Raises:
        MissingObject: there is no such manifest.
        StorageUnavailable: it can't be read.
    """
    uri = storage.join(out, _file_name(number // PARTS_PER_FILE))
    fs, path = storage.arrow_filesystem(uri)
    try:
        with pq.ParquetFile(path, filesystem=fs) as file:
            return file.read_row_group(number % PARTS_PER_FILE)
    except FileNotFoundError:
        raise MissingObject(f"{uri} does not exist") from None
    except OSError as error:
        raise StorageUnavailable(f"{uri} can't be read: {_one_line(error)}") from error


def photograph_id(uri: str, etag: str | None) -> str:
    """Return the image_id of a photograph to score: another etag is another photograph; none known is one for ever."""
    return image_id(f"{uri}\n{etag or ''}")


def scored_ids(storage: Storage, folders: Iterable[str]) -> Iterator[pa.RecordBatch]:
    """Yield the photographs to skip, with schema `SCORED`: rows whose status is not in `RETRIED`.

    An archived photograph is skipped only as long as its storage class stays the same.

    Several files are read at a time, for there are many small ones, and few batches are held. A folder that does
    not exist holds none.

    Args:
        storage: storage of the folders.
        folders: folders of Parquet files with the columns image_id, status and storage_class.

    Raises:
        StorageUnavailable: a file can't be read.
    """
    is_archived = pc.field("status") == str(Status.ARCHIVED)
    columns = {
        "image_id": pc.field("image_id"),
        "is_archived": is_archived,
        "storage_class": pc.field("storage_class"),
    }
    for folder in folders:
        if storage.exists(folder):
            fs, _ = storage.arrow_filesystem(folder)
            paths = [storage.arrow_filesystem(info.uri)[1] for info in storage.list(folder, (".parquet",))]
            rows = pyarrow.dataset.dataset(paths, schema=_STATUSES, filesystem=fs, format="parquet")
            try:
                yield from rows.to_batches(
                    columns=columns,
                    filter=~pc.field("status").isin(RETRIED),
                    batch_readahead=_FILES_AHEAD,
                    fragment_readahead=_FILES_AHEAD,
                )
            except (OSError, pa.ArrowInvalid) as error:
                raise StorageUnavailable(f"{folder} can't be read: {_one_line(error)}") from error


# The input


def _input(storage: Storage, config: ScoreConfig) -> tuple[str, str]:
    """Return the input's URI and its kind: prefix, manifest or inventory."""
    if not config.input:
        raise ConfigError("score.input is empty: a folder, a bucket prefix, a Parquet manifest or an S3 Inventory")
    try:
        uri = storage.absolute(config.input)
    except BadUri as error:
        raise ConfigError(f"score.input: {error}") from None
    if config.input_kind != "auto":
        return uri, config.input_kind
    if uri.endswith("manifest.json"):
        return uri, "inventory"
    return uri, "manifest" if uri.rstrip("/").lower().endswith(".parquet") else "prefix"


def _listed(storage: Storage, uri: str, kind: str) -> Iterator[pa.RecordBatch]:
    """Yield what the input lists, as `LISTED`."""
    if kind == "prefix":
        return _list_prefix(storage, uri)
    batches = _read_manifest(storage, uri) if kind == "manifest" else _list_inventory(storage, uri)
    return map(_without_empty_etags, batches)


def _without_empty_etags(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return rows of `LISTED` whose empty etags, which no object has, are null: not known."""
    etags = batch.column("etag")
    known = pc.if_else(pc.equal(etags, ""), None, etags)
    return batch.set_column(batch.schema.get_field_index("etag"), LISTED.field("etag"), known)


def _list_prefix(storage: Storage, uri: str) -> Iterator[pa.RecordBatch]:
    if os.path.isfile(uri):  # never true of an s3:// URI
        raise ConfigError(
            f"score.input {uri} is a file: allowed are a folder, a bucket prefix, a .parquet manifest and the "
            "manifest.json of an S3 Inventory (score.input_kind)"
        )
    listed = storage.list_readable(uri)
    while infos := [*islice(listed, _LISTED_ROWS)]:
        columns = {name: [getattr(info, name) for info in infos] for name in LISTED.names}
        yield pa.RecordBatch.from_pydict(columns, schema=LISTED)


def _list_inventory(storage: Storage, uri: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from read_inventory(storage, uri)
    except InventoryError as error:
        raise ConfigError(f"score.input {uri}: {error}") from error
    except MissingObject:
        raise ConfigError(f"score.input {uri}: there is no such inventory") from None


def _read_manifest(storage: Storage, uri: str) -> Iterator[pa.RecordBatch]:
    if not storage.exists(uri):
        raise ConfigError(f"score.input {uri}: there is no such manifest")
    fs, path = storage.arrow_filesystem(uri)
    is_file = fs.get_file_info(path).is_file
    uris = [uri] if is_file else [info.uri for info in storage.list(uri, (".parquet",))]
    if not uris:
        raise ConfigError(f"score.input {uri}: a manifest's folder needs a .parquet file and holds none")
    for each in uris:
        try:
            yield from _manifest_rows(storage, each)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, BadUri) as error:
            raise ConfigError(f"score.input {each}: {_one_line(error)}") from error
        except OSError as error:
            raise StorageUnavailable(f"{each} can't be read: {_one_line(error)}") from error


def _manifest_rows(storage: Storage, uri: str) -> Iterator[pa.RecordBatch]:
    """Yield one file of a manifest as `LISTED`; its URIs, in their canonical form, are its keys too."""
    fs, path = storage.arrow_filesystem(uri)
    # The buffer, because whole columns of a row group are fetched without one.
    with pq.ParquetFile(path, filesystem=fs, buffer_size=_BUFFER_BYTES) as file:
        names = file.schema_arrow.names
        if "uri" not in names:
            raise ConfigError(f"score.input {uri}: a manifest needs the column uri and has {', '.join(names)}")
        given = [name for name in ("uri", "etag", "size_bytes", "storage_class") if name in names]
        for batch in file.iter_batches(_BATCH_ROWS, columns=given):
            columns = {field.name: pa.nulls(batch.num_rows, field.type) for field in LISTED}
            columns |= {name: batch.column(name).cast(LISTED.field(name).type) for name in given}
            if columns["uri"].null_count:
                raise ConfigError(f"score.input {uri}: a manifest's uri must not be null")
            uris = pa.array([storage.object_uri(each) for each in columns["uri"].to_pylist()], pa.string())
            columns |= {"uri": uris, "key": uris, "etag": pc.utf8_trim(columns["etag"], characters='"')}
            yield pa.record_batch([columns[name] for name in LISTED.names], schema=LISTED)


# Filters


def _filter(config: ScoreConfig, kind: str) -> Callable[[pa.RecordBatch], Any]:
    """Return what says of each row of `LISTED` whether it is kept."""
    include = _any_of("score.include", config.include)
    if not config.include and kind != "manifest":
        include = rf"(?i)(?:{'|'.join(re.escape(suffix) for suffix in IMAGE_SUFFIXES)})\z"
    exclude = _any_of("score.exclude", config.exclude)

    def keeps(batch: pa.RecordBatch) -> Any:
        keys = batch.column("key")
        kept = pc.fill_null(pc.greater_equal(batch.column("size_bytes"), config.min_bytes), True)
        if include:
            kept = pc.and_(kept, pc.match_substring_regex(keys, include))
        if exclude:
            kept = pc.and_not(kept, pc.match_substring_regex(keys, exclude))
        return kept

    return keeps


def _any_of(name: str, globs: Sequence[str]) -> str:
    """Return the regular expression of the keys that match one of the globs; empty if there is none."""
    try:
        return "|".join(glob_expression(glob) for glob in globs)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def glob_expression(glob: str) -> str:
    r"""Return the regular expression (RE2) of the keys that a glob matches from end to end, in their own case.

    `*` is any characters but a slash, `?` one of them, `[a-z]` one of a set and `[!a-z]` one not in it; `**` between
    slashes is any number of folders, and at the end everything below. Every other character is itself.

    Raises:
        ValueError: a set is not closed or out of order, or `**` is not a whole part between slashes.
    """
    if not glob or any("**" in part and part != "**" for part in glob.split("/")):
        raise ValueError(f"{glob!r} is not understood: ** must stand alone between slashes, as in **/*.jpg")
    fixed = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    made = ""
    for token in _GLOB_TOKEN.findall(glob):
        if token in fixed:
            made += fixed[token]
        elif token == "[":
            raise ValueError(f"{glob!r} is not understood: [ opens a set that no ] closes; [[] is a plain [")
        elif token.startswith("["):
            members = re.sub(r"([\\^\[\]])", r"\\\1", token[1:-1].removeprefix("!"))
            made += f"[^/{members}]" if token[1] == "!" else f"[{members}]"
        else:
            made += re.escape(token)
    try:
        re.compile(made)
    except re.error as error:
        raise ValueError(f"{glob!r} is not understood: {error}") from None
    return rf"(?s:\A{made}\z)"


def _kept(
    batches: Iterable[pa.RecordBatch],
    keeps: Callable[[pa.RecordBatch], Any],
    limit: int | None,
    counter: _Counter,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows that are kept, and stop at the limit: a trial must not list a whole bucket."""
    for batch in batches:
        kept = keeps(batch)
        indices = pc.indices_nonzero(kept)
        if limit is not None and counter.kept + len(indices) >= limit:
            indices = indices.slice(0, limit - counter.kept)
            counter.listed += indices[-1].as_py() + 1
            counter.kept = limit
            yield batch.take(indices)
            return
        counter.listed += batch.num_rows
        counter.kept += len(indices)
        left_out = batch.column("key").filter(pc.invert(kept))
        counter.endings.update(pc.utf8_lower(pc.extract_regex(left_out, _ENDING).field("ending")).to_pylist())
        if len(counter.endings) > 100 * MAX_ENDINGS:
            counter.endings = Counter(dict(counter.endings.most_common(10 * MAX_ENDINGS)))
        yield batch.take(indices)


# Through the temporary folder


def _with_ids(batch: pa.RecordBatch, scored_as: Callable[[str], str] | None) -> pa.RecordBatch:
    """Return rows of `LISTED` as `_SPOOLED`; scored_id is null where it is the image_id."""
    uris, etags = batch.column("uri"), batch.column("etag")
    ids = [photograph_id(uri, etag) for uri, etag in zip(uris.to_pylist(), etags.to_pylist(), strict=True)]
    scored = pa.nulls(len(ids)) if scored_as is None else pa.array([scored_as(each) for each in ids])
    columns = [pa.array(ids), uris, etags, batch.column("size_bytes"), batch.column("storage_class"), scored]
    return pa.record_batch([column.cast(field.type) for column, field in zip(columns, _SPOOLED, strict=True)], _SPOOLED)


def _spool(
    batches: Iterable[pa.RecordBatch], path: str, schema: pa.Schema, report: Callable[[int], None] | None = None
) -> str:
    """Write the batches to a Parquet file and return its path; tell `report` the rows so far."""
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=False) as writer:
        num_rows = 0
        for batch in batches:
            if batch.num_rows:
                writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
            num_rows += batch.num_rows
            if report is not None:
                report(num_rows)
    return path


def _open_database(folder: str) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(
        ":memory:",
        config={
            "memory_limit": MEMORY_LIMIT,
            "threads": min(NUM_THREADS, os.cpu_count() or 1),
            "temp_directory": f"{folder}/spill",
        },
    )


def _select(database: duckdb.DuckDBPyConnection, listed: str, scored: str) -> tuple[int, int]:
    """Make the table `to_do` of the positions in `listed` that are to be scored; count rows not scored, and these."""
    database.execute(
        """
        CREATE TEMP TABLE to_do AS
        SELECT min(file_row_number) AS position, count(*) AS num_rows
        FROM read_parquet(?, file_row_number = true) AS listed
        ANTI JOIN read_parquet(?) AS scored ON coalesce(listed.scored_id, listed.image_id) = scored.image_id
            AND (NOT scored.is_archived OR listed.storage_class IS NOT DISTINCT FROM scored.storage_class)
        GROUP BY listed.image_id
        """,
        [listed, scored],
    )
    ((num_rows, num_to_do),) = database.execute("SELECT coalesce(sum(num_rows), 0), count(*) FROM to_do").fetchall()
    return int(num_rows), int(num_to_do)


_TO_DO: Final = """
    SELECT image_id, uri, etag, size_bytes, storage_class{grouping.select}
    FROM (
        SELECT *, coalesce(scored_id, format('{{:020d}}', file_row_number)) AS listed_order
        FROM read_parquet(?, file_row_number = true)
        SEMI JOIN (SELECT position AS file_row_number FROM to_do) USING (file_row_number)
    ) AS listed
    {grouping.join}
"""


def _check_groups(database: duckdb.DuckDBPyConnection, listed: str, grouping: Grouping) -> dict[str, int]:
    """Refuse a grouping that makes a table as long as the bucket, before anything is scored.

    Returns:
        Number of photographs to score with a value, by grouping column.

    Raises:
        ConfigError: there are more than `MAX_GROUPS`.
    """
    if not grouping.names:
        return {}
    names = [f'"{name}"' for name in grouping.names]
    counted = ", ".join(f"count({name})" for name in names)
    sql = f"SELECT count(DISTINCT row({', '.join(names)})), {counted} FROM ({_TO_DO.format(grouping=grouping)})"
    ((num_groups, *num_known),) = database.execute(sql, [listed]).fetchall()
    if num_groups > MAX_GROUPS:
        raise ConfigError(
            f"score.group_by {', '.join(grouping.names)}: makes {num_groups:,} groups of these photographs; at most "
            f"{MAX_GROUPS:,} are allowed"
        )
    return dict(zip(grouping.names, num_known, strict=True))


def _rows_to_do(database: duckdb.DuckDBPyConnection, listed: str, grouping: Grouping) -> Iterator[pa.RecordBatch]:
    """Yield the rows of `to_do` as schema.SCORE_MANIFEST with the grouping columns, in their order."""
    rows = database.sql(f"{_TO_DO.format(grouping=grouping)} ORDER BY listed.listed_order", params=[listed])
    yield from rows.to_arrow_reader(_BATCH_ROWS)


def _write_parts(batches: Iterable[pa.RecordBatch], schema: pa.Schema, folder: str, rows_per_part: int) -> None:
    """Write the rows as parts: row groups of exactly `rows_per_part` rows, but for the last."""
    parts = enumerate(_parts(batches, schema, rows_per_part))
    for number, group in groupby(parts, key=lambda numbered: numbered[0] // PARTS_PER_FILE):
        path = os.path.join(folder, _file_name(number))
        with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=False) as writer:
            for _, part in group:
                writer.write_table(part, row_group_size=rows_per_part)


def _parts(batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows_per_part: int) -> Iterator[pa.Table]:
    rest = schema.empty_table()
    for batch in batches:
        rest = pa.concat_tables([rest, pa.Table.from_arrays(batch.columns, schema=schema)])
        num_whole = rest.num_rows // rows_per_part
        for number in range(num_whole):
            yield rest.slice(number * rows_per_part, rows_per_part)
        rest = rest.slice(num_whole * rows_per_part)
    if rest.num_rows:
        yield rest


def _file_name(number: int) -> str:
    return f"parts-{number:06d}.parquet"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

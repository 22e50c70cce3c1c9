"""List and filter the input of a scoring run. Rows are streamed: the input is never in memory as a whole."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from agr_ray.config import ScoreConfig
from agr_ray.data.inventory import LISTED, InventoryError, read_inventory
from agr_ray.data.manifest import IMAGE_SUFFIXES
from agr_ray.errors import ConfigError
from agr_ray.storage import BadUri, MissingObject, Storage, StorageUnavailable

MAX_ENDINGS: Final = 10
"""Maximum number of endings of left-out keys in a plan."""
_BATCH_ROWS = 65_536
_LISTED_ROWS = 8192  # at a time: few, so that a run with a small limit does not list many more
_BUFFER_BYTES = 2**23
_ENDING = r"(?P<ending>(?:\.[^./]{1,10})?)$"
_GLOB_TOKEN = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^]/]*\]|.", re.DOTALL)


class Listing:
    """The input of a run, and counts of what has been listed so far.

    Raises:
        ConfigError: there is no input, its URI is malformed, or a pattern is invalid.
    """

    def __init__(self, storage: Storage, config: ScoreConfig) -> None:
        self._storage = storage
        self._uri, self._kind = _input(storage, config)
        self._keeps = _filter(config, self._kind)
        self._limit = config.limit
        self.num_listed = 0
        self.num_kept = 0
        self.endings: Counter[str] = Counter()
        """Number of left-out keys by ending."""

    def kept(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows that pass the filters, as `LISTED`; at `limit`, stop without listing the rest.

        Raises:
            ConfigError: the input does not exist, or does not match its kind (score.input_kind).
            StorageUnavailable: it can't be reached.
        """
        for batch in _listed(self._storage, self._uri, self._kind):
            kept = self._keeps(batch)
            indices = pc.indices_nonzero(kept)
            if self._limit is not None and self.num_kept + len(indices) >= self._limit:
                indices = indices.slice(0, self._limit - self.num_kept)
                self.num_listed += indices[-1].as_py() + 1
                self.num_kept = self._limit
                yield batch.take(indices)
                return
            self.num_listed += batch.num_rows
            self.num_kept += len(indices)
            left_out = batch.column("key").filter(pc.invert(kept))
            self.endings.update(pc.utf8_lower(pc.extract_regex(left_out, _ENDING).field("ending")).to_pylist())
            if len(self.endings) > 100 * MAX_ENDINGS:
                self.endings = Counter(dict(self.endings.most_common(10 * MAX_ENDINGS)))
            yield batch.take(indices)


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
    """Yield the rows of the input, as `LISTED`."""
    if kind == "prefix":
        return _list_prefix(storage, uri)
    batches = _read_manifest(storage, uri) if kind == "manifest" else _list_inventory(storage, uri)
    return map(_without_empty_etags, batches)


def _without_empty_etags(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return rows of `LISTED` with null (unknown) for empty etags, which no object has."""
    etags = batch.column("etag")
    known = pc.if_else(pc.equal(etags, ""), None, etags)
    return batch.set_column(batch.schema.get_field_index("etag"), LISTED.field("etag"), known)


def _list_prefix(storage: Storage, uri: str) -> Iterator[pa.RecordBatch]:
    if os.path.isfile(uri):  # never true of an s3:// URI
        raise ConfigError(
            f"score.input {uri} is a file; give a folder, a bucket prefix, a .parquet manifest or the manifest.json "
            "of an S3 Inventory (score.input_kind)"
        )
    if "://" not in uri and not os.path.lexists(uri):
        raise ConfigError(f"score.input {uri}: there is no such folder")
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
        except (pa.ArrowException, UnicodeDecodeError, BadUri) as error:
            raise ConfigError(f"score.input {each}: {one_line(error)}") from error
        except OSError as error:
            raise StorageUnavailable(f"{each} can't be read: {one_line(error)}") from error


def _manifest_rows(storage: Storage, uri: str) -> Iterator[pa.RecordBatch]:
    """Yield one file of a manifest as `LISTED`. Its URIs, in their canonical form, are also its keys."""
    fs, path = storage.arrow_filesystem(uri)
    # Without a buffer, whole columns of a row group would be fetched.
    with pq.ParquetFile(path, filesystem=fs, buffer_size=_BUFFER_BYTES) as file:
        names = file.schema_arrow.names
        if "uri" not in names:
            raise ConfigError(f"score.input {uri}: a manifest needs the column uri and has {', '.join(names)}")
        given = [name for name in ("uri", "etag", "size_bytes", "storage_class") if name in names]
        for batch in file.iter_batches(_BATCH_ROWS, columns=given):
            batch.validate(full=True)  # text that is not UTF-8
            columns = {field.name: pa.nulls(batch.num_rows, field.type) for field in LISTED}
            columns |= {name: batch.column(name).cast(LISTED.field(name).type) for name in given}
            if columns["uri"].null_count:
                raise ConfigError(f"score.input {uri}: a manifest's uri must not be null")
            uris = pa.array([storage.object_uri(each) for each in columns["uri"].to_pylist()], pa.string())
            columns |= {"uri": uris, "key": uris, "etag": pc.utf8_trim(columns["etag"], characters='"')}
            yield pa.record_batch([columns[name] for name in LISTED.names], schema=LISTED)


def _filter(config: ScoreConfig, kind: str) -> Callable[[pa.RecordBatch], Any]:
    """Return a function from rows of `LISTED` to a mask of those to keep."""
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
    """Return a regular expression that matches any of the globs; empty without globs."""
    try:
        return "|".join(glob_expression(glob) for glob in globs)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def glob_expression(glob: str) -> str:
    r"""Return a regular expression (RE2) that matches the same whole keys as a case-sensitive glob.

    `*` matches any characters except a slash, `?` one such character, `[a-z]` one character of a set and `[!a-z]` one
    that is not in it. `**` between slashes matches any number of folders, and at the end everything below. Every other
    character matches itself.

    Raises:
        ValueError: a set is not closed or out of order, or `**` does not stand alone between slashes.
    """
    if not glob or any("**" in part and part != "**" for part in glob.split("/")):
        raise ValueError(f"{glob!r} is not understood: ** must stand alone between slashes, as in **/*.jpg")
    fixed = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    made = ""
    for token in _GLOB_TOKEN.findall(glob):
        if token in fixed:
            made += fixed[token]
        elif token == "[":
            raise ValueError(f"{glob!r} is not understood: [ without ]; write [[] for a literal [")
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


def one_line(error: Exception) -> str:
    """Return an error's message as one line."""
    return " ".join(str(error).split())

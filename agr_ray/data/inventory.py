"""S3 Inventory: AWS's own listing of a bucket, made daily or weekly, as a stream of its objects.

An inventory is a `manifest.json`, which names the listed bucket and the data files of the listing. These are in the
bucket of the manifest:

    DESTINATION/SOURCE-BUCKET/CONFIGURATION/2026-11-24T01-00Z/manifest.json
    DESTINATION/SOURCE-BUCKET/CONFIGURATION/data/4f1c....parquet

Keys are URL-encoded in CSV, a blank as `+`, and plain in Parquet. Source: Amazon S3 User Guide, "Cataloging and
analyzing your data with S3 Inventory".
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from agr_ray.storage import MissingObject, Storage
from agr_ray.storage.uri import ancestors, leaves_folder

LISTED: Final = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),  # below what was listed
        pa.field("etag", pa.string()),  # without quotes
        pa.field("size_bytes", pa.int64()),
        pa.field("storage_class", pa.string()),  # S3's storage class; null: unknown, or a local file
    ]
)
"""One row for each listed object."""

_BATCH_ROWS = 65_536
_NEEDED: Final = {"key": pa.string(), "size": pa.int64(), "e_tag": pa.string()}
_OPTIONAL: Final = {"is_latest": pa.bool_(), "is_delete_marker": pa.bool_(), "storage_class": pa.string()}
"""The first two exist only in inventories of all versions."""
_BUCKET: Final = re.compile(r"[\w.-]+", re.ASCII)
_CSV_NAMES: Final = {
    "Key": "key",
    "Size": "size",
    "ETag": "e_tag",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
    "StorageClass": "storage_class",
}
"""Fields of `fileSchema` by the names that Parquet gives them."""


class InventoryError(ValueError):
    """The inventory as a whole can't be used. The message is one line."""


@dataclass(frozen=True, slots=True)
class _DataFile:
    key: str
    md5: str | None


@dataclass(frozen=True, slots=True)
class _Manifest:
    source_bucket: str
    file_format: str
    csv_fields: tuple[str, ...]
    files: tuple[_DataFile, ...]


def read_inventory(storage: Storage, uri: str) -> Iterator[pa.RecordBatch]:
    """Yield the objects of an inventory as batches of `LISTED`, in its own order, one data file in memory at a time.

    Only the latest versions are included. Delete markers, and empty objects that stand for folders (their key ends in
    `/`), are skipped. The key is the whole key in the bucket. If the manifest is a local copy, the data files are
    searched for below its parent folders.

    Args:
        storage: reads the manifest and the data files; the listed objects are not touched.
        uri: of the manifest.json.

    Raises:
        InventoryError: the object is not an inventory, its format is neither CSV nor Parquet, it lacks a needed field,
            or a data file does not exist or differs from its MD5.
        MissingObject: there is no such manifest.
    """
    manifest = _parse_manifest(storage.read(uri))
    if not manifest.files:
        return
    root = _data_root(storage, uri, manifest.files[0].key)
    read = _read_csv if manifest.file_format == "CSV" else _read_parquet
    for file in manifest.files:
        body = _read_data_file(storage, storage.join(root, file.key), file)
        try:
            for rows in read(body, manifest.csv_fields):
                rows.validate(full=True)  # text that is not UTF-8
                yield _objects(rows, manifest.source_bucket)
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise InventoryError(f"data file {file.key} can't be read as {manifest.file_format}: {reason}") from error


def _parse_manifest(data: bytes) -> _Manifest:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InventoryError(f"not an S3 Inventory: not valid JSON: {error}") from None
    needed = ("sourceBucket", "fileFormat", "fileSchema", "files")
    lacking = [name for name in needed if not isinstance(fields, dict) or name not in fields]
    if lacking:
        raise InventoryError(f"not an S3 Inventory: its manifest has no {lacking[0]}; expected {', '.join(needed)}")
    if fields["fileFormat"] not in ("CSV", "Parquet"):
        raise InventoryError(f"the inventory's fileFormat is {fields['fileFormat']!r}: allowed are CSV, Parquet")
    try:
        files = tuple(_DataFile(str(file["key"]), file.get("MD5checksum")) for file in fields["files"])
    except (KeyError, TypeError, AttributeError):
        raise InventoryError("not an S3 Inventory: files must be a list of tables with a key") from None
    bucket = fields["sourceBucket"]
    if not isinstance(bucket, str) or not _BUCKET.fullmatch(bucket):
        raise InventoryError(f"not an S3 Inventory: its sourceBucket is {bucket!r}, which is no bucket's name")
    for file in files:
        if leaves_folder(file.key):
            raise InventoryError(f"data file {file.key!r} would be read outside the inventory's folder")
    csv_fields = tuple(_CSV_NAMES.get(name.strip(), name.strip()) for name in str(fields["fileSchema"]).split(","))
    if fields["fileFormat"] == "CSV":
        _check_fields(csv_fields)
    return _Manifest(bucket, fields["fileFormat"], csv_fields, files)


def _check_fields(names: tuple[str, ...]) -> None:
    for ours, theirs in (("key", "Key"), ("size", "Size"), ("e_tag", "ETag")):
        if ours not in names:
            raise InventoryError(f"the inventory lists no {theirs}: add it to the fields of its configuration")


def _data_root(storage: Storage, uri: str, key: str) -> str:
    """Return the root of the data files' keys: the manifest's bucket, or a parent folder of its copy."""
    for root in ancestors(uri):
        if storage.exists(storage.join(root, key)):
            return root
    raise InventoryError(f"data file {key} does not exist")


def _read_data_file(storage: Storage, uri: str, file: _DataFile) -> bytes:
    try:
        body = storage.read(uri)
    except MissingObject:
        raise InventoryError(f"data file {file.key} does not exist") from None
    if file.md5 is not None and hashlib.md5(body, usedforsecurity=False).hexdigest() != file.md5:
        raise InventoryError(f"data file {file.key} is not the one listed: its MD5 is not {file.md5}")
    return body


def _read_csv(body: bytes, fields: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """Yield the columns of `_NEEDED` and `_OPTIONAL` that exist, with keys decoded."""
    types = {name: type_ for name, type_ in (_NEEDED | _OPTIONAL).items() if name in fields}
    if not body:
        return
    with pa.CompressedInputStream(pa.BufferReader(body), "gzip") as lines:
        reader = pa.csv.open_csv(
            lines,
            read_options=pa.csv.ReadOptions(column_names=[*fields]),
            convert_options=pa.csv.ConvertOptions(column_types=types, include_columns=[*types], null_values=[""]),
        )
        for rows in reader:
            keys = [urllib.parse.unquote_plus(key) for key in rows.column("key").to_pylist()]
            yield rows.set_column(0, "key", pa.array(keys, pa.string()))


def _read_parquet(body: bytes, _: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """Yield the columns of `_NEEDED` and `_OPTIONAL` that exist."""
    file = pq.ParquetFile(pa.BufferReader(body))
    names = tuple(file.schema_arrow.names)
    _check_fields(names)
    yield from file.iter_batches(_BATCH_ROWS, columns=[name for name in (*_NEEDED, *_OPTIONAL) if name in names])


def _objects(rows: pa.RecordBatch, bucket: str) -> pa.RecordBatch:
    """Return the rows of live objects as `LISTED`."""
    live = pc.invert(pc.ends_with(rows.column("key"), "/"))
    for name, wanted in (("is_latest", True), ("is_delete_marker", False)):
        if name in rows.schema.names:
            live = pc.and_(live, pc.equal(pc.fill_null(rows.column(name), wanted), wanted))
    objects = rows.filter(live)
    columns: Mapping[str, Any] = {
        "uri": pc.binary_join_element_wise(f"s3://{bucket}", objects.column("key"), "/"),
        "key": objects.column("key"),
        "etag": pc.utf8_trim(objects.column("e_tag"), characters='"'),
        "size_bytes": objects.column("size"),
        "storage_class": (
            objects.column("storage_class") if "storage_class" in rows.schema.names else pa.nulls(objects.num_rows)
        ),
    }
    return pa.record_batch([columns[field.name].cast(field.type) for field in LISTED], schema=LISTED)

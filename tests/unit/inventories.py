"""S3 inventories as S3 writes them, for tests."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import urllib.parse
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agr_ray.storage import Storage

CSV_FIELDS = {
    "bucket": "Bucket",
    "key": "Key",
    "version_id": "VersionId",
    "is_latest": "IsLatest",
    "storage_class": "StorageClass",
    "is_delete_marker": "IsDeleteMarker",
    "size": "Size",
    "e_tag": "ETag",
}


def entry(key: str, **changes: Any) -> dict[str, Any]:
    """Return an object as an inventory of all versions lists it."""
    fresh = {"bucket": "photos", "key": key, "version_id": "v", "is_latest": True, "is_delete_marker": False}
    return fresh | {"size": len(key), "e_tag": "e" * 32, "storage_class": "STANDARD"} | changes


def csv_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def data_file(entries: list[dict[str, Any]], file_format: str) -> bytes:
    buffer = io.BytesIO()
    if file_format == "Parquet":
        pq.write_table(pa.Table.from_pylist(entries), buffer)
        return buffer.getvalue()
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    for each in entries:
        encoded = each | {"key": urllib.parse.quote_plus(each["key"], safe="/")}
        writer.writerow([csv_text(encoded[name]) for name in each])
    return gzip.compress(text.getvalue().encode())


def write_inventory(
    storage: Storage, root: str, data: list[list[dict[str, Any]]], file_format: str, **changes: Any
) -> str:
    """Write an inventory into a bucket (or folder) as S3 lays it out; return the URI of its manifest."""
    named = []
    for number, entries in enumerate(data):
        key, body = f"inv/photos/daily/data/{number}.{file_format.lower()}", data_file(entries, file_format)
        storage.write(storage.join(root, key), body)
        named.append({"key": key, "size": len(body), "MD5checksum": hashlib.md5(body).hexdigest()})
    schema = ", ".join(CSV_FIELDS[name] for name in data[0][0]) if file_format == "CSV" else "message s3.inventory {}"
    manifest = {"sourceBucket": "photos", "fileFormat": file_format, "fileSchema": schema, "files": named} | changes
    uri = storage.join(root, "inv/photos/daily/2026-11-24T01-00Z/manifest.json")
    storage.write(uri, json.dumps(manifest).encode())
    return uri

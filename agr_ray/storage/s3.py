"""Storage on S3 and servers that speak its protocol."""

from __future__ import annotations

import contextlib
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from agr_ray.redact import redacted
from agr_ray.storage import trees
from agr_ray.storage.backend import ObjectInfo, S3Address
from agr_ray.storage.connection import Clients, Connection
from agr_ray.storage.errors import (
    MissingObject,
    ServerFailed,
    StorageFailed,
)
from agr_ray.storage.s3_body import BrokenBody, ObjectRange, read_body
from agr_ray.storage.s3_errors import Action, code_and_status, rejects_bulk_deletes, s3_errors
from agr_ray.storage.uri import as_prefix, bucket_and_key, bucket_path, join

if TYPE_CHECKING:
    import pyarrow.fs
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import ObjectTypeDef

_KEYS_PER_PAGE = 1000
_KEYS_PER_DELETE: Final = 1000
"""S3's limits for one request."""
_PROBE_ATTEMPTS: Final = 2
_PROBE_TIMEOUT_S: Final = 10.0
_PROBE_NAME: Final = ".agr-ray-probe"


@dataclass(frozen=True)
class S3Backend:
    """Objects of S3. Cheap to make and to pickle; connects on first use."""

    connection: Connection
    _clients: Clients = field(default_factory=Clients, init=False, repr=False, compare=False)

    def list(self, uri: str, on_unreadable: Callable[[str], None] | None = None) -> Iterator[ObjectInfo]:  # noqa: ARG002
        """Yield the objects below a prefix, without the empty ones that stand for folders."""
        return (info for info in self.list_entries(uri) if not info.uri.endswith("/"))

    def list_entries(self, uri: str, *, recursive: bool = True) -> Iterator[ObjectInfo]:
        """Yield all entries below a prefix, including folders, whose keys end in `/`.

        With `recursive` false, the folders right below the prefix stand for everything in them.
        """
        bucket, top = bucket_and_key(uri, key_needed=False)
        root = f"s3://{bucket}/"
        prefix = as_prefix(top)
        pages = iter(
            self.client()
            .get_paginator("list_objects_v2")
            .paginate(
                Bucket=bucket,
                Prefix=prefix,
                Delimiter="" if recursive else "/",
                OptionalObjectAttributes=["RestoreStatus"],
                PaginationConfig={"PageSize": _KEYS_PER_PAGE},
            )
        )
        while True:
            with self._errors(uri, "list"):
                page = next(pages, None)
            if page is None:
                return
            for folder in page.get("CommonPrefixes", []):
                yield ObjectInfo(root + folder["Prefix"], folder["Prefix"].removeprefix(prefix), "", 0)
            for entry in page.get("Contents", []):
                key = entry["Key"]
                # SeaweedFS stores `d//e` as `d/e`, but lists it under the prefix `d//`.
                relative = key[len(prefix) :] if key.startswith(prefix) else key
                yield ObjectInfo(root + key, relative, entry["ETag"].strip('"'), entry["Size"], _storage_class(entry))

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> tuple[bytes, str]:
        """Return an object's bytes, decompressed if it is stored with `Content-Encoding: gzip`, and its ETag."""
        whole = self._retry(uri, lambda: self._get(uri, etag, max_bytes=max_bytes))
        return whole.data, whole.etag

    def read_range(self, uri: str, start: int, length: int, *, etag: str | None = None) -> ObjectRange:
        """Return bytes of an object from `start`, or its last `-start` bytes; raises the same errors as `read`."""
        byte_range = f"bytes=-{-start}" if start < 0 else f"bytes={start}-{start + length - 1}"
        return self._retry(uri, lambda: self._get(uri, etag, byte_range=byte_range))

    def write(self, uri: str, data: bytes | IO[bytes], *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Put an object in one request, with If-None-Match or If-Match as its condition."""
        bucket, key = bucket_and_key(uri)
        condition = {"IfNoneMatch": "*"} if if_absent else _if_match(if_match)
        put: Any = self.client().put_object
        with self._errors(uri, "create" if if_absent else "write"):
            answer = put(Bucket=bucket, Key=key, Body=data, **condition)
        return str(answer["ETag"]).strip('"')

    def write_with(self, uri: str, fill: Callable[[IO[bytes]], object]) -> None:
        """Let `fill` write a temporary file on the local disk, then put it in one request."""
        with tempfile.TemporaryFile() as file:
            fill(file)
            file.seek(0)
            self.write(uri, file)

    def copy(self, source: str, target: str) -> None:
        """Copy an object: by the server within a bucket, else through memory."""
        bucket, key = bucket_and_key(source)
        target_bucket, target_key = bucket_and_key(target)
        if bucket != target_bucket:
            self.write(target, self.read(source)[0])
            return
        with self._errors(source, "write"):
            self.client().copy_object(Bucket=bucket, Key=target_key, CopySource={"Bucket": bucket, "Key": key})

    def move(self, source: str, target: str) -> None:
        """Copy an object, then delete it."""
        self.copy(source, target)
        self.delete(source)

    def exists(self, uri: str) -> bool:
        """Return whether there is an object, or any object below the prefix."""
        size, is_folder = self.look_up(uri)
        return size is not None or is_folder

    def is_folder(self, uri: str) -> bool:
        """Return whether no object has this key, but one is below the prefix."""
        return uri.endswith("/") or self.look_up(uri)[1]

    def look_up(self, uri: str) -> tuple[int | None, bool]:
        """Return the object's size in bytes; if there is none, None and whether any object is below `uri`."""
        bucket, key = bucket_and_key(uri, key_needed=False)
        client = self.client()
        if key:
            # A listing rather than HEAD, whose bare 404 and 403 do not say what is wrong.
            with self._errors(uri, "list"):
                page = client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
            for entry in page.get("Contents", []):
                if entry["Key"] == key:
                    return entry["Size"], False
        with self._errors(uri, "list"):
            page = client.list_objects_v2(Bucket=bucket, Prefix=as_prefix(key), MaxKeys=1)
        return None, not key or bool(page.get("Contents"))

    def delete(self, uri: str, *, if_match: str | None = None) -> None:
        """Delete an object, with If-Match as its condition."""
        bucket, key = bucket_and_key(uri)
        delete: Any = self.client().delete_object
        with self._errors(uri, "write"):
            delete(Bucket=bucket, Key=key, **_if_match(if_match))

    def upload_tree(self, source: Path, names: Sequence[str], uri: str, *, marker: str, overwrite: bool) -> None:
        """Put the files one by one, the marker last."""
        trees.upload_objects(self, source, names, uri, marker=marker, overwrite=overwrite)

    def download_tree(self, uri: str, target: str) -> None:
        """Download the objects with s3fs."""
        s3fs = self.s3fs()

        def fetch(info: ObjectInfo, path: str) -> None:
            with self.library_errors(info.uri):
                s3fs.get_file(bucket_path(info.uri), path)

        trees.download_objects(self.list(uri), target, fetch)

    def move_tree(self, source: str, target: str) -> None:
        """Copy the objects; the caller must delete `source` later."""
        trees.copy_objects(self, source, target, self.copy)

    def delete_tree(self, uri: str) -> None:
        """Delete the objects below a prefix, many in one request, or one by one where the server requires it."""
        bucket, _ = bucket_and_key(uri)  # never a whole bucket
        infos = self.list_entries(uri)
        while keys := [bucket_and_key(info.uri)[1] for info in islice(infos, _KEYS_PER_DELETE)]:
            for key in self._delete_many(uri, bucket, keys):
                self.delete(f"s3://{bucket}/{key}")

    def _delete_many(self, uri: str, bucket: str, keys: Sequence[str]) -> Sequence[str]:
        """Delete the keys in one request; return those that must be deleted one by one."""
        from botocore.exceptions import ClientError

        with self._errors(uri, "write"):
            try:
                answer = self.client().delete_objects(
                    Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
                )
            except ClientError as error:
                if rejects_bulk_deletes(error):
                    return keys
                raise
        # A single delete reports the error, if it persists.
        return [error["Key"] for error in answer.get("Errors", []) if error.get("Code") != "NoSuchKey"]

    def delete_if_empty(self, uri: str) -> None:
        """Do nothing: S3 has no folders."""

    def probe(self, uri: str, *, write: bool) -> None:
        """Make a cheap request with each client; a server that is merely overloaded passes."""
        bucket, prefix = bucket_and_key(uri, key_needed=False)
        hasty = S3Backend(self.connection.limited(_PROBE_TIMEOUT_S, _PROBE_ATTEMPTS))
        try:
            with hasty._errors(uri, "list"):
                hasty.client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
            s3fs = hasty.s3fs()
            with hasty.library_errors(uri), hasty._errors(uri, "list"):
                try:
                    s3fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
                except OSError as error:
                    raise error.__cause__ or error from None  # botocore's error, before s3fs translated it
            if write:
                probe = join(uri, _PROBE_NAME)
                hasty.write(probe, b"")
                hasty.delete(probe)
        except ServerFailed:
            return

    def s3_address(self, uri: str) -> S3Address:
        """Return the location of the bucket, its region as the server reports it."""
        client = self.client()
        bucket, key = bucket_and_key(uri, key_needed=False)
        with self._errors(uri, "list"):  # a policy may allow to list this prefix and nothing else
            answer = client.list_objects_v2(Bucket=bucket, Prefix=as_prefix(key), MaxKeys=1)
        endpoint = client.meta.endpoint_url
        on_aws = (urllib.parse.urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        region = headers.get("x-amz-bucket-region") or client.meta.region_name
        connection = self.connection
        return S3Address(None if on_aws else endpoint, region, connection.addressing_style, connection.anonymous)

    def arrow_filesystem(self, uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return a pyarrow filesystem that uses this backend."""
        import pyarrow.fs

        from agr_ray.storage.s3_filesystem import S3Handler

        return pyarrow.fs.PyFileSystem(S3Handler(self)), bucket_path(uri)

    def client(self) -> S3Client:
        """Return this process's boto3 client."""
        return self._clients.get("boto3", self.connection.boto3_client)

    def s3fs(self) -> Any:
        """Return this process's `s3fs.S3FileSystem`."""
        return self._clients.get("s3fs", self.connection.s3fs_filesystem)

    @contextlib.contextmanager
    def library_errors(self, uri: str) -> Iterator[None]:
        """Turn the errors of pyarrow and s3fs into this package's, asking boto3 whether the set-up is to blame."""
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except FileNotFoundError as error:
            self._check_available(uri)
            raise MissingObject(f"{uri} does not exist") from error
        except (OSError, BotoCoreError) as error:
            self._check_available(uri)
            raise StorageFailed(f"{uri}: {redacted(str(error))}") from error

    def _check_available(self, uri: str) -> None:
        """Raise StorageUnavailable if the bucket of `uri` can't even be listed there."""
        bucket, key = bucket_and_key(uri, key_needed=False)
        with self._errors(uri, "list"):
            self.client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)

    def _errors(self, uri: str, action: Action) -> contextlib.AbstractContextManager[None]:
        return s3_errors(uri, self.client().meta.endpoint_url, action)

    def _retry(self, uri: str, read: Callable[[], ObjectRange]) -> ObjectRange:
        attempts = self.connection.max_attempts
        for attempt in range(1, attempts + 1):
            try:
                return read()
            except BrokenBody as error:
                # botocore retries requests but not bodies that break off.
                if attempt == attempts:
                    raise ServerFailed(f"{uri}: reading broke off {attempt} times, last: {error}") from error
                time.sleep(min(0.1 * 2**attempt, 5.0))
        raise AssertionError("the last attempt returns or raises")

    def _get(
        self, uri: str, etag: str | None, *, max_bytes: int | None = None, byte_range: str | None = None
    ) -> ObjectRange:
        from botocore.exceptions import ClientError

        bucket, key = bucket_and_key(uri)
        get: Any = self.client().get_object
        conditions = _if_match(etag) | ({"Range": byte_range} if byte_range else {})
        with self._errors(uri, "read"):
            try:
                response = get(Bucket=bucket, Key=key, **conditions)
            except ClientError as error:
                if byte_range and code_and_status(error)[0] in ("InvalidRange", "416"):
                    return ObjectRange(b"", 0, 0, "")  # an empty object has no bytes in that range
                raise
        return read_body(uri, response, etag, max_bytes=max_bytes, is_range=byte_range is not None)


def _if_match(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"IfMatch": f'"{etag}"'}


def _storage_class(entry: ObjectTypeDef) -> str | None:
    """Return the storage class of a listed object, and whether a restored copy of it can be read."""
    storage_class = entry.get("StorageClass")
    # An archived object keeps its class and ETag while a restored copy exists; only the expiry date reveals the copy.
    if storage_class and entry.get("RestoreStatus", {}).get("RestoreExpiryDate"):
        return f"{storage_class} restored"
    return storage_class

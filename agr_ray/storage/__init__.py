"""URIs to bytes, listings, tables and trees, on local disks and S3: the only parser of URIs.

A URI is a `str` in one of three forms:

- a bare local path, taken literally: `%`, `#` and blanks mean themselves;
- `file:///path`, percent-decoded as its standard says;
- `s3://bucket/key`, the key taken literally: nothing in it is decoded, and `//` is kept.

Trouble comes in two kinds. A `StorageError` concerns one object and carries the `Status` its row ends with.
`StorageUnavailable` concerns the set-up (keys, bucket, endpoint, folder) and should end the run: it is not a
`StorageError`, so that code which turns bad objects into rows can't swallow it.

boto3 lists, reads and writes S3, also for pyarrow and Ray (`s3_filesystem.py`); s3fs downloads trees of files. Both get
their settings from `connection.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import urllib.parse
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Final, NoReturn, TypeVar, cast

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from agr_ray.config import StorageConfig
from agr_ray.errors import ConfigError
from agr_ray.schema import Status
from agr_ray.storage.connection import AddressingStyle, Connection

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import ObjectTypeDef

T = TypeVar("T")

ALLOWED_FORMS: Final = "a local path, file:///path or s3://bucket/key"
_KEYS_PER_DELETE: Final = 1000
"""What S3 takes at most."""
_NUM_COPIES: Final = 16
"""Number of parallel copy requests to a server."""
DEFAULT_MARKER: Final = "meta.json"
"""The file of a tree that is written last, and whose presence says that the tree is whole."""

_NO_MULTI_DELETE_CODES: Final = frozenset(
    {
        "BadDigest",
        "InvalidDigest",
        "InvalidRequest",
        "MalformedXML",
        "MethodNotAllowed",
        "MissingContentLength",
        "MissingContentMD5",
        "NotImplemented",
    }
)
_PROBE_ATTEMPTS: Final = 2
_PROBE_TIMEOUT_S: Final = 10.0
_PROBE_NAME: Final = ".agr-ray-probe"
_UNZIP_STEP_BYTES: Final = 64 * 1024
_TEMPORARY = ".tmp-"
"""How the names of unfinished local files and folders begin; they are never listed."""
_LIVE = "live"
"""The file in an unfinished folder that its writer keeps locked."""
_cleaned: set[tuple[int, str]] = set()
"""Pairs of a process and a folder in which it has deleted stale temporaries."""
_NOT_SUPPORTED: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""Error codes with which file systems report an unsupported operation."""
_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
"""Linux constants that Python does not define."""
_MAX_FLOCK_S = 30.0
_OLD: Final = "old"
"""Folder, in a temporary one, of the tree that is being replaced."""
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/")
_UNAVAILABLE_CODES: Final = frozenset(
    {
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "IllegalLocationConstraintException",
        "InvalidAccessKeyId",
        "InvalidBucketName",
        "InvalidToken",
        "NoSuchBucket",
        "PermanentRedirect",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
    }
)
"""Answers of S3 that the next object would get too. A bare AccessDenied is not among them: on a read it may
concern the one object."""


class StorageError(Exception):
    """One object could not be had. `status` is what its row says."""

    status: ClassVar[Status] = Status.FAILED


class MissingObject(StorageError):
    """The object does not exist."""

    status = Status.MISSING


class ChangedObject(StorageError):
    """The object is not the one that was listed."""

    status = Status.CHANGED


class ObjectTooLarge(StorageError):
    """The object has more bytes than the caller allows; its body was not read."""

    status = Status.TOO_LARGE


class ArchivedObject(StorageError):
    """The object is in an archive and must be restored before it can be read."""

    status = Status.ARCHIVED


class StorageFailed(StorageError):
    """Storage kept failing on this object after all retries, or denies access to it."""

    status = Status.FAILED


class ServerFailed(StorageFailed):
    """What kept failing is the server, or it was too busy: later it may give this object."""


class BadUri(ConfigError, ValueError):
    """A URI of no form that is known."""


class StorageUnavailable(Exception):
    """Storage can't be used as configured. The message is one line that names the bucket, endpoint or folder."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One listed object."""

    uri: str
    key: str
    """Path below the listed root, `/` between its parts."""
    etag: str
    """S3's ETag without its quotes; `size-mtime_ns` for a local file."""
    size_bytes: int
    storage_class: str | None = None
    """S3's storage class, such as STANDARD or GLACIER, followed by ` restored` while a restored copy can be read.

    None: a local file, or a server that does not report it.
    """


@dataclass(frozen=True, slots=True)
class ObjectRange:
    """Some bytes of an object."""

    data: bytes
    offset: int
    """Offset of the first byte."""
    total_bytes: int
    """Size of the whole object."""
    etag: str


@dataclass(frozen=True, slots=True)
class S3Address:
    """Everything, except keys, that another program needs to reach a bucket."""

    endpoint_url: str | None
    """None: AWS itself."""
    region: str
    addressing_style: str
    """`virtual`, `path` or `auto`."""
    anonymous: bool
    """Whether requests are not signed."""


class _Clients:
    """Clients of one `Storage`, made on first use, once per process; pickles as empty."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, str], Any] = {}

    def __reduce__(self) -> tuple[type[_Clients], tuple[()]]:
        return (_Clients, ())

    def get(self, name: str, make: Callable[[], T]) -> T:
        # No lock, because a fork could inherit it held: of two made at once, one is dropped.
        key = (os.getpid(), name)
        if key not in self._made:
            self._made.setdefault(key, make())
        return cast("T", self._made[key])


@dataclass(frozen=True)
class Storage:
    """Access to local and S3 storage. Cheap to make and to pickle; connects on first use.

    Keys come from AWS's usual chain (variables, profile, instance role); they are never held here.
    """

    endpoint_url: str | None = None
    """Of an S3-compatible server, such as `http://host:8333`. None: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the
    profile's, else AWS itself."""
    region: str | None = None
    """None: AWS_REGION, AWS_DEFAULT_REGION or the profile's, else us-east-1."""
    request_timeout_s: float = 30.0
    """For a connection, and for each wait on a socket."""
    max_attempts: int = StorageConfig.model_fields["max_attempts"].default
    """For each request, the first included."""
    anonymous: bool = False
    """Send unsigned requests, without credentials; for public buckets."""
    requester_pays: bool = False
    """Agree to pay for requests; requester-pays buckets require it."""
    addressing_style: AddressingStyle = "auto"
    """`path`: the bucket is in the URL's path; `virtual`: in its host name; `auto`: as the AWS profile says, else
    virtual for AWS and path for other servers."""
    list_page_keys: int = 1000
    """Keys that a listing asks for at a time. S3 gives no more than 1000."""
    _clients: _Clients = field(default_factory=_Clients, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}: at least 1 is needed")
        if not 1 <= self.list_page_keys <= 1000:
            raise ValueError(f"list_page_keys is {self.list_page_keys}: expected 1 to 1000")
        if self.request_timeout_s <= 0:
            raise ValueError(f"request_timeout_s is {self.request_timeout_s:g}: it must be above 0")

    @classmethod
    def from_config(cls, config: StorageConfig) -> Storage:
        """Return the storage that a configuration describes."""
        return cls(
            endpoint_url=config.endpoint_url,
            region=config.region,
            request_timeout_s=config.timeout_s,
            max_attempts=config.max_attempts,
            anonymous=config.anonymous,
            requester_pays=config.requester_pays,
            addressing_style=config.addressing_style,
        )

    def probe(self, uri: str, key: str, *, write: bool = False) -> None:
        """Make a cheap request with every S3 client, so that wrong settings are found before any work.

        `key` is the setting that `uri` comes from. With `write`, an object is also written below `uri` and deleted.
        Local paths are not checked, and a server that is merely overloaded passes.

        Raises:
            BadUri, StorageUnavailable: the message is one line that names the key and the problem.
        """
        try:
            if not _is_s3(uri):
                return
            bucket, prefix = _bucket_and_key(uri, key_needed=False)
        except BadUri as error:
            raise BadUri(f"{key}: {error}") from None
        attempts = min(self.max_attempts, _PROBE_ATTEMPTS)
        quick = replace(self, request_timeout_s=min(self.request_timeout_s, _PROBE_TIMEOUT_S), max_attempts=attempts)
        try:
            with quick._s3_errors(uri, listing=True):
                quick._s3().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
            fs, _ = quick.fsspec_filesystem(uri)
            with quick._foreign_errors(uri), quick._s3_errors(uri, listing=True):
                try:
                    fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
                except OSError as error:
                    raise error.__cause__ or error from None  # botocore's error, before s3fs translated it
            if write:
                probe = quick.join(uri, _PROBE_NAME)
                quick.write(probe, b"")
                quick.delete(probe)
        except ServerFailed:
            return
        except (StorageError, StorageUnavailable) as error:
            raise StorageUnavailable(f"{key}: {error}") from error

    # URIs

    def absolute(self, uri: str) -> str:
        """Return the URI in its one canonical form: a bare absolute local path, or `s3://bucket/key`.

        A relative path is taken from the present working directory, so call this before Ray moves it.

        Raises:
            BadUri: the scheme is not known, or the URI is empty or malformed.
        """
        if not _is_s3(uri):
            return _local_path(uri)
        rest = uri.partition("://")[2]
        if not rest.strip("/") or rest.startswith("/"):
            raise BadUri(f"{uri!r} names no bucket: expected s3://bucket/key")
        return f"s3://{rest}"

    def object_uri(self, uri: str) -> str:
        """Return the canonical URI of one object; that of a local file whose name is not UTF-8 stays as it is.

        Raises:
            BadUri: as `absolute`, or no bucket or no key is named.
        """
        made = self.absolute(uri)
        if _is_s3(made):
            _bucket_and_key(made)
        try:
            made.encode()
        except UnicodeEncodeError:
            return uri
        return made

    def join(self, uri: str, *parts: str) -> str:
        """Return the URI of `parts` below `uri`. Parts are literal: an S3 key's `//` survives."""
        joined = uri if _is_s3(uri) else _local_path(uri, absolute=False)
        for part in parts:
            joined = joined + part if joined.endswith("/") else f"{joined}/{part}"
        return joined

    # Objects

    def list(
        self,
        uri: str,
        suffixes: Sequence[str] | None = None,
        *,
        on_unreadable: Callable[[str], None] | None = None,
    ) -> Iterator[ObjectInfo]:
        """Yield the objects below the folder or prefix `uri`, in the order of their keys' UTF-8 bytes.

        `suffixes` are compared regardless of case. Directories, and the empty objects whose key ends in `/` that
        stand for them, are skipped. Links are followed, except to a folder that holds them. A local file whose
        name is not UTF-8 gets a percent-encoded `file://` URI and key, so that it fits into a table.

        A local subfolder that this user may not list, such as `lost+found`, raises an error. With `on_unreadable`, it
        is skipped instead, and `on_unreadable` is called with its path.

        Raises:
            StorageUnavailable: no such local folder or bucket, or it can't be listed.
        """
        wanted = None if suffixes is None else tuple(suffix.lower() for suffix in suffixes)
        listed = self._list_s3(uri) if _is_s3(uri) else _list_local(_local_path(uri), on_unreadable)
        for info in listed:
            if wanted is None or info.key.lower().endswith(wanted):
                yield info

    def list_readable(self, uri: str, suffixes: Sequence[str] | None = None) -> Iterator[ObjectInfo]:
        """Like `list`, but skip local subfolders that this user may not list, such as `lost+found`.

        A warning on stderr names each one, and a last one counts them. Use this only for photographs: a folder of
        results that can't be listed must be an error.

        Raises:
            StorageUnavailable: as `list`, or if `uri` itself can't be listed.
        """
        num_skipped = 0

        def skip(folder: str) -> None:
            nonlocal num_skipped
            num_skipped += 1
            _warn(f"skipping folder {folder}: this user may not list it")

        yield from self.list(uri, suffixes, on_unreadable=skip)
        if num_skipped > 1:
            _warn(f"{num_skipped} folders below {uri} were skipped")

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        """Return the object's bytes; with `etag`, only if it is still the object that was listed with it.

        Raises:
            MissingObject, ChangedObject, ArchivedObject, ObjectTooLarge, StorageFailed: this object can't be read.
            StorageUnavailable: no object could: wrong keys, no such bucket, endpoint out of reach.
        """
        return self._read(uri, etag, max_bytes)[0]

    def read_range(self, uri: str, start: int, length: int, *, etag: str | None = None) -> ObjectRange:
        """Return bytes of an S3 object from `start`, or its last `-start` bytes; raises the same errors as `read`."""
        byte_range = f"bytes=-{-start}" if start < 0 else f"bytes={start}-{start + length - 1}"
        return self._try_often(uri, lambda: self._get_s3(uri, etag, byte_range=byte_range))

    def read_with_etag(self, uri: str) -> tuple[bytes, str]:
        """Return the object's bytes and the ETag that it had with them; fails as `read` does."""
        return self._read(uri, None, None)

    def _read(self, uri: str, etag: str | None, max_bytes: int | None) -> tuple[bytes, str]:
        if not _is_s3(uri):
            return _read_local(_local_path(uri), etag, max_bytes)
        found = self._try_often(uri, lambda: self._get_s3(uri, etag, max_bytes=max_bytes))
        return found.data, found.etag

    def _try_often(self, uri: str, read: Callable[[], ObjectRange]) -> ObjectRange:
        for attempt in range(1, self.max_attempts + 1):
            try:
                return read()
            except _BrokenBody as error:
                # botocore retries requests but not bodies that break off.
                if attempt == self.max_attempts:
                    raise ServerFailed(f"{uri}: reading broke off {attempt} times, last: {error}") from error
                time.sleep(min(0.1 * 2**attempt, 5.0))
        raise AssertionError("the last attempt returns or raises")

    def write(self, uri: str, data: bytes | IO[bytes], *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write the object whole or not at all, making local folders as needed, and return its ETag.

        S3 gets it in one request (objects up to 5 GB), so a killed writer leaves nothing there.

        With `if_absent`, or with the ETag that the object must still have as `if_match`, of several writers at once
        exactly one succeeds. On S3, If-None-Match and If-Match ensure that. On disks, `if_absent` uses a hard link or a
        no-replace rename, and `if_match` uses flock, which works only if all writers and deleters pass `if_match`. On
        S3, a condition can also fail if our first attempt succeeded but its response was lost: read the object to find
        out.

        Raises:
            FileExistsError: `if_absent`, and the object exists.
            ChangedObject, MissingObject: `if_match`, and the object is another, or gone.
            StorageFailed: this object could not be written.
            StorageUnavailable: none could.
        """
        if if_absent and if_match is not None:
            raise ValueError("if_absent and if_match exclude each other")
        if not _is_s3(uri):
            whole = data if isinstance(data, bytes) else data.read()
            return _write_local(
                _local_path(uri), lambda path: Path(path).write_bytes(whole), if_absent=if_absent, if_match=if_match
            )
        bucket, key = _bucket_and_key(uri)
        client = self._s3()
        with self._s3_errors(uri, writing=True, creating=if_absent):
            if if_absent:
                answer = client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            elif if_match is not None:
                answer = client.put_object(Bucket=bucket, Key=key, Body=data, IfMatch=f'"{if_match}"')
            else:
                answer = client.put_object(Bucket=bucket, Key=key, Body=data)
        return answer["ETag"].strip('"')

    def copy(self, source: str, target: str) -> None:
        """Copy one object whole or not at all, replacing what is there.

        Within a bucket the server copies (objects up to 5 GB); else the object goes through this process's memory.

        Raises:
            MissingObject: there is no `source`.
            StorageFailed: this object could not be copied.
            StorageUnavailable: none could.
        """
        if not (_is_s3(source) and _is_s3(target) and _bucket_and_key(source)[0] == _bucket_and_key(target)[0]):
            self.write(target, self.read(source))
            return
        bucket, key = _bucket_and_key(source)
        client = self._s3()
        with self._s3_errors(source, writing=True):
            client.copy_object(Bucket=bucket, Key=_bucket_and_key(target)[1], CopySource={"Bucket": bucket, "Key": key})

    def exists(self, uri: str) -> bool:
        """Say whether there is an object or a folder at `uri`; on S3 a folder is a prefix with something below it."""
        if not _is_s3(uri):
            return os.path.exists(_local_path(uri))
        size, is_folder = self.look_up(uri)
        return size is not None or is_folder

    def look_up(self, uri: str) -> tuple[int | None, bool]:
        """Return the size of the S3 object `uri`; if there is none, None and whether any object is below `uri`."""
        bucket, key = _bucket_and_key(uri, key_needed=False)
        client = self._s3()
        if key:
            # A listing rather than HEAD, whose bare 404 and 403 do not say what is wrong.
            with self._s3_errors(uri, listing=True):
                page = client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
            for entry in page.get("Contents", []):
                if entry["Key"] == key:
                    return entry["Size"], False
        with self._s3_errors(uri, listing=True):
            page = client.list_objects_v2(Bucket=bucket, Prefix=_as_prefix(key), MaxKeys=1)
        return None, not key or bool(page.get("Contents"))

    def delete(self, uri: str, *, if_match: str | None = None) -> None:
        """Delete one object or local file; it need not exist.

        With `if_match`, only if it still has that ETag, in one step as `write` does it.

        Raises:
            ChangedObject, MissingObject: `if_match`, and the object is another, or gone.
        """
        if not _is_s3(uri):
            path = _local_path(uri)
            if if_match is not None:
                with _unchanged_local(path, if_match):
                    os.unlink(path)
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        bucket, key = _bucket_and_key(uri)
        client = self._s3()
        with self._s3_errors(uri, writing=True):
            if if_match is not None:
                client.delete_object(Bucket=bucket, Key=key, IfMatch=f'"{if_match}"')
            else:
                client.delete_object(Bucket=bucket, Key=key)

    # Trees

    def upload_tree(self, local_dir: str, uri: str, *, marker: str = DEFAULT_MARKER, overwrite: bool = False) -> None:
        """Publish a local folder at `uri` whole or not at all.

        Locally the folder is copied beside its place and moved there. On S3, where nothing can be moved, `marker`
        is written last, and while an old tree is replaced there is none: a reader who finds the marker finds the
        whole tree.

        Raises:
            FileExistsError: `uri` holds something and `overwrite` is not set. On S3, what an upload that died left
                behind, which has no marker, is overwritten without being asked.
            ValueError: the folder holds no `marker`.
        """
        source = Path(local_dir)
        names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
        if marker not in names:
            raise ValueError(f"{local_dir} holds no {marker}, which marks a tree as whole")
        if not _is_s3(uri):
            _publish_local_tree(source, _local_path(uri), overwrite=overwrite)
            return
        if not overwrite and self.exists(self.join(uri, marker)):
            raise FileExistsError(f"{uri} exists and is not overwritten")
        self.delete(self.join(uri, marker))
        for key in {info.key for info in self.list(uri)} - set(names):
            self.delete(self.join(uri, key))  # of the tree that is replaced
        names.remove(marker)
        for name in [*names, marker]:
            target = self.join(uri, name)
            with open(source / name, "rb") as file:
                self.write(target, file)

    def download_tree(self, uri: str, local_dir: str, *, marker: str = DEFAULT_MARKER) -> None:
        """Copy the tree at `uri` to the local folder `local_dir`, which appears whole or not at all.

        Raises:
            MissingObject: there is no `marker` at `uri`: no tree, or one whose upload did not end.
            FileExistsError: `local_dir` exists.
        """
        if not self.exists(self.join(uri, marker)):
            raise MissingObject(f"{uri} holds no {marker}: nothing is there, or its upload did not end")
        target = _local_path(local_dir)
        if not _is_s3(uri):
            _publish_local_tree(Path(_local_path(uri)), target, overwrite=False)
            return
        if os.path.lexists(target):
            raise FileExistsError(f"{local_dir} exists and is not overwritten")
        fs, _ = self.fsspec_filesystem(uri)
        with _temporary_beside(target) as temporary:
            fresh = os.path.join(temporary, "fresh")
            os.mkdir(fresh)
            for info in self.list(uri):
                if info.key.startswith("/") or ".." in info.key.split("/"):
                    raise StorageFailed(f"{info.uri} would be written outside {local_dir}")
                path = Path(fresh, info.key)
                path.parent.mkdir(parents=True, exist_ok=True)
                with self._foreign_errors(info.uri):
                    fs.get_file(_s3_path(info.uri), str(path))
            os.rename(fresh, target)

    def delete_tree(self, uri: str) -> None:
        """Delete everything below the folder or prefix `uri`, which need not exist."""
        if not _is_s3(uri):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(_local_path(uri))
            return
        bucket, _ = _bucket_and_key(uri)  # never a whole bucket
        infos = self._list_s3(uri, directories=True)
        while some := [_bucket_and_key(info.uri)[1] for info in islice(infos, _KEYS_PER_DELETE)]:
            for key in self._delete_many(uri, bucket, some):
                self.delete(f"s3://{bucket}/{key}")

    def _delete_many(self, uri: str, bucket: str, keys: Sequence[str]) -> Sequence[str]:
        """Delete the keys in one request; return those that must be deleted one by one."""
        from botocore.exceptions import ClientError

        with self._s3_errors(uri, writing=True):
            try:
                answer = self._s3().delete_objects(
                    Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
                )
            except ClientError as error:
                if _does_not_delete_many(error):
                    return keys
                raise
        # A single delete reports the error, if it persists.
        return [error["Key"] for error in answer.get("Errors", []) if error.get("Code") != "NoSuchKey"]

    def delete_if_empty(self, uri: str) -> None:
        """Delete an empty local folder. S3 has no folders, so nothing is done there."""
        if not _is_s3(uri):
            with contextlib.suppress(OSError):  # not empty, or not there
                os.rmdir(_local_path(uri))

    def move_tree(self, source: str, target: str) -> None:
        """Move everything below the folder or prefix `source` to `target`, which must be empty.

        Local moves are atomic. S3 can't move objects, so they are copied one by one, within a bucket by the server, and
        the caller must delete `source` later. An empty `source` is ignored.

        Raises:
            StorageFailed: an object could not be copied.
            StorageUnavailable: no object could be copied.
        """
        if _is_s3(source) or _is_s3(target):
            if not self.exists(source):
                return
            with ThreadPoolExecutor(_NUM_COPIES) as pool:
                copies = [pool.submit(self.copy, info.uri, self.join(target, info.key)) for info in self.list(source)]
                for each in copies:
                    each.result()
            return
        old, new = _local_path(source), _local_path(target)
        if not os.path.isdir(old):
            return
        try:
            os.makedirs(os.path.dirname(new), exist_ok=True)
            try:
                os.rename(old, new)
            except OSError as error:
                if error.errno != errno.EXDEV:  # `target` may be on another file system
                    raise
                _publish_local_tree(Path(old), new, overwrite=False)
            _sync(os.path.dirname(new))
        except OSError as error:
            raise StorageUnavailable(f"{old} can't be moved to {new}: {error.strerror or error}") from error

    # Tables

    def read_table(self, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a Parquet file, or all Parquet files of a folder as one table.

        Raises:
            MissingObject: nothing is there.
            StorageFailed: it is not Parquet, or reading failed.
        """
        fs, path = self.arrow_filesystem(uri)
        with self._foreign_errors(uri):
            try:
                # No partitioning: `run=7/` in a path must not become a column.
                return pq.read_table(path, columns=columns and [*columns], filesystem=fs, partitioning=None)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise StorageFailed(f"{uri} can't be read as Parquet: {error}") from error

    def write_table(self, table: pa.Table, uri: str) -> None:
        """Write a table as one Parquet file, whole or not at all, replacing what is there."""
        if not _is_s3(uri):
            _write_local(_local_path(uri), lambda path: pq.write_table(table, path, compression="zstd"))
            return
        with tempfile.TemporaryFile() as file:
            pq.write_table(table, file, compression="zstd")
            file.seek(0)
            self.write(uri, file)

    # The clients

    def s3_address(self, uri: str) -> S3Address | None:
        """Return the location of the bucket of `uri`; None for a local path.

        Raises:
            StorageUnavailable: the bucket does not exist or can't be reached.
        """
        if not _is_s3(uri):
            return None
        client = self._s3()
        bucket, key = _bucket_and_key(uri, key_needed=False)
        with self._s3_errors(uri, listing=True):  # a policy may allow to list this prefix and nothing else
            answer = client.list_objects_v2(Bucket=bucket, Prefix=_as_prefix(key), MaxKeys=1)
        endpoint = client.meta.endpoint_url
        on_aws = (urllib.parse.urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        region = headers.get("x-amz-bucket-region") or client.meta.region_name
        return S3Address(None if on_aws else endpoint, region, self.addressing_style, self.anonymous)

    def arrow_filesystem(self, uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return pyarrow's filesystem for `uri`, for Parquet and for Ray, and the path of `uri` in it."""
        if not _is_s3(uri):
            return pyarrow.fs.LocalFileSystem(), _local_path(uri)
        from agr_ray.storage.s3_filesystem import S3Handler

        return pyarrow.fs.PyFileSystem(S3Handler(self)), _s3_path(uri)

    def fsspec_filesystem(self, uri: str) -> tuple[Any, str]:
        """Return an fsspec filesystem for `uri` (s3fs, or fsspec's local one), and the path of `uri` in it."""
        if not _is_s3(uri):
            from fsspec.implementations.local import LocalFileSystem

            return LocalFileSystem(auto_mkdir=True), _local_path(uri)
        return self._clients.get("s3fs", self._make_s3fs), _s3_path(uri)

    def _s3(self) -> S3Client:
        return self._clients.get("boto3", self._make_boto3)

    @property
    def _connection(self) -> Connection:
        return Connection(
            endpoint_url=self.endpoint_url,
            region=self.region,
            anonymous=self.anonymous,
            requester_pays=self.requester_pays,
            addressing_style=self.addressing_style,
            request_timeout_s=self.request_timeout_s,
            max_attempts=self.max_attempts,
        )

    def _make_boto3(self) -> S3Client:
        import boto3
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        try:
            session = botocore.session.Session()
            arguments = self._connection.prepare(session)
            config = Config(**self._connection.config(session))
            return boto3.Session(botocore_session=session).client("s3", config=config, **arguments)
        except (BotoCoreError, ValueError) as error:
            raise StorageUnavailable(f"S3 can't be used as configured: {error}") from error

    def _make_s3fs(self) -> Any:
        import s3fs
        from aiobotocore.session import AioSession
        from botocore.exceptions import BotoCoreError

        class S3(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs has no types
            protocol = "agr-ray-s3"  # not s3, because fsspec would add s3 settings from its own files and variables
            cachable = False
            retries = 2  # for interrupted bodies; the client itself retries requests

        try:
            session = AioSession()
            return S3(
                session=session,
                client_kwargs=self._connection.prepare(session),
                config_kwargs=self._connection.config(session),
                # Others write to the same prefixes, so cached listings would go stale.
                use_listings_cache=False,
            )
        except (BotoCoreError, ValueError) as error:
            raise StorageUnavailable(f"S3 can't be used as configured: {error}") from error

    # S3

    def list_entries(self, uri: str, *, recursive: bool) -> Iterator[ObjectInfo]:
        """Yield all entries below an S3 prefix, including folders, whose keys end in `/`."""
        return self._list_s3(uri, directories=True, delimiter="" if recursive else "/")

    def _list_s3(self, uri: str, *, directories: bool = False, delimiter: str = "") -> Iterator[ObjectInfo]:
        bucket, key = _bucket_and_key(uri, key_needed=False)
        root = f"s3://{bucket}/"
        prefix = _as_prefix(key)
        paginator = self._s3().get_paginator("list_objects_v2")
        pages = iter(
            paginator.paginate(
                Bucket=bucket,
                Prefix=prefix,
                Delimiter=delimiter,
                OptionalObjectAttributes=["RestoreStatus"],
                PaginationConfig={"PageSize": self.list_page_keys},
            )
        )
        while True:
            with self._s3_errors(uri, listing=True):
                page = next(pages, None)
            if page is None:
                return
            for folder in page.get("CommonPrefixes", []):
                yield ObjectInfo(root + folder["Prefix"], folder["Prefix"].removeprefix(prefix), "", 0)
            for entry in page.get("Contents", []):
                found = entry["Key"]
                if directories or not found.endswith("/"):
                    # SeaweedFS stores `d//e` as `d/e` and yet lists it under the prefix `d//`.
                    relative = found[len(prefix) :] if found.startswith(prefix) else found
                    yield ObjectInfo(
                        root + found, relative, entry["ETag"].strip('"'), entry["Size"], _storage_class(entry)
                    )

    def _get_s3(
        self, uri: str, etag: str | None, *, max_bytes: int | None = None, byte_range: str | None = None
    ) -> ObjectRange:
        from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError
        from botocore.exceptions import ReadTimeoutError as BodyTimeout
        from urllib3.exceptions import HTTPError

        bucket, key = _bucket_and_key(uri)
        get: Any = self._s3().get_object
        conditions = ({"IfMatch": f'"{etag}"'} if etag else {}) | ({"Range": byte_range} if byte_range else {})
        with self._s3_errors(uri):
            try:
                response = get(Bucket=bucket, Key=key, **conditions)
            except ClientError as error:
                if byte_range and error.response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                    return ObjectRange(b"", 0, 0, "")  # an empty object has no bytes in that range
                raise
        with contextlib.closing(response["Body"]) as body:
            found = response["ETag"].strip('"')
            if etag is not None and found != etag:  # a server that ignores If-Match
                raise ChangedObject(f"{uri} has ETag {found}, and was listed with {etag}")
            size = response["ContentLength"]
            if max_bytes is not None and size > max_bytes:
                raise ObjectTooLarge(f"{uri} has {size} bytes, and {max_bytes} are allowed")
            try:
                data = body.read()
            except (HTTPClientError, IncompleteReadError, BodyTimeout, HTTPError, OSError) as error:
                raise _BrokenBody(str(error)) from error
        if byte_range:
            offset, total = _content_range(response.get("ContentRange"), len(data))
            return ObjectRange(data, offset, total, found)
        if response.get("ContentEncoding", "").lower() in ("gzip", "x-gzip"):
            data = _unzipped(uri, data, max_bytes)
        return ObjectRange(data, 0, len(data), found)

    @contextlib.contextmanager
    def _s3_errors(
        self, uri: str, *, listing: bool = False, writing: bool = False, creating: bool = False
    ) -> Iterator[None]:
        """Turn botocore's errors into this module's."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            self._raise_for_answer(uri, error, listing=listing, writing=writing, creating=creating)
        except BotoCoreError as error:
            self._raise_without_answer(uri, error)

    def _raise_for_answer(self, uri: str, error: Any, *, listing: bool, writing: bool, creating: bool) -> NoReturn:
        code = str(error.response.get("Error", {}).get("Code", ""))
        http = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        bucket, _ = _bucket_and_key(uri, key_needed=False)
        where = f"at {self._s3().meta.endpoint_url}"
        if code == "NoSuchBucket" or (listing and http == 404):
            raise StorageUnavailable(f"bucket {bucket!r} does not exist {where}") from error
        if code in _UNAVAILABLE_CODES or (listing and 400 <= (http or 0) < 500 and http != 429):
            said = error.response.get("Error", {}).get("Message", "no reason given")
            raise StorageUnavailable(
                f"bucket {bucket!r} {where} refuses these keys or settings: {code}: {said}"
            ) from error
        if code in ("NoSuchKey", "NoSuchVersion") or (http == 404 and not writing):
            raise MissingObject(f"{uri} does not exist") from error
        if code in ("InvalidObjectState", "ObjectNotInActiveTierError"):
            storage_class = error.response.get("StorageClass")
            where = f"archived in storage class {storage_class}" if storage_class else "archived"
            raise ArchivedObject(f"{uri} is {where}: restore it before it can be read") from error
        if code in ("PreconditionFailed", "ConditionalRequestConflict") or http == 412:
            if creating:
                raise FileExistsError(f"{uri} exists and is not overwritten") from error
            raise ChangedObject(f"{uri} is not the object that was listed: its ETag differs") from error
        if writing and http == 403:
            raise StorageUnavailable(f"bucket {bucket!r} {where} can't be written with these keys: {code}") from error
        failed = ServerFailed if (http or 0) >= 500 or http == 429 else StorageFailed
        raise failed(f"{uri}: {code or http}: {error}") from error

    def _raise_without_answer(self, uri: str, error: Exception) -> NoReturn:
        from botocore.exceptions import (
            ConnectTimeoutError,
            EndpointConnectionError,
            InvalidRegionError,
            NoCredentialsError,
            ParamValidationError,
            PartialCredentialsError,
            ProxyConnectionError,
            SSLError,
            TokenRetrievalError,
            UnauthorizedSSOTokenError,
        )

        bucket, _ = _bucket_and_key(uri, key_needed=False)
        endpoint = self._s3().meta.endpoint_url
        if isinstance(error, (EndpointConnectionError, ConnectTimeoutError, ProxyConnectionError, SSLError)):
            raise StorageUnavailable(f"bucket {bucket!r}: S3 endpoint {endpoint} can't be reached: {error}") from error
        if isinstance(
            error, (NoCredentialsError, PartialCredentialsError, TokenRetrievalError, UnauthorizedSSOTokenError)
        ):
            raise StorageUnavailable(
                f"bucket {bucket!r} at {endpoint}: no usable keys ({error}); set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or an instance role"
            ) from error
        if isinstance(error, (ParamValidationError, InvalidRegionError)):
            raise StorageUnavailable(f"bucket {bucket!r} at {endpoint}: {' '.join(str(error).split())}") from error
        raise ServerFailed(f"{uri}: {error}") from error

    @contextlib.contextmanager
    def _foreign_errors(self, uri: str) -> Iterator[None]:
        """Turn the errors of pyarrow and s3fs into this module's, asking boto3 whether the set-up is to blame."""
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except FileNotFoundError as error:
            self._check_available(uri)
            raise MissingObject(f"{uri} does not exist") from error
        except (OSError, BotoCoreError) as error:
            self._check_available(uri)
            raise StorageFailed(f"{uri}: {error}") from error

    def _check_available(self, uri: str) -> None:
        """Raise StorageUnavailable if the bucket of `uri` can't even be listed there."""
        if _is_s3(uri):
            bucket, key = _bucket_and_key(uri, key_needed=False)
            with self._s3_errors(uri, listing=True):
                self._s3().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)


class _BrokenBody(Exception):
    """A body broke off while it was read."""


def _does_not_delete_many(error: ClientError) -> bool:
    """Return whether a server rejects bulk deletes as such, and not because of the objects to delete.

    Older MinIO requires the header Content-MD5; Google's S3 API does not support bulk deletes.
    """
    code = error.response.get("Error", {}).get("Code", "")
    http = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return code in _NO_MULTI_DELETE_CODES or http in (405, 411, 501)


def _content_range(header: str | None, num_bytes: int) -> tuple[int, int]:
    """Return offset and total size from `bytes 5-9/20`; without the header, the server sent the whole object."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", header or "")
    return (int(match[1]), int(match[2])) if match else (0, num_bytes)


def _unzipped(uri: str, data: bytes, max_bytes: int | None) -> bytes:
    """Decompress a body stored with `Content-Encoding: gzip`; return it unchanged if it is not gzip after all.

    For a damaged body, return the readable beginning, so that the image in it counts as damaged.

    Raises:
        ObjectTooLarge: it decompresses to more than `max_bytes`; no more than that is held in memory.
    """
    unzipped = bytearray()
    while data.startswith(b"\x1f\x8b"):  # a gzip body can have several members
        decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        while data and not decoder.eof:
            # In small steps, because a call that hits damaged data loses all of its output.
            limit = _UNZIP_STEP_BYTES if max_bytes is None else min(_UNZIP_STEP_BYTES, max_bytes - len(unzipped) + 1)
            try:
                unzipped += decoder.decompress(data, limit)
            except zlib.error:
                return bytes(unzipped)
            if max_bytes is not None and len(unzipped) > max_bytes:
                raise ObjectTooLarge(f"{uri} has more than {max_bytes} bytes when decompressed")
            data = decoder.unconsumed_tail
        data = decoder.unused_data
    return bytes(unzipped) or data


# Parsing


def _scheme(uri: str) -> str:
    """Return "s3", "file", or "" for a bare path.

    Raises:
        BadUri: empty, or of another scheme.
    """
    if not uri:
        raise BadUri(f"the URI is empty: expected {ALLOWED_FORMS}")
    if "\0" in uri:
        raise BadUri(f"{uri!r} holds a null character")
    match = _SCHEME.match(uri)
    if match is None:
        return ""
    scheme = match.group(1).lower()
    if scheme == "s3" and not uri[match.end() :].startswith("/"):
        raise BadUri(f"{uri!r} has lost a slash (has a Path mangled it?): expected {ALLOWED_FORMS}")
    if scheme not in ("s3", "file"):
        raise BadUri(f"{uri!r} has the scheme {scheme!r}: expected {ALLOWED_FORMS}")
    return scheme


def _is_s3(uri: str) -> bool:
    return _scheme(uri) == "s3"


def _local_path(uri: str, *, absolute: bool = True) -> str:
    """Return the local path of a bare path or `file://` URI, without a `/` at its end."""
    scheme = _scheme(uri)
    if scheme == "s3":
        raise BadUri(f"{uri!r} is not local")
    path = uri
    if scheme == "file":
        host, slash, rest = uri[len("file:") :].removeprefix("//").partition("/")
        if not slash or host not in ("", "localhost"):
            raise BadUri(f"{uri!r} is not a file on this machine: expected file:///path")
        path = os.fsdecode(urllib.parse.unquote_to_bytes("/" + rest))
    return os.path.abspath(path) if absolute else path


def _bucket_and_key(uri: str, *, key_needed: bool = True) -> tuple[str, str]:
    bucket, _, key = uri[len("s3://") :].partition("/")
    if not bucket:
        raise BadUri(f"{uri!r} names no bucket: expected s3://bucket/key")
    if key_needed and not key:
        raise BadUri(f"{uri!r} names no key: expected s3://bucket/key")
    return bucket, key


def _s3_path(uri: str) -> str:
    """Return `bucket/key`, as pyarrow and s3fs name objects."""
    bucket, key = _bucket_and_key(uri, key_needed=False)
    return f"{bucket}/{key}".rstrip("/")


def _storage_class(entry: ObjectTypeDef) -> str | None:
    """Return the storage class of a listed object, and whether a restored copy of it can be read."""
    storage_class = entry.get("StorageClass")
    # An archived object keeps its class and ETag while a restored copy exists; only the expiry date reveals the copy.
    if storage_class and entry.get("RestoreStatus", {}).get("RestoreExpiryDate"):
        return f"{storage_class} restored"
    return storage_class


def _as_prefix(key: str) -> str:
    """Return the prefix of what lies below `key`: with its slash, so that `a` does not list `ab`."""
    return key if not key or key.endswith("/") else key + "/"


# Local files


def _local_etag(info: os.stat_result) -> str:
    return f"{info.st_size}-{info.st_mtime_ns}"


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")


def _list_local(root: str, on_unreadable: Callable[[str], None] | None) -> Iterator[ObjectInfo]:
    try:
        info = os.stat(root)
        is_folder = stat.S_ISDIR(info.st_mode)
        if is_folder:
            os.scandir(root).close()
            os.stat(os.path.join(root, "."))
    except OSError as error:
        raise StorageUnavailable(f"folder {root} can't be listed: {error.strerror}") from error
    if not is_folder:
        raise StorageUnavailable(f"{root} is not a folder")
    return _walk(root, "", ((info.st_dev, info.st_ino),), on_unreadable)


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], on_unreadable: Callable[[str], None] | None
) -> Iterator[ObjectInfo]:
    try:
        with os.scandir(folder) as entries:
            # A folder sorts as its name and a slash: so the walk follows the order of whole keys, as S3's does.
            ordered = sorted(
                (entry.name + "/" * entry.is_dir(), entry.path)
                for entry in entries
                if not entry.name.startswith(_TEMPORARY)
            )
        if ordered:
            os.stat(os.path.join(folder, "."))  # fails if names can be listed but files can't be opened
    except FileNotFoundError:
        return  # deleted while the walk was under way
    except OSError as error:
        if on_unreadable is not None and isinstance(error, PermissionError):
            on_unreadable(folder)
            return
        raise StorageUnavailable(f"folder {folder} can't be listed: {error.strerror}") from error
    for name, path in ordered:
        try:
            info = os.stat(path)
        except OSError:
            continue  # a link to nowhere, or deleted since: there is no file
        if name.endswith("/"):
            identity = (info.st_dev, info.st_ino)
            if identity not in above:
                yield from _walk(path, prefix + name, (*above, identity), on_unreadable)
        elif stat.S_ISREG(info.st_mode):
            yield _local_info(path, prefix + name, info)


def _local_info(path: str, key: str, info: os.stat_result) -> ObjectInfo:
    uri = path
    try:
        path.encode()
    except UnicodeEncodeError:
        uri = "file://" + urllib.parse.quote_from_bytes(os.fsencode(path))
        key = urllib.parse.quote_from_bytes(os.fsencode(key))
    return ObjectInfo(uri, key, _local_etag(info), info.st_size)


def _read_local(path: str, etag: str | None, max_bytes: int | None) -> tuple[bytes, str]:
    try:
        # Before opening: opening a pipe would wait for its other end for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise StorageFailed(f"{path} is not a file")
        with open(path, "rb") as file:
            info = os.fstat(file.fileno())
            if etag is not None and _local_etag(info) != etag:
                raise ChangedObject(f"{path} has size and time {_local_etag(info)}, and was listed with {etag}")
            if max_bytes is not None and info.st_size > max_bytes:
                raise ObjectTooLarge(f"{path} has {info.st_size} bytes, and {max_bytes} are allowed")
            data = file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingObject(f"{path} does not exist") from error
    except OSError as error:
        raise StorageFailed(f"{path}: {error.strerror}") from error
    if len(data) != info.st_size:
        raise ChangedObject(f"{path} changed while it was read: {info.st_size} bytes became {len(data)}")
    return data, _local_etag(info)


def _write_local(
    path: str, write: Callable[[str], object], *, if_absent: bool = False, if_match: str | None = None
) -> str:
    """Let `write` fill a temporary file beside `path`, put it in its place in one step, and return its etag."""
    folder = os.path.dirname(path)
    is_taken = False
    try:
        os.makedirs(folder, exist_ok=True)
        with _temporary_file(folder) as temporary:
            write(temporary)
            _sync(temporary)
            etag = _local_etag(os.stat(temporary))
            if if_absent:
                try:
                    _move_to_free_name(temporary, path)
                except FileExistsError:
                    is_taken = True  # it was then, even if its owner has deleted it since
                    raise
            elif if_match is not None:
                with _unchanged_local(path, if_match):
                    os.replace(temporary, path)
            else:
                os.replace(temporary, path)
            _sync(folder)
    except OSError as error:
        if is_taken:
            raise FileExistsError(f"{path} exists and is not overwritten") from error
        raise StorageUnavailable(f"{path} can't be written: {error.strerror or error}") from error
    return etag


def _move_to_free_name(temporary: str, path: str) -> None:
    """Move a file atomically to a name that must be free.

    exFAT, FAT and some network drives have no hard links. There, use Linux's no-replace rename. If that is not
    supported either, first create an empty file of the name.

    Raises:
        FileExistsError: another file has the name.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        if not _rename_without_replacing(temporary, path):
            _take_name_and_replace(temporary, path)


def _rename_without_replacing(temporary: str, path: str) -> bool:
    """Rename without replacing; return False if the system or the file system does not support it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), path)


def _take_name_and_replace(temporary: str, path: str) -> None:
    # The lock keeps processes that read the empty file from replacing it, as `_unchanged_local` would.
    with open(path, "x+b") as taken:
        with contextlib.suppress(OSError):  # without flock, the name alone must do
            fcntl.flock(taken, fcntl.LOCK_EX)
        now = os.stat(path)
        if not os.path.samestat(os.fstat(taken.fileno()), now) or now.st_size:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        os.replace(temporary, path)


@contextlib.contextmanager
def _unchanged_local(path: str, etag: str) -> Iterator[None]:
    """Keep other conditional writers from `path` until the block ends, if its file is still the one with `etag`.

    The file itself is locked, so that nothing is left beside it, and the system unlocks it when a process dies. A
    writer who waited for a file that was replaced meanwhile finds that its path names another one.

    Raises:
        ChangedObject, MissingObject: it is another, or gone.
        StorageUnavailable: it can't be opened or replaced.
    """
    try:
        # Writable, because NFS gives an exclusive lock on nothing else.
        with open(path, "r+b") as file:
            _flock(file, path)
            info = os.fstat(file.fileno())
            if not os.path.samestat(info, os.stat(path)) or _local_etag(info) != etag:
                raise ChangedObject(f"{path} is not the file that was read: its size or time differs")
            yield
    except FileNotFoundError as error:
        raise MissingObject(f"{path} does not exist") from error
    except OSError as error:
        raise StorageUnavailable(f"{path} can't be written: {error.strerror or error}") from error


def _flock(file: IO[bytes], path: str) -> None:
    """Lock a file against other conditional writers, who hold it for moments only, unless they are stopped.

    Raises:
        StorageUnavailable: another process holds it for longer than `_MAX_FLOCK_S`.
    """
    deadline = time.monotonic() + _MAX_FLOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageUnavailable(
                    f"{path} can't be written: another process has locked it for {_MAX_FLOCK_S:g} s; is it stopped?"
                ) from None
        time.sleep(0.01)


def _sync(path: str) -> None:
    """Make the file or folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network drives can't sync folders.
        if error.errno not in _NOT_SUPPORTED or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


# Temporary files and folders. A live writer holds a lock on its own; the system releases it when the writer dies.


@contextlib.contextmanager
def _temporary_file(folder: str) -> Iterator[str]:
    """Yield an empty new file in `folder`; delete it at the end unless it was moved away."""
    _delete_stale_temporaries(folder)
    while True:
        path = os.path.join(folder, _TEMPORARY + uuid.uuid4().hex)
        with open(path, "x+b") as file:
            if not _lock_as_live(file, path):
                continue  # another process considered it stale before it was locked
            try:
                yield path
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            return


@contextlib.contextmanager
def _temporary_beside(path: str) -> Iterator[str]:
    """Yield a new folder beside `path`; at the end, delete everything that was not moved out of it."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    _delete_stale_temporaries(folder)
    while True:
        temporary = os.path.join(folder, _TEMPORARY + uuid.uuid4().hex)
        lock = os.path.join(temporary, _LIVE)
        os.mkdir(temporary)
        try:
            file = open(lock, "x+b")  # noqa: SIM115  # closed below; deleted with its folder by another, it is made again
        except FileNotFoundError:
            continue
        with file:
            if not _lock_as_live(file, lock):
                continue
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return


def _lock_as_live(file: IO[bytes], path: str) -> bool:
    """Lock a new temporary file; return False if another process has deleted it meanwhile."""
    with contextlib.suppress(OSError):  # without locks, stale files can't be recognised, and are never deleted
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _delete_stale_temporaries(folder: str) -> None:
    """Delete temporaries of killed writers in `folder`; only once per process, because folders can be large."""
    if (os.getpid(), folder) in _cleaned:
        return
    _cleaned.add((os.getpid(), folder))
    with os.scandir(folder) as entries:
        temporaries = [
            (entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries if entry.name.startswith(_TEMPORARY)
        ]
    for path, is_folder in temporaries:
        # Any error means that its writer is alive, or that we may not delete it.
        with contextlib.suppress(OSError):
            if is_folder and not os.listdir(path):
                os.rmdir(path)  # its writer died before locking it, or will make another one
                continue
            with open(os.path.join(path, _LIVE) if is_folder else path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_folder:
                    _put_back(path)
                    shutil.rmtree(path)
                else:
                    os.unlink(path)


def _put_back(temporary: str) -> None:
    """Move a tree back to its place if its writer died after taking it away and before the new one was there."""
    old = os.path.join(temporary, _OLD)
    for name in os.listdir(old) if os.path.isdir(old) else []:
        target = os.path.join(os.path.dirname(temporary), name)
        if not os.path.lexists(target):
            os.rename(os.path.join(old, name), target)


def _publish_local_tree(source: Path, target: str, *, overwrite: bool) -> None:
    """Copy a folder beside its place, then move it there."""
    if os.path.lexists(target) and not overwrite:
        raise FileExistsError(f"{target} exists and is not overwritten")
    with _temporary_beside(target) as temporary:
        fresh, old = os.path.join(temporary, "fresh"), os.path.join(temporary, _OLD, os.path.basename(target))
        os.mkdir(os.path.dirname(old))
        shutil.copytree(source, fresh)
        for folder, _, names in os.walk(fresh):
            for name in names:
                _sync(os.path.join(folder, name))
            _sync(folder)
        if os.path.lexists(target):
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, target)
            raise
        _sync(os.path.dirname(target))

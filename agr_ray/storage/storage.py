"""`Storage`: URIs to bytes, listings, tables and trees, on local disks and S3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from agr_ray.json_log import print_to_stderr
from agr_ray.storage import tables, trees
from agr_ray.storage import uri as uris
from agr_ray.storage.backend import Backend, ObjectInfo, S3Address
from agr_ray.storage.connection import Connection
from agr_ray.storage.errors import BadUri, StorageError, StorageUnavailable
from agr_ray.storage.local import LocalBackend
from agr_ray.storage.s3 import S3Backend
from agr_ray.storage.trees import DEFAULT_MARKER

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs
    import pyarrow.parquet as pq

    from agr_ray.config import StorageConfig

_LOCAL = LocalBackend()


@dataclass(frozen=True)
class Storage:
    """Access to local and S3 storage. Cheap to make and to pickle; connects on first use."""

    connection: Connection = field(default_factory=Connection)
    _s3: S3Backend = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_s3", S3Backend(self.connection))

    @classmethod
    def from_config(cls, config: StorageConfig) -> Storage:
        """Return the storage that a configuration describes."""
        return cls(Connection(**config.model_dump()))

    def _backend(self, uri: str) -> Backend:
        return self._s3 if uris.is_s3(uri) else _LOCAL

    def probe(self, uri: str, key: str, *, write: bool = False) -> None:
        """Make a cheap request with every S3 client, so that wrong settings are found before any work.

        `key` is the setting that `uri` comes from. With `write`, an object is also written below `uri` and deleted.
        Local paths are not checked, and a server that is merely overloaded passes.

        Raises:
            BadUri, StorageUnavailable: the message is one line that names the key and the problem.
        """
        try:
            self._backend(uri).probe(uri, write=write)
        except BadUri as error:
            raise BadUri(f"{key}: {error}") from None
        except (StorageError, StorageUnavailable) as error:
            raise StorageUnavailable(f"{key}: {error}") from error

    # URIs

    absolute = staticmethod(uris.absolute)
    object_uri = staticmethod(uris.object_uri)
    join = staticmethod(uris.join)

    # Objects

    def list(
        self,
        uri: str,
        suffixes: Sequence[str] | None = None,
        *,
        on_unreadable: Callable[[str], None] | None = None,
    ) -> Iterator[ObjectInfo]:
        """Yield the objects below the folder or prefix `uri`, in the order of their keys' UTF-8 bytes.

        `suffixes` are compared regardless of case. Folders, and the empty objects whose key ends in `/` that stand
        for them, are skipped. Links are followed, except to a folder that holds them. A local file whose name is not
        UTF-8 gets a percent-encoded `file://` URI and key, so that it fits into a table.

        A local subfolder that this user may not list, such as `lost+found`, raises an error, and so does a link into
        one. With `on_unreadable`, it is skipped instead, and `on_unreadable` is called with its path. Broken links are
        skipped.

        Raises:
            StorageUnavailable: no such local folder or bucket, or it can't be listed.
        """
        wanted = None if suffixes is None else tuple(suffix.lower() for suffix in suffixes)
        for info in self._backend(uri).list(uri, on_unreadable):
            if wanted is None or info.key.lower().endswith(wanted):
                yield info

    def list_readable(self, uri: str, suffixes: Sequence[str] | None = None) -> Iterator[ObjectInfo]:
        """Like `list`, but skip local subfolders, and links into folders, that this user may not list, as `lost+found`.

        A warning on stderr names each one, and a last one counts them. Use this only for photographs: a folder of
        results that can't be listed must be an error.

        Raises:
            StorageUnavailable: as `list`, or if `uri` itself can't be listed.
        """
        num_skipped = 0

        def skip(path: str) -> None:
            nonlocal num_skipped
            num_skipped += 1
            print_to_stderr(f"warning: skipping {path}: this user may not list it")

        yield from self.list(uri, suffixes, on_unreadable=skip)
        if num_skipped > 1:
            print_to_stderr(f"warning: {num_skipped} folders and links below {uri} were skipped")

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        """Return the object's bytes; with `etag`, only if it is still the object that was listed with it.

        Raises:
            MissingObject, ChangedObject, ArchivedObject, ObjectTooLarge, StorageFailed: this object can't be read.
            StorageUnavailable: no object can: wrong keys, no such bucket, endpoint out of reach.
        """
        return self._backend(uri).read(uri, etag=etag, max_bytes=max_bytes)[0]

    def read_with_etag(self, uri: str) -> tuple[bytes, str]:
        """Return the object's bytes and the ETag that it had with them; raises the same errors as `read`."""
        return self._backend(uri).read(uri)

    def write(self, uri: str, data: bytes | IO[bytes], *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write the object whole or not at all, making local folders as needed, and return its ETag.

        S3 gets it in one request (objects up to 5 GB), so a killed writer leaves nothing there.

        With `if_absent`, or with `if_match` (the ETag that the object must still have), exactly one of several
        concurrent writers succeeds. On S3, If-None-Match and If-Match ensure that. On disks, `if_absent` uses a hard
        link or a no-replace rename, and `if_match` uses flock, which works only if all writers and deleters pass
        `if_match`. On S3, a condition can also fail if our first attempt succeeded but its response was lost: read the
        object to find out.

        Raises:
            FileExistsError: `if_absent`, and the object exists.
            ChangedObject, MissingObject: `if_match`, and the object has another ETag, or does not exist.
            StorageFailed: this object can't be written.
            StorageUnavailable: no object can.
        """
        if if_absent and if_match is not None:
            raise ValueError("if_absent and if_match exclude each other")
        return self._backend(uri).write(uri, data, if_absent=if_absent, if_match=if_match)

    def copy(self, source: str, target: str) -> None:
        """Copy one object whole or not at all, replacing what is there.

        Within a bucket the server copies (objects up to 5 GB); otherwise the object goes through this process's memory.

        Raises:
            MissingObject: there is no `source`.
            StorageFailed: this object can't be copied.
            StorageUnavailable: no object can.
        """
        backend = self._backend(source)
        if backend is self._backend(target):
            backend.copy(source, target)
        else:
            self.write(target, self.read(source))

    def move(self, source: str, target: str) -> None:
        """Move one object within a file system or a bucket, replacing what is there.

        If another process deletes `source` first, nothing is moved. A local move is atomic; S3 copies, then deletes.

        Raises:
            MissingObject: there is no `source`.
            StorageFailed, StorageUnavailable: it can't be moved.
        """
        self._backend(source).move(source, target)

    def exists(self, uri: str) -> bool:
        """Return whether `uri` is an object or a folder; on S3 a folder is a prefix with an object below it."""
        return self._backend(uri).exists(uri)

    def is_folder(self, uri: str) -> bool:
        """Return whether `uri` is a folder: on S3 a prefix with an object below it, which is no object itself.

        An S3 URI that ends in a slash always is.

        Raises:
            StorageUnavailable: the bucket can't be listed.
        """
        return self._backend(uri).is_folder(uri)

    def delete(self, uri: str, *, if_match: str | None = None) -> None:
        """Delete one object or local file; it need not exist.

        With `if_match`, only if it still has that ETag, in one step as `write` does it.

        Raises:
            ChangedObject, MissingObject: `if_match`, and the object has another ETag, or does not exist.
            StorageFailed, StorageUnavailable: it can't be deleted.
        """
        self._backend(uri).delete(uri, if_match=if_match)

    # Trees

    def upload_tree(self, local_dir: str, uri: str, *, marker: str = DEFAULT_MARKER, overwrite: bool = False) -> None:
        """Publish a local folder at `uri` whole or not at all.

        Locally the folder is copied beside its place and moved there. On S3, where nothing can be moved, `marker`
        is written last, and while an old tree is replaced there is none: a reader that finds the marker finds the
        whole tree.

        Raises:
            FileExistsError: `uri` exists and `overwrite` is false. On S3, the remains of an unfinished upload, which
                have no marker, are always overwritten.
            ValueError: the folder holds no `marker`.
        """
        trees.upload(self._backend(uri), local_dir, uri, marker=marker, overwrite=overwrite)

    def download_tree(self, uri: str, local_dir: str, *, marker: str = DEFAULT_MARKER) -> None:
        """Copy the tree at `uri` to the local folder `local_dir`, which appears whole or not at all.

        Raises:
            MissingObject: there is no `marker` at `uri`: no tree, or an unfinished upload.
            FileExistsError: `local_dir` exists.
        """
        trees.download(self._backend(uri), uri, local_dir, marker=marker)

    def move_tree(self, source: str, target: str) -> None:
        """Move everything below the folder or prefix `source` to `target`, which must be empty.

        Local moves are atomic. S3 can't move objects, so they are copied one by one, within a bucket by the server, and
        the caller must delete `source` later. An empty `source` is ignored.

        Raises:
            StorageFailed: an object can't be copied.
            StorageUnavailable: no object can be copied or moved.
        """
        backend = self._backend(source)
        if backend is self._backend(target):
            backend.move_tree(source, target)
        else:
            trees.copy_objects(backend, source, target, self.copy)

    def delete_tree(self, uri: str) -> None:
        """Delete everything below the folder or prefix `uri`, which need not exist.

        Raises:
            StorageFailed, StorageUnavailable: something can't be deleted.
        """
        self._backend(uri).delete_tree(uri)

    def delete_if_empty(self, uri: str) -> None:
        """Delete an empty local folder. S3 has no folders, so nothing is done there."""
        self._backend(uri).delete_if_empty(uri)

    # Tables

    def read_table(self, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a Parquet file, or all Parquet files of a folder as one table.

        Raises:
            MissingObject: nothing is there.
            NotParquet: it is no Parquet file, or lacks a column.
            StorageFailed, StorageUnavailable: reading failed.
        """
        return tables.read_table(self._backend(uri), uri, columns)

    def read_batches(self, uri: str, columns: Sequence[str], num_rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        """Yield some columns of one Parquet file in batches of at most `num_rows` rows, without reading it whole.

        Raises:
            MissingObject: nothing is there.
            NotParquet: it is no Parquet file, or lacks a column.
            StorageFailed, StorageUnavailable: reading failed.
        """
        yield from tables.read_batches(self._backend(uri), uri, columns, num_rows)

    def read_footer(self, uri: str) -> pq.FileMetaData:
        """Return the footer of one Parquet file: number of rows, schema; raises the same errors as `read_batches`."""
        return tables.read_footer(self._backend(uri), uri)

    def write_table(self, table: pa.Table, uri: str) -> None:
        """Write a table as one Parquet file, whole or not at all, replacing what is there."""
        tables.write_table(self._backend(uri), table, uri)

    # Other libraries

    def s3_address(self, uri: str) -> S3Address | None:
        """Return the location of the bucket of `uri`; None for a local path.

        Raises:
            StorageUnavailable: the bucket does not exist or can't be reached.
        """
        return self._backend(uri).s3_address(uri)

    def arrow_filesystem(self, uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return pyarrow's filesystem for `uri`, for Parquet and for Ray, and the path of `uri` in it."""
        return self._backend(uri).arrow_filesystem(uri)

    def delta_options(self, uri: str) -> dict[str, str]:
        """Return deltalake's `storage_options` for a table at `uri`; raises the same errors as `s3_address`."""
        address = self.s3_address(uri)
        return {} if address is None else self.connection.delta_options(address)

    def iceberg_properties(self, uri: str) -> dict[str, str]:
        """Return the properties with which pyiceberg reads files at `uri`; raises the same errors as `s3_address`."""
        address = self.s3_address(uri)
        return {} if address is None else self.connection.iceberg_properties(address)

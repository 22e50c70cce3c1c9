"""S3 as pyarrow's filesystem, through the same client as everything else.

pyarrow's own S3 client resolves regions, profiles and proxies differently from boto3, does not renew temporary
credentials, and does not support requester-pays. So Parquet files, and all files that Ray reads or writes, go through
`S3Backend` instead, and pyarrow sees the same S3 as boto3.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.fs

from agr_ray.storage.errors import MissingObject

if TYPE_CHECKING:
    from agr_ray.storage.s3 import S3Backend

_TAIL_BYTES: Final = 64 * 1024
"""Bytes to read from the end of a file when it is opened: they hold a Parquet footer, or a whole small file."""
_STREAM_BYTES: Final = 8 * 1024**2
"""Bytes to read at a time from a file that is read sequentially."""
_SPOOL_BYTES: Final = 8 * 1024**2
"""Bytes of a file being written that are kept in memory; longer files go to a local temporary file."""


class S3Handler(pyarrow.fs.FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """Handler for pyarrow's `PyFileSystem`. Paths are `bucket/key`; folders are prefixes and need not be created.

    It is pickled with its backend, which holds no credentials, and reconnects in each process.
    """

    def __init__(self, backend: S3Backend) -> None:
        self._backend = backend

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Handler) and self._backend == other._backend

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._backend)

    def get_type_name(self) -> str:
        """Return the file system's type name for pyarrow."""
        return "agr-ray-s3"

    def normalize_path(self, path: str) -> str:
        """Return the path unchanged, because keys are literal."""
        return path

    # Looking

    def get_file_info(self, paths: Sequence[str]) -> list[pyarrow.fs.FileInfo]:
        """Return for each path whether it is a file, a folder or neither."""
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: Any) -> list[pyarrow.fs.FileInfo]:
        """List a folder: folders first, parents before children."""
        base = selector.base_dir.rstrip("/")
        folders: dict[str, None] = {}
        files = []
        exists = False
        for info in self._backend.list_entries(_uri(base), recursive=selector.recursive):
            exists = True
            parts = info.key.split("/")
            folders |= dict.fromkeys("/".join(parts[:count]) for count in range(1, len(parts)) if parts[count - 1])
            if parts[-1]:
                files.append(pyarrow.fs.FileInfo(f"{base}/{info.key}", pyarrow.fs.FileType.File, size=info.size_bytes))
        if not exists and not selector.allow_not_found:
            info = self._info(base)
            if info.type == pyarrow.fs.FileType.File:
                raise NotADirectoryError(base)
            if info.type == pyarrow.fs.FileType.NotFound:
                raise FileNotFoundError(base)
        return [pyarrow.fs.FileInfo(f"{base}/{name}", pyarrow.fs.FileType.Directory) for name in folders] + files

    def _info(self, path: str) -> pyarrow.fs.FileInfo:
        size, is_folder = self._backend.look_up(_uri(path))
        if size is not None:
            return pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.File, size=size)
        kind = pyarrow.fs.FileType.Directory if is_folder else pyarrow.fs.FileType.NotFound
        return pyarrow.fs.FileInfo(path, kind)

    # Changing

    def create_dir(self, path: str, recursive: bool) -> None:
        """Do nothing: a prefix exists with the first object below it."""

    def delete_dir(self, path: str) -> None:
        """Delete everything below the path."""
        self._backend.delete_tree(_uri(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        """Delete everything below the path."""
        self._backend.delete_tree(_uri(path))

    def delete_root_dir_contents(self) -> None:
        """Refuse."""
        raise NotImplementedError("deleting all buckets is not supported")

    def delete_file(self, path: str) -> None:
        """Delete one object."""
        self._backend.delete(_uri(path))

    def copy_file(self, src: str, dest: str) -> None:
        """Copy one object."""
        try:
            self._backend.copy(_uri(src), _uri(dest))
        except MissingObject as error:
            raise FileNotFoundError(str(error)) from error

    def move(self, src: str, dest: str) -> None:
        """Copy one object, then delete the original."""
        self.copy_file(src, dest)
        self.delete_file(src)

    # Reading and writing

    def open_input_stream(self, path: str) -> pa.PythonFile:
        """Open for sequential reading."""
        return pa.PythonFile(io.BufferedReader(self._reader(path), _STREAM_BYTES), mode="r")

    def open_input_file(self, path: str) -> pa.PythonFile:
        """Open for random access."""
        return pa.PythonFile(self._reader(path), mode="r")

    def open_output_stream(self, path: str, metadata: object) -> pa.PythonFile:
        """Open a new object for writing; it appears in S3 when it is closed."""
        return pa.PythonFile(_Writer(self._backend, _uri(path)), mode="w")

    def open_append_stream(self, path: str, metadata: object) -> pa.PythonFile:
        """Raise, because S3 objects can't be appended to."""
        raise NotImplementedError("S3 can't append to an object")

    def _reader(self, path: str) -> _Reader:
        try:
            return _Reader(self._backend, _uri(path))
        except MissingObject as error:
            raise FileNotFoundError(str(error)) from error


def _uri(path: str) -> str:
    return f"s3://{path}"


class _Reader(io.RawIOBase):
    """One object as a file. If the object is replaced after it was opened, reads fail with ChangedObject."""

    def __init__(self, backend: S3Backend, uri: str) -> None:
        super().__init__()
        self._backend = backend
        self._uri = uri
        self._tail = backend.read_range(uri, -_TAIL_BYTES, _TAIL_BYTES)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._tail.total_bytes}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read()

    def read(self, size: int | None = -1) -> bytes:
        rest = max(self._tail.total_bytes - self._position, 0)
        size = rest if size is None or size < 0 else min(size, rest)
        start = self._position
        if not size:
            return b""
        self._position += size
        if start >= self._tail.offset:
            return self._tail.data[start - self._tail.offset :][:size]
        return self._backend.read_range(self._uri, start, size, etag=self._tail.etag).data


class _Writer:
    """One object that is being written. It is sent in one request, so a killed writer leaves nothing in S3.

    It is not an `IOBase`, because that closes itself when it is garbage-collected and so would publish half an object.
    """

    def __init__(self, backend: S3Backend, uri: str) -> None:
        self._backend = backend
        self._uri = uri
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115  # closed in `close`

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self._file.closed:
            with self._file:
                self._file.seek(0)
                self._backend.write(self._uri, self._file)

"""The interface of a storage backend. `local.py` and `s3.py` implement it, and `Storage` picks one by URI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import pyarrow.fs


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
class S3Address:
    """Everything, except keys, that another program needs to reach a bucket."""

    endpoint_url: str | None
    """None: AWS itself."""
    region: str
    addressing_style: str
    """`virtual`, `path` or `auto`."""
    anonymous: bool
    """Whether requests are not signed."""


class Backend(Protocol):
    """One kind of storage. All URIs are its own; `Storage` has the contracts of the methods of the same names."""

    def list(self, uri: str, on_unreadable: Callable[[str], None] | None) -> Iterator[ObjectInfo]:
        """Yield the objects below a folder or prefix, in the order of their keys' UTF-8 bytes."""

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> tuple[bytes, str]:
        """Return an object's bytes and ETag."""

    def write(self, uri: str, data: bytes | IO[bytes], *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write an object whole or not at all, and return its ETag."""

    def write_with(self, uri: str, fill: Callable[[IO[bytes]], object]) -> None:
        """Let `fill` write a temporary file, then publish it as the object: whole, or not at all if `fill` raises."""

    def copy(self, source: str, target: str) -> None:
        """Copy one object whole or not at all."""

    def move(self, source: str, target: str) -> None:
        """Move one object, replacing what is there; only if `source` exists."""

    def exists(self, uri: str) -> bool:
        """Return whether an object or a folder exists."""

    def is_folder(self, uri: str) -> bool:
        """Return whether it is a folder and not an object."""

    def delete(self, uri: str, *, if_match: str | None = None) -> None:
        """Delete one object."""

    def upload_tree(self, source: Path, names: Sequence[str], uri: str, *, marker: str, overwrite: bool) -> None:
        """Publish the files `names` of a local folder, `marker` among them, whole or not at all."""

    def download_tree(self, uri: str, target: str) -> None:
        """Copy a whole tree to a local folder that does not exist yet."""

    def move_tree(self, source: str, target: str) -> None:
        """Move, or where that is impossible copy, everything below `source` to `target`."""

    def delete_tree(self, uri: str) -> None:
        """Delete everything below a folder or prefix."""

    def delete_if_empty(self, uri: str) -> None:
        """Delete an empty folder."""

    def probe(self, uri: str, *, write: bool) -> None:
        """Check that every client can be used, with cheap requests."""

    def s3_address(self, uri: str) -> S3Address | None:
        """Return the location of a bucket; None if there is none."""

    def arrow_filesystem(self, uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return pyarrow's filesystem and the path in it."""

    def library_errors(self, uri: str) -> AbstractContextManager[None]:
        """Turn the errors of pyarrow and s3fs into this package's."""

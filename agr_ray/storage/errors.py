"""Errors of storage, in two kinds.

A `StorageError` concerns one object and carries the `Status` of that object's row. `StorageUnavailable` concerns the
set-up (keys, bucket, endpoint, folder) and should end the run. It is not a `StorageError`, so code that turns bad
objects into rows can't swallow it.
"""

from __future__ import annotations

from typing import ClassVar

from agr_ray.errors import ConfigError
from agr_ray.schema import Status


class StorageError(Exception):
    """An operation on one object failed. `status` is the status of its row."""

    status: ClassVar[Status] = Status.FAILED


class MissingObject(StorageError):
    """The object does not exist."""

    status = Status.MISSING


class ChangedObject(StorageError):
    """The object is not the one that was listed or read before."""

    status = Status.CHANGED


class ObjectTooLarge(StorageError):
    """The object has more bytes than the caller allows; its body was not read."""

    status = Status.TOO_LARGE


class ArchivedObject(StorageError):
    """The object is in an archive and must be restored before it can be read."""

    status = Status.ARCHIVED


class StorageFailed(StorageError):
    """Requests for this object failed after all retries, or access to it is denied."""

    status = Status.FAILED


class ServerFailed(StorageFailed):
    """The server failed or was too busy: a later request for the object may succeed."""


class NotParquet(StorageError):
    """The object is not a Parquet file with the expected columns. A retry would not help."""


class BadUri(ConfigError, ValueError):
    """The URI is malformed, or its scheme is not supported."""


class StorageUnavailable(Exception):
    """Storage can't be used as configured. The message is one line that names the bucket, endpoint or folder."""

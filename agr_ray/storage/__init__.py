"""Storage: URIs to bytes, listings, tables and trees, on local disks and S3.

`Storage` picks a `Backend` by URI (`local.py`, `s3.py`); `uri.py` parses URIs, and `errors.py` names what can go wrong.
"""

from agr_ray.storage.backend import ObjectInfo, S3Address
from agr_ray.storage.connection import Connection
from agr_ray.storage.errors import (
    ArchivedObject,
    BadUri,
    ChangedObject,
    MissingObject,
    NotParquet,
    ObjectTooLarge,
    ServerFailed,
    StorageError,
    StorageFailed,
    StorageUnavailable,
)
from agr_ray.storage.storage import Storage

__all__ = [
    "ArchivedObject",
    "BadUri",
    "ChangedObject",
    "Connection",
    "MissingObject",
    "NotParquet",
    "ObjectInfo",
    "ObjectTooLarge",
    "S3Address",
    "ServerFailed",
    "Storage",
    "StorageError",
    "StorageFailed",
    "StorageUnavailable",
]

"""Manifests of sources, with the images read in this process instead of `prepare`'s workers."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from agr_ray.data.manifest import Content, SourceRow, build_manifest, content_hash, image_id, in_key_order
from agr_ray.storage import Storage, StorageError


def read_manifest(rows: Iterable[SourceRow], source: str, storage: Storage) -> pa.Table:
    """Return the manifest of a source after reading each image whose label can be used."""
    ordered = in_key_order(rows, source)
    contents = {}
    for row in ordered:
        if row.label.error is None and not row.missing:
            try:
                contents[image_id(row.uri)] = Content(content_hash(storage.read(row.uri, etag=row.etag)))
            except StorageError as error:
                contents[image_id(row.uri)] = Content(None, str(error.status), str(error))
    return build_manifest(ordered, source, contents)

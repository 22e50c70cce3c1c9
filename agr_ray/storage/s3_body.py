"""Bodies of S3's responses: whole objects, decompressed if necessary, and ranges."""

from __future__ import annotations

import contextlib
import re
import zlib
from dataclasses import dataclass
from typing import Any, Final

from agr_ray.storage.errors import ChangedObject, ObjectTooLarge

_UNZIP_STEP_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class ObjectRange:
    """Some bytes of an object."""

    data: bytes
    offset: int
    """Offset of the first byte."""
    total_bytes: int
    """Size of the whole object."""
    etag: str


class BrokenBody(Exception):
    """A body broke off while it was read."""


def read_body(uri: str, response: Any, etag: str | None, *, max_bytes: int | None, is_range: bool) -> ObjectRange:
    """Return the body of a response to GetObject; with `is_range`, as it is stored, else decompressed.

    Raises:
        ChangedObject: the object does not have `etag`.
        ObjectTooLarge: it has more than `max_bytes`, stored or decompressed.
        BrokenBody: it broke off.
    """
    from botocore.exceptions import HTTPClientError, IncompleteReadError, ReadTimeoutError
    from urllib3.exceptions import HTTPError

    with contextlib.closing(response["Body"]) as body:
        found_etag = response["ETag"].strip('"')
        if etag is not None and found_etag != etag:  # a server that ignores If-Match
            raise ChangedObject(f"{uri} has ETag {found_etag}, and was listed with {etag}")
        size = response["ContentLength"]
        if max_bytes is not None and size > max_bytes:
            raise ObjectTooLarge(f"{uri} has {size} bytes, and {max_bytes} are allowed")
        try:
            data = body.read()
        except (HTTPClientError, IncompleteReadError, ReadTimeoutError, HTTPError, OSError) as error:
            raise BrokenBody(str(error)) from error
    if is_range:
        offset, total = _content_range(response.get("ContentRange"), len(data))
        return ObjectRange(data, offset, total, found_etag)
    if response.get("ContentEncoding", "").lower() in ("gzip", "x-gzip"):
        data = _unzipped(uri, data, max_bytes)
    return ObjectRange(data, 0, len(data), found_etag)


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

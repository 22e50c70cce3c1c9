"""URIs. This is the only module that parses them.

A URI is a `str` in one of three forms:

- a bare local path, taken literally: `%`, `#` and blanks have no special meaning;
- `file:///path`, percent-decoded as its standard requires;
- `s3://bucket/key`, the key taken literally: nothing in it is decoded, and `//` is kept.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from typing import Final

from agr_ray.redact import redacted
from agr_ray.storage.errors import BadUri

ALLOWED_FORMS: Final = "a local path, file:///path or s3://bucket/key"
_SCHEME: Final = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/")


def is_s3(uri: str) -> bool:
    """Return whether it is an S3 URI; false: it is local.

    Raises:
        BadUri: it is empty, malformed, or of another scheme.
    """
    return _scheme(uri) == "s3"


def absolute(uri: str) -> str:
    """Return the URI in its one canonical form: a bare absolute local path, or `s3://bucket/key`.

    A relative path is resolved against the working directory, so call this before Ray changes it.

    Raises:
        BadUri: the URI is empty, malformed, or of an unknown scheme.
    """
    if not is_s3(uri):
        return local_path(uri)
    rest = uri.partition("://")[2]
    if not rest.strip("/") or rest.startswith("/"):
        raise BadUri(f"{redacted(uri)!r} names no bucket: expected s3://bucket/key")
    return f"s3://{rest}"


def object_uri(uri: str) -> str:
    """Return the canonical URI of one object. The URI of a local file whose name is not UTF-8 is returned unchanged.

    Raises:
        BadUri: as `absolute`, or the URI names no bucket or no key.
    """
    canonical = absolute(uri)
    if is_s3(canonical):
        bucket_and_key(canonical)
    return canonical if _is_utf8(canonical) else uri


def join(uri: str, *parts: str) -> str:
    """Return the URI of `parts` below `uri`. Parts are literal: `//` in an S3 key is kept."""
    joined = uri if is_s3(uri) else local_path(uri, absolute=False)
    for part in parts:
        joined = joined + part if joined.endswith("/") else f"{joined}/{part}"
    return joined


def leaves_folder(key: str) -> bool:
    """Return whether a key below a folder could name a file outside it, or is cut short by a null character."""
    return key.startswith("/") or "\0" in key or ".." in key.split("/")


def ancestors(uri: str) -> list[str]:
    """Return the canonical URIs of all folders or prefixes that hold `uri`: the bucket or `/` first, its own last."""
    parts = absolute(uri).split("/")
    num_root_parts = 3 if is_s3(uri) else 1  # of s3://bucket and of /
    return ["/".join(parts[:number]) or "/" for number in range(num_root_parts, len(parts))]


def is_bucket(uri: str) -> bool:
    """Return whether it is the URI of a whole bucket."""
    return is_s3(uri) and not bucket_and_key(uri, key_needed=False)[1]


def local_path(uri: str, *, absolute: bool = True) -> str:
    """Return the local path of a bare path or `file://` URI, without a `/` at its end.

    Raises:
        BadUri: the URI is malformed or not local.
    """
    scheme = _scheme(uri)
    if scheme == "s3":
        raise BadUri(f"{redacted(uri)!r} is not local")
    path = uri
    if scheme == "file":
        host, slash, rest = uri[len("file:") :].removeprefix("//").partition("/")
        if not slash or host not in ("", "localhost"):
            raise BadUri(f"{redacted(uri)!r} is not a file on this machine: expected file:///path")
        path = os.fsdecode(urllib.parse.unquote_to_bytes("/" + rest))
    return os.path.abspath(path) if absolute else path


def utf8_uri(path: str) -> str:
    """Return a local path, or a percent-encoded `file://` URI if the path is not UTF-8."""
    return path if _is_utf8(path) else "file://" + utf8_key(path)


def utf8_key(key: str) -> str:
    """Return a key, percent-encoded if it is not UTF-8."""
    return key if _is_utf8(key) else urllib.parse.quote_from_bytes(os.fsencode(key))


def bucket_and_key(uri: str, *, key_needed: bool = True) -> tuple[str, str]:
    """Return the bucket and the key of an S3 URI; without `key_needed`, the key may be empty.

    Raises:
        BadUri: the URI names no bucket or no key.
    """
    bucket, _, key = uri[len("s3://") :].partition("/")
    if not bucket:
        raise BadUri(f"{redacted(uri)!r} names no bucket: expected s3://bucket/key")
    if key_needed and not key:
        raise BadUri(f"{redacted(uri)!r} names no key: expected s3://bucket/key")
    return bucket, key


def bucket_path(uri: str) -> str:
    """Return `bucket/key` of an S3 URI: the paths of pyarrow and s3fs."""
    bucket, key = bucket_and_key(uri, key_needed=False)
    return f"{bucket}/{key}".rstrip("/")


def as_prefix(key: str) -> str:
    """Return the prefix of all keys below `key`, with its slash, so that `a` does not list `ab`."""
    return key if not key or key.endswith("/") else key + "/"


def _scheme(uri: str) -> str:
    """Return "s3", "file", or "" for a bare path."""
    if not uri:
        raise BadUri(f"the URI is empty: expected {ALLOWED_FORMS}")
    if "\0" in uri:
        raise BadUri(f"{redacted(uri)!r} holds a null character")
    match = _SCHEME.match(uri)
    if match is None:
        return ""
    scheme = match.group(1).lower()
    if scheme == "s3" and not uri[match.end() :].startswith("/"):
        raise BadUri(f"{redacted(uri)!r} lacks a slash (did pathlib.Path remove it?): expected {ALLOWED_FORMS}")
    if scheme == "s3" and re.match("[^/]*[:@]", uri[match.end() + 1 :]):
        raise BadUri(
            f"{redacted(uri)!r} has a user or password before its bucket; keys come from the usual AWS variables"
        )
    if scheme not in ("s3", "file"):
        raise BadUri(f"{redacted(uri)!r} has the scheme {scheme!r}: expected {ALLOWED_FORMS}")
    return scheme


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

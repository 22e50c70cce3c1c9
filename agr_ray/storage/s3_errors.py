"""botocore's errors, turned into this package's. Only for use once boto3 is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal, NoReturn

from agr_ray.redact import redacted
from agr_ray.storage.errors import (
    ArchivedObject,
    ChangedObject,
    MissingObject,
    ServerFailed,
    StorageFailed,
    StorageUnavailable,
)
from agr_ray.storage.uri import bucket_and_key

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError, ClientError

Action = Literal["read", "list", "write", "create"]
"""Purpose of a request; `create`: to write an object that must not exist."""

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
"""Error codes that requests for any other object would get, too. A bare AccessDenied is not among them: on a read it
may concern one object only."""
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


@contextlib.contextmanager
def s3_errors(uri: str, endpoint_url: str, action: Action) -> Iterator[None]:
    """Turn botocore's errors into this package's.

    Raises:
        StorageError: the request for this object failed.
        FileExistsError: `create`, and the object exists.
        StorageUnavailable: requests for other objects would fail too.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        _raise_for_answer(uri, redacted(endpoint_url), action, error)
    except BotoCoreError as error:
        _raise_without_answer(uri, redacted(endpoint_url), error)


def code_and_status(error: ClientError) -> tuple[str, int]:
    """Return S3's error code and the HTTP status of an answer; empty and 0 if the answer has none."""
    code = error.response.get("Error", {}).get("Code", "")
    return str(code), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0


def rejects_bulk_deletes(error: ClientError) -> bool:
    """Return whether a server rejects bulk deletes as such, and not because of the objects to delete.

    Older MinIO requires the header Content-MD5; Google's S3 API does not support bulk deletes.
    """
    code, http = code_and_status(error)
    return code in _NO_MULTI_DELETE_CODES or http in (405, 411, 501)


def _raise_for_answer(uri: str, endpoint_url: str, action: Action, error: ClientError) -> NoReturn:
    code, http = code_and_status(error)
    bucket, _ = bucket_and_key(uri, key_needed=False)
    is_listing, is_writing = action == "list", action in ("write", "create")
    where = f"at {endpoint_url}"
    if code == "NoSuchBucket" or (is_listing and http == 404):
        raise StorageUnavailable(f"bucket {bucket!r} does not exist {where}") from error
    if code in _UNAVAILABLE_CODES or (is_listing and 400 <= http < 500 and http != 429):
        reason = error.response.get("Error", {}).get("Message", "no reason given")
        raise StorageUnavailable(
            f"bucket {bucket!r} {where} refuses these keys or settings: {code}: {reason}"
        ) from error
    if code in ("NoSuchKey", "NoSuchVersion") or (http == 404 and not is_writing):
        raise MissingObject(f"{uri} does not exist") from error
    if code in ("InvalidObjectState", "ObjectNotInActiveTierError"):
        storage_class = error.response.get("StorageClass")
        archive = f"archived in storage class {storage_class}" if storage_class else "archived"
        raise ArchivedObject(f"{uri} is {archive}: restore it before it can be read") from error
    if code in ("PreconditionFailed", "ConditionalRequestConflict") or http == 412:
        if action == "create":
            raise FileExistsError(f"{uri} exists and is not overwritten") from error
        raise ChangedObject(f"{uri} is not the object that was listed: its ETag differs") from error
    if is_writing and http == 403:
        raise StorageUnavailable(f"bucket {bucket!r} {where} can't be written with these keys: {code}") from error
    failed = ServerFailed if http >= 500 or http == 429 else StorageFailed
    raise failed(f"{uri}: {code or http}: {redacted(str(error))}") from error


def _raise_without_answer(uri: str, endpoint_url: str, error: BotoCoreError) -> NoReturn:
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

    bucket, _ = bucket_and_key(uri, key_needed=False)
    reason = redacted(" ".join(str(error).split()))
    if isinstance(error, (EndpointConnectionError, ConnectTimeoutError, ProxyConnectionError, SSLError)):
        raise StorageUnavailable(f"bucket {bucket!r}: S3 endpoint {endpoint_url} can't be reached: {reason}") from error
    if isinstance(error, (NoCredentialsError, PartialCredentialsError, TokenRetrievalError, UnauthorizedSSOTokenError)):
        raise StorageUnavailable(
            f"bucket {bucket!r} at {endpoint_url}: no usable keys ({reason}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or an instance role"
        ) from error
    if isinstance(error, (ParamValidationError, InvalidRegionError)):
        raise StorageUnavailable(f"bucket {bucket!r} at {endpoint_url}: {reason}") from error
    raise ServerFailed(f"{uri}: {reason}") from error

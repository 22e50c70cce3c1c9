"""Connection settings for S3, and the clients that are made with them.

boto3 lists, reads and writes S3, also for pyarrow and Ray (`s3_filesystem.py`); s3fs downloads trees of files. Both are
built on botocore. Both are made from the same kind of botocore session, which resolves everything that is not set
here: credentials and their renewal, assumed roles, endpoints, proxies, certificates, FIPS and dual-stack endpoints.
botocore also follows S3's redirects to buckets in other regions.

deltalake and pyiceberg bring clients of their own, for the few small requests of a commit. They get the credentials
that botocore found, and the address that boto3 found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from agr_ray.redact import redacted
from agr_ray.storage.errors import StorageUnavailable

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

    from agr_ray.storage.backend import S3Address

T = TypeVar("T")

DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True)
class Connection:
    """Settings of all S3 clients: the fields of `StorageConfig`.

    Keys come from AWS's usual chain (variables, profile, instance role); they are never stored here.
    """

    endpoint_url: str | None = None
    """URL of an S3-compatible server, such as `http://host:8333`. None: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the
    profile's, else AWS itself."""
    region: str | None = None
    """None: AWS_REGION, AWS_DEFAULT_REGION or the profile's, else us-east-1."""
    anonymous: bool = False
    """Send unsigned requests, without credentials; for public buckets."""
    requester_pays: bool = False
    """Agree to pay for requests; requester-pays buckets require it."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """`path`: the bucket is in the URL's path; `virtual`: in its host name; `auto`: as the AWS profile says, else
    virtual for AWS and path for other servers."""
    timeout_s: float = 30.0
    """Timeout for a connection, and for each wait on a socket."""
    max_attempts: int = 6
    """Attempts for each request, including the first."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}: at least 1 is needed")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s:g}: it must be above 0")

    def limited(self, timeout_s: float, max_attempts: int) -> Connection:
        """Return a connection with fewer attempts and shorter timeouts."""
        return replace(
            self, timeout_s=min(timeout_s, self.timeout_s), max_attempts=min(max_attempts, self.max_attempts)
        )

    def boto3_client(self) -> S3Client:
        """Return a new boto3 client.

        Raises:
            StorageUnavailable: the settings, the AWS variables or the profile are invalid.
        """
        import boto3
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        try:
            session = botocore.session.Session()
            arguments = self._prepare(session)
            config = Config(**self._config(session))
            client = boto3.Session(botocore_session=session).client("s3", config=config, **arguments)
        except (BotoCoreError, ValueError) as error:
            raise StorageUnavailable(f"S3 can't be used as configured: {redacted(str(error))}") from error
        if "@" in client.meta.endpoint_url:  # it would appear in messages and in views.sql
            raise StorageUnavailable(
                f"the S3 endpoint {redacted(client.meta.endpoint_url)} must be a URL without user and password; keys "
                "come from the usual AWS variables"
            )
        return client

    def s3fs_filesystem(self) -> Any:
        """Return a new `s3fs.S3FileSystem`.

        Raises:
            StorageUnavailable: the settings, the AWS variables or the profile are invalid.
        """
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
                client_kwargs=self._prepare(session),
                config_kwargs=self._config(session),
                # Others write to the same prefixes, so cached listings would go stale.
                use_listings_cache=False,
            )
        except (BotoCoreError, ValueError) as error:
            raise StorageUnavailable(f"S3 can't be used as configured: {redacted(str(error))}") from error

    def delta_options(self, address: S3Address) -> dict[str, str]:
        """Return deltalake's `storage_options`; raises StorageUnavailable as `boto3_client`."""
        return {
            "aws_region": address.region,
            "aws_virtual_hosted_style_request": str(address.addressing_style == "virtual").lower(),
            "aws_skip_signature": str(self.anonymous).lower(),
            "aws_request_payer": str(self.requester_pays).lower(),
            "aws_conditional_put": "etag",
            "allow_http": "true",  # as boto3: the endpoint decides
            "connect_timeout": f"{self.timeout_s:g}s",
            "timeout": f"{self.timeout_s:g}s",
            "max_retries": str(self.max_attempts - 1),
            **self._keys("aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
            **({"aws_endpoint_url": address.endpoint_url} if address.endpoint_url else {}),
        }

    def iceberg_properties(self, address: S3Address) -> dict[str, str]:
        """Return pyiceberg's properties for S3; raises StorageUnavailable as `boto3_client`."""
        return {
            "s3.region": address.region,
            "s3.force-virtual-addressing": str(address.addressing_style == "virtual").lower(),
            "s3.anonymous": str(self.anonymous).lower(),
            "s3.connect-timeout": f"{self.timeout_s:g}",
            "s3.request-timeout": f"{self.timeout_s:g}",
            **self._keys("s3.access-key-id", "s3.secret-access-key", "s3.session-token"),
            **({"s3.endpoint": address.endpoint_url} if address.endpoint_url else {}),
        }

    def _keys(self, key_id: str, key: str, token: str) -> dict[str, str]:
        """Return the credentials that botocore finds, under these names."""
        import botocore.session
        from botocore.exceptions import BotoCoreError

        try:
            session = botocore.session.Session()
            self._prepare(session)
            credentials = None if self.anonymous else session.get_credentials()
            if credentials is None:
                return {}
            found = credentials.get_frozen_credentials()
        except (BotoCoreError, ValueError) as error:
            raise StorageUnavailable(f"S3 can't be used as configured: {redacted(str(error))}") from error
        keys = {key_id: found.access_key, key: found.secret_key, token: found.token}
        return {name: value for name, value in keys.items() if value}

    def _prepare(self, session: Any) -> dict[str, Any]:
        """Prepare a botocore session, and return the arguments for creating its S3 client, except `config`."""
        region = self.region or os.environ.get("AWS_REGION") or session.get_config_variable("region") or DEFAULT_REGION
        # Set on the session too, because it creates the STS client that assumes roles.
        session.set_config_variable("region", region)
        if self.requester_pays:
            session.register("before-call.s3", _pay)
        return {"region_name": region} | ({"endpoint_url": self.endpoint_url} if self.endpoint_url else {})

    def _config(self, session: Any) -> dict[str, Any]:
        """Return the arguments of the client's botocore `Config`."""
        from botocore import UNSIGNED

        config: dict[str, Any] = {
            "connect_timeout": self.timeout_s,
            "read_timeout": self.timeout_s,
            "retries": {"total_max_attempts": self.max_attempts, "mode": "standard"},
            "max_pool_connections": 64,
        }
        if self.anonymous:
            config["signature_version"] = UNSIGNED
        if self.addressing_style != "auto":
            config["s3"] = {"addressing_style": self.addressing_style}
        if self._is_custom(session):
            # Older servers do not support the checksums that AWS clients send by default.
            for name in ("request_checksum_calculation", "response_checksum_validation"):
                if not _is_set(session, name):
                    config[name] = "when_required"
        return config

    def _is_custom(self, session: Any) -> bool:
        if self.endpoint_url:
            return True
        return bool(
            os.environ.get("AWS_ENDPOINT_URL_S3")
            or os.environ.get("AWS_ENDPOINT_URL")
            or session.get_scoped_config().get("endpoint_url")
            or session.get_scoped_config().get("services")
        )


class Clients:
    """Clients, made once per process, on first use. A pickled copy starts empty."""

    def __init__(self) -> None:
        self._clients: dict[tuple[int, str], Any] = {}

    def __reduce__(self) -> tuple[type[Clients], tuple[()]]:
        return (Clients, ())

    def get(self, name: str, make: Callable[[], T]) -> T:
        """Return this process's client of that name."""
        # No lock, because a forked process could inherit it locked. If two clients are created at once, one is dropped.
        key = (os.getpid(), name)
        if key not in self._clients:
            self._clients.setdefault(key, make())
        return cast("T", self._clients[key])


def _is_set(session: Any, name: str) -> bool:
    return f"AWS_{name.upper()}" in os.environ or name in session.get_scoped_config()


def _pay(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = "requester"

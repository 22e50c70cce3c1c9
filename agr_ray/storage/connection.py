"""Connection settings for S3, shared by every client.

boto3 and s3fs are both built on botocore. Both clients are created from the same kind of botocore session, which
resolves everything that is not set here: credentials and their renewal, assumed roles, endpoints, proxies,
certificates, FIPS and dual-stack endpoints. botocore also follows S3's redirects to buckets in other regions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

AddressingStyle = Literal["auto", "path", "virtual"]

DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True)
class Connection:
    """Settings of all S3 clients."""

    endpoint_url: str | None
    region: str | None
    anonymous: bool
    requester_pays: bool
    addressing_style: AddressingStyle
    request_timeout_s: float
    max_attempts: int

    def prepare(self, session: Any) -> dict[str, Any]:
        """Prepare a botocore session, and return the arguments for creating its S3 client, except `config`.

        Raises:
            BotoCoreError: the AWS variables or the profile are invalid.
        """
        region = self.region or os.environ.get("AWS_REGION") or session.get_config_variable("region") or DEFAULT_REGION
        # Set on the session too, because it creates the STS client that assumes roles.
        session.set_config_variable("region", region)
        if self.requester_pays:
            session.register("before-call.s3", _pay)
        return {"region_name": region} | ({"endpoint_url": self.endpoint_url} if self.endpoint_url else {})

    def config(self, session: Any) -> dict[str, Any]:
        """Return the arguments of the client's botocore `Config`."""
        from botocore import UNSIGNED

        config: dict[str, Any] = {
            "connect_timeout": self.request_timeout_s,
            "read_timeout": self.request_timeout_s,
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


def _is_set(session: Any, name: str) -> bool:
    return f"AWS_{name.upper()}" in os.environ or name in session.get_scoped_config()


def _pay(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = "requester"

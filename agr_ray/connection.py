"""How S3 is reached: the one place from which every client takes its settings.

boto3 and s3fs both stand on botocore. So a botocore session resolves whatever is not set here (credentials and their
renewal, assumed roles, endpoints, proxies, certificates, FIPS and dual-stack addresses), and both clients are made
from such a session in the same way. A bucket in another region is found by botocore, which follows S3's answer.
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
        """Prepare a botocore session, and return the arguments with which it makes an S3 client, but for `config`.

        Raises:
            BotoCoreError: AWS's variables or profile can't be used.
        """
        region = self.region or os.environ.get("AWS_REGION") or session.get_config_variable("region") or DEFAULT_REGION
        # For the session too, because it makes the STS client that assumes roles.
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
            # Older servers know nothing of the checksums that AWS would like to have.
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

"""Settings of the S3 clients and of the Ray cluster."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import CliImplicitFlag

from agr_ray.config.section import Address, PositiveInt, Section, Timeout


class StorageConfig(Section):
    """The connection to S3. Credentials come from the usual AWS variables, profiles or instance roles."""

    endpoint_url: Address = None
    """Address of an S3-compatible server; none: AWS_ENDPOINT_URL if set, else AWS itself."""
    region: str | None = None
    """Region of the buckets. None: from the usual AWS variables. AWS buckets in other regions are found anyway."""
    anonymous: bool = False
    """Send unsigned requests, without credentials; for public buckets."""
    requester_pays: bool = False
    """Agree to pay for requests and data transfer; requester-pays buckets require it."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """Where URLs name the bucket: `path` puts it in the path, `virtual` in the host name. `auto` follows the AWS
    profile; without a setting there, it means `virtual` on AWS and `path` elsewhere."""
    timeout_s: Timeout = 30.0
    """Seconds to connect, and between two packets, before a request is retried."""
    max_attempts: PositiveInt = 6
    """Maximum attempts for a request that is throttled, times out or fails, with back-off."""

    @model_validator(mode="after")
    def _has_credentials_to_pay(self) -> Self:
        if self.anonymous and self.requester_pays:
            raise ValueError("storage.requester_pays: needs credentials, but storage.anonymous sends none; unset one")
        return self


class ClusterConfig(Section):
    """The Ray cluster that runs the job."""

    address: str = ""
    """`local` starts one in this process; `auto` or HOST:PORT joins one; empty: RAY_ADDRESS if set, else `local`."""
    num_cpus: PositiveInt | None = None
    """Logical CPUs of a `local` cluster; none: the machine's own, but at least 8. They limit scheduling, not
    threads."""
    object_store_mib: PositiveInt = 1024
    """Shared memory of the object store of a `local` cluster, MiB."""
    include_dashboard: bool | None = None
    """Whether a `local` cluster starts Ray's dashboard, which takes 200 MiB; none: only for jobs that train networks,
    because Ray Train needs it."""
    verbose: CliImplicitFlag[bool] = False
    """Show Ray's own messages, too. Errors that end a job are always shown."""
    autoscaler_wait_s: Annotated[float, Field(ge=0.0, le=1e6)] = 900.0
    """Seconds to wait for the autoscaler to add nodes. 0, or no autoscaler: a cluster that is too small is rejected at
    once."""

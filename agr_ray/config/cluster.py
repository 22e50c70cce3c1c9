"""Settings of the Ray cluster."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agr_ray.config.section import PositiveInt, Section


class ClusterConfig(Section):
    """Which Ray cluster does the work."""

    address: str = ""
    """`local` starts one in this process; `auto` or HOST:PORT joins one; empty: RAY_ADDRESS if set, else `local`."""
    num_cpus: PositiveInt | None = None
    """Logical CPUs of a `local` cluster; none: the machine's own, but at least 8: they cap scheduling, not threads."""
    object_store_mib: PositiveInt = 1024
    """Shared memory of a `local` cluster's object store, MiB."""
    include_dashboard: bool = True
    """Whether a `local` cluster starts Ray's dashboard."""
    autoscaler_wait_s: Annotated[float, Field(ge=0.0, le=1e6)] = 900.0
    """Seconds that a cluster's autoscaler has to add the nodes that a job asks for; 0: a cluster that is too small as
    it is is refused. One without an autoscaler is refused at once."""

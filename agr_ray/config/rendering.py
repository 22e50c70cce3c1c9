"""Settings of the synthetic faces."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agr_ray.config.section import MAX_INT, Section, Seed, Timeout


class RenderConfig(Section):
    """Synthetic faces, drawn with known labels."""

    out: str = ""
    """Folder or prefix of chips/ with labels.parquet, and photographs/ with faces.parquet."""
    num_chips: Annotated[int, Field(ge=0, le=MAX_INT)] = 2000
    """Single faces of 200 x 200 pixels."""
    num_photographs: Annotated[int, Field(ge=0, le=MAX_INT)] = 40
    """Photographs with one to six faces."""
    seed: Seed = 0
    """Which faces are drawn: the same seed and index always give the same face."""
    lock_expiry_s: Timeout = 120.0
    """Seconds without a heartbeat after which another run takes over the lock in `out`. The heartbeat interval is a
    quarter of it."""

"""Waiting for storage that has gone away. Imports nothing heavy: every process that reads crops imports this."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from agr_ray.storage import StorageFailed, StorageUnavailable

_RETRY_S: Final = 2.0

T = TypeVar("T")


class Patience:
    """Waits for storage that has gone away, for so many seconds."""

    def __init__(self, outage_s: float) -> None:
        self._outage_s = outage_s

    def call(self, work: Callable[[], T]) -> T:
        """Do it, and again while storage is away.

        Raises:
            StorageUnavailable, StorageFailed: it stayed away for too long.
        """
        gone_since: float | None = None
        while True:
            try:
                return work()
            except (StorageUnavailable, StorageFailed):
                now = time.monotonic()
                gone_since = now if gone_since is None else gone_since
                if now - gone_since > self._outage_s:
                    raise
                time.sleep(_RETRY_S)

"""Waiting for storage that has gone away. Imports nothing heavy: every process that reads crops imports this."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final, TypeVar

from agr_ray.storage import StorageFailed, StorageUnavailable

_RETRY_S: Final = 2.0

T = TypeVar("T")


class Patience:
    """Waits for storage that has gone away, for so many seconds, and says so once an outage."""

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
                is_new, gone_since = gone_since is None, now if gone_since is None else gone_since
                if now - gone_since > self._outage_s or not self._outage_s:
                    raise
                if is_new:
                    # Without the error, which may name a photograph whose name nobody is to know.
                    sys.stderr.write(f"warning: storage is away; waiting for it, {self._outage_s:g} s at most\n")
                time.sleep(_RETRY_S)

"""Retries while storage is unavailable. Imports nothing heavy: every process that reads crops imports this."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from agr_ray.json_log import print_to_stderr
from agr_ray.storage.errors import StorageFailed, StorageUnavailable

_RETRY_S: Final = 2.0

T = TypeVar("T")


class Retry:
    """Retries calls while storage is unavailable, each for up to `outage_s` seconds; 0: no retries.

    Prints one warning on stderr per outage.
    """

    def __init__(self, outage_s: float) -> None:
        self._outage_s = outage_s

    def call(self, work: Callable[[], T]) -> T:
        """Call `work` until it succeeds, and return its result.

        Raises:
            StorageUnavailable, StorageFailed: it has not succeeded within `outage_s` of its first failure.
        """
        failing_since_s: float | None = None
        while True:
            try:
                return work()
            except (StorageUnavailable, StorageFailed):
                now_s = time.monotonic()
                is_first, failing_since_s = failing_since_s is None, failing_since_s or now_s
                if not self._outage_s or now_s - failing_since_s > self._outage_s:
                    raise
                if is_first:
                    # Without the error, which may name a photograph whose name must stay private.
                    print_to_stderr(f"warning: storage is unavailable; retrying for up to {self._outage_s:g} s")
                time.sleep(_RETRY_S)

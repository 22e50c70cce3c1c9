"""Download image files, several at a time; set up a worker process that has one CPU."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import cv2
import torch

from agr_ray.memory import keep_freed_memory
from agr_ray.predict.face_finder import MIB, Reject
from agr_ray.storage import ServerFailed, Storage, StorageError

NUM_DOWNLOADS: Final = 8
"""Objects that one worker reads at a time: storage is slow to answer and costs no CPU."""


def use_one_cpu() -> None:
    """Let OpenCV and torch use one thread each, and keep freed memory. Call it once in each worker process."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    keep_freed_memory()


class Downloads:
    """Reads image files in threads."""

    def __init__(self, storage: Storage, max_mib: int) -> None:
        self._storage = storage
        self._max_bytes = max_mib * MIB
        self._threads = ThreadPoolExecutor(NUM_DOWNLOADS)

    def fetch(self, uris: Sequence[str], etags: Sequence[str | None]) -> list[Future[bytes | Reject]]:
        """Start downloads without waiting, so that a caller can fetch the next batch ahead.

        Results raise only if storage can't be reached at all.
        """
        return [self._threads.submit(self._read, *each) for each in zip(uris, etags, strict=True)]

    def _read(self, uri: str, etag: str | None) -> bytes | Reject:
        try:
            return self._storage.read(uri, etag=etag, max_bytes=self._max_bytes)
        except StorageError as error:
            # A local name that is not UTF-8 does not fit into a table.
            message = str(error).encode(errors="replace").decode()
            return Reject(error.status, message, may_pass=isinstance(error, ServerFailed))

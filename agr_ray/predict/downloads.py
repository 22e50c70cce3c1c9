"""Download image files a batch ahead, and set up a worker process for one CPU."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import cv2

from agr_ray.memory import keep_freed_memory
from agr_ray.predict.face_finder import MIB, Reject
from agr_ray.schema import Status
from agr_ray.stopwatch import Stopwatch
from agr_ray.storage import ServerFailed, Storage, StorageError, StorageUnavailable
from agr_ray.storage.parts import KILLED_ITS_WORKER, Attempts
from agr_ray.storage.retry import Retry

NUM_DOWNLOADS: Final = 8
"""Objects that one worker reads concurrently: storage has a high latency, and waiting costs no CPU."""
MAX_BATCH_BYTES: Final = 128 * MIB
"""Maximum bytes of the files of a batch, unless a single file has more. A worker holds two batches."""

_Row = Mapping[str, Any]


def use_one_cpu() -> None:
    """Let OpenCV and torch use one thread each, and keep freed memory. Call it once in each worker process.

    Some workers need no torch, so it is not imported here; a process that imports it later gets one thread, too.
    """
    if "torch" in sys.modules:
        _set_torch_threads(1)
    else:
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # torch prefers the latter
    cv2.setNumThreads(1)
    keep_freed_memory()


@contextmanager
def one_cpu() -> Iterator[None]:
    """Let OpenCV and torch use one thread each until the block ends, in a process that has other work."""
    of_torch, of_opencv = _set_torch_threads(1), cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        _set_torch_threads(of_torch)
        cv2.setNumThreads(of_opencv)


def _set_torch_threads(number: int) -> int:
    """Set the number of torch's threads; return the number before."""
    import torch

    before: int = torch.get_num_threads()
    torch.set_num_threads(number)
    return before


class Download(NamedTuple):
    """One image file."""

    place: int
    """Index of the image's row among those to read."""
    body: bytes | Reject
    """The file's bytes, or why they could not be read."""

    @property
    def is_refused(self) -> bool:
        """Return whether storage refused the request; a second one may succeed."""
        return isinstance(self.body, Reject) and self.body.may_pass


class Downloads:
    """Reads image files in threads.

    Args:
        storage: of the files.
        max_mib: larger files are not read.
        batch_size: maximum files in a batch.
        outage_s: seconds for which requests are retried while storage is unavailable.
        stopwatch: measures the stage "wait for storage".
    """

    def __init__(
        self, storage: Storage, max_mib: int, batch_size: int, outage_s: float, stopwatch: Stopwatch | None = None
    ) -> None:
        self._storage = storage
        self._max_bytes = max_mib * MIB
        self._batch_size = batch_size
        self._retry = Retry(outage_s)
        self._stopwatch = stopwatch or Stopwatch()
        self._threads = ThreadPoolExecutor(NUM_DOWNLOADS)

    def read(self, rows: Sequence[_Row], attempts: Attempts) -> Iterator[list[Download]]:
        """Yield the file of each row once, in batches to be processed together; the next batch is prefetched.

        A server that has just restarted may refuse requests that succeed a moment later. So refused files are
        requested once more, after all others, once the attempts record can be written to storage.

        If an earlier attempt at the part was killed, each batch is one image. It is recorded as the suspect while it is
        processed, but not while files are downloaded. An image that has killed its worker too often becomes `failed`.

        Args:
            rows: with the columns image_id, uri, etag and size_bytes.
            attempts: the attempts record of the part.

        Raises:
            StorageUnavailable: no file can be read.
        """
        refused: list[int] = []
        for batch in self._batches(rows, range(len(rows)), attempts):
            refused += [each.place for each in batch if each.is_refused]
            yield from _in_turn(rows, [each for each in batch if not each.is_refused], attempts)
        if refused:
            attempts.suspect("")
            for batch in self._batches(rows, refused, attempts):
                yield from _in_turn(rows, batch, attempts)

    def _batches(self, rows: Sequence[_Row], places: Sequence[int], attempts: Attempts) -> Iterator[list[Download]]:
        """Yield the files of some rows in batches; the next batch is requested before a batch is yielded."""
        ahead: deque[tuple[list[int], list[Future[bytes | Reject]]]] = deque()

        def fetch(batch: list[int]) -> list[Future[bytes | Reject]]:
            return [self._threads.submit(self._read, rows[place], attempts) for place in batch]

        def wait() -> list[Download]:
            batch, begun = ahead.popleft()
            with self._stopwatch.stage("wait for storage"):
                try:
                    bodies = [each.result() for each in begun]
                except StorageUnavailable:
                    bodies = self._retry.call(lambda: [each.result() for each in fetch(batch)])
            return [Download(*each) for each in zip(batch, bodies, strict=True)]

        for batch in self._cut(rows, places):
            ahead.append((batch, fetch(batch)))
            if len(ahead) > 1:
                yield wait()
        while ahead:
            yield wait()

    def _cut(self, rows: Sequence[_Row], places: Sequence[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        num_bytes = 0
        for place in places:
            size = min(rows[place]["size_bytes"] or 0, self._max_bytes)
            if batch and (len(batch) == self._batch_size or num_bytes + size > MAX_BATCH_BYTES):
                yield batch
                batch, num_bytes = [], 0
            batch.append(place)
            num_bytes += size
        if batch:
            yield batch

    def _read(self, row: _Row, attempts: Attempts) -> bytes | Reject:
        if attempts.is_given_up(row["image_id"]):
            return Reject(Status.FAILED, KILLED_ITS_WORKER)
        return read_image(self._storage, row["uri"], row["etag"], self._max_bytes)


def _in_turn(rows: Sequence[_Row], batch: list[Download], attempts: Attempts) -> Iterator[list[Download]]:
    """Yield the batch; if an earlier attempt was killed, one image at a time, recorded as the suspect."""
    if not attempts.has_died:
        if batch:
            yield batch
        return
    for each in batch:
        attempts.suspect(rows[each.place]["image_id"])
        yield [each]
    attempts.suspect("")


def read_image(storage: Storage, uri: str, etag: str | None, max_bytes: int) -> bytes | Reject:
    """Read an image file.

    Raises:
        StorageUnavailable: storage can't be reached at all.
    """
    try:
        return storage.read(uri, etag=etag, max_bytes=max_bytes)
    except StorageError as error:
        # A local name that is not UTF-8 does not fit into a table.
        message = str(error).encode(errors="replace").decode()
        return Reject(error.status, message, may_pass=isinstance(error, ServerFailed))

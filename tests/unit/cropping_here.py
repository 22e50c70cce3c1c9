"""Preparation's workers without Ray: this process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from agr_ray.config import PrepareJob
from agr_ray.predict.crop_maker import CropMaker
from agr_ray.storage.parts import Parts


class CroppingHere:
    """Makes crops in this process.

    Args:
        job: the job to prepare.
        pause_s: time to wait after each part.
    """

    def __init__(self, job: PrepareJob, pause_s: float = 0.0) -> None:
        self._job = job
        self._pause_s = pause_s

    @contextmanager
    def session(self) -> Iterator[int]:
        yield 1

    def crop(self, parts: Parts, numbers: Sequence[int]) -> Iterator[list[str]]:
        maker = CropMaker(parts, self._job.vision, self._job.prepare)
        for number in numbers:
            statuses = maker.make(number)["status"].to_pylist()
            time.sleep(self._pause_s)
            yield statuses

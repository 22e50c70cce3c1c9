"""Fail a run if most of its photographs are rejected for the same reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from agr_ray.config import ScoreConfig
from agr_ray.errors import ConfigError
from agr_ray.schema import Status
from agr_ray.scoring.planning import Plan

MANY_REFUSED: Final = 100
"""If storage refuses this many photographs for the same reason, a run can fail even if earlier runs scored far more."""
EARLY_IMAGES: Final = 500
"""Photographs, sampled over the whole input, after which a run may fail early because storage refuses most of them."""


class TooManyRefused(ConfigError):
    """Most photographs are rejected for the same reason. The message is one line that quotes it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Refusals:
    """Detects that most photographs are rejected for the same reason, which indicates a setup error."""

    def __init__(self, config: ScoreConfig, plan: Plan) -> None:
        self._config = config
        self._plan = plan
        self._reasons: Counter[str] = Counter()
        self._num_images = 0

    def add(self, reasons: Mapping[str, int], num_images: int) -> None:
        """Count a part's rejected rows by reason."""
        self._reasons.update(reasons)
        self._num_images += num_images

    def check(self, *, at_end: bool) -> None:
        """Fail the run if too many photographs are rejected: before the end, only for storage errors.

        Raises:
            TooManyRefused: there are too many; the message quotes the reason.
        """
        for reason, num_refused in self._reasons.most_common():
            self._check_reason(reason, num_refused, at_end=at_end)

    def _check_reason(self, reason: str, num_refused: int, *, at_end: bool) -> None:
        most = self._config.max_refused
        status = reason.partition(":")[0]
        num_inputs = self._plan.num_to_do + self._plan.num_scored
        if num_refused <= most * self._num_images:
            return
        if status == Status.ARCHIVED:  # archiving is the owner's choice: an error only if all photographs are archived
            is_fatal = at_end and num_refused == num_inputs
        elif at_end:
            is_fatal = num_refused > most * num_inputs or (status == Status.FAILED and num_refused >= MANY_REFUSED)
        else:
            is_fatal = status == Status.FAILED and num_refused >= MANY_REFUSED and self._num_images >= EARLY_IMAGES
        if is_fatal:
            raise TooManyRefused(
                reason,
                f"score.input {self._config.input}: {num_refused:,} of {self._num_images:,} photographs were "
                f"rejected for the same reason: {reason}. Nothing is published; fix the cause and repeat the command, "
                f"or allow it with --max-refused 1 (now {most:g})",
            )

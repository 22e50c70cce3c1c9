"""The log as JSON, `--log-format json`: everything that a command prints becomes one object a line on stderr.

    {"time": "2026-03-01T02:00:12.345+00:00", "level": "info", "job": "score", "run": "20260301T020012.345Z-1a2b3c4d",
     "message": "scoring: 512 of 10,000, 21.3/s", "counts": {"done": 512, "total": 10000}}

`run` is null until the run has a name, and `counts` is left out if there are none. Secrets are redacted.
"""

from __future__ import annotations

import datetime
import io
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from agr_ray.redact import printable, redacted

_LEVELS: Final = ("warning", "error")
"""Words that begin our messages, followed by a colon."""


class JsonLog(io.StringIO):
    """A text stream whose lines become JSON objects on stderr.

    Args:
        job: the command, such as `score`.
    """

    def __init__(self, job: str) -> None:
        super().__init__()
        self.job = job
        self.run: str | None = None
        """The run that the command works on."""
        self._rest = ""
        self._mutex = threading.Lock()

    def write(self, text: str) -> int:
        """Log each whole line; keep the rest until its line is whole."""
        with self._mutex:
            *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self.log(line)
        return len(text)

    def log(self, line: str, counts: Mapping[str, Any] | None = None) -> None:
        """Log one line with its counts, in one write, because threads and processes share stderr."""
        level, colon, message = line.partition(": ")
        if not colon or level not in _LEVELS:
            level, message = "info", line
        record = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "level": level,
            "job": self.job,
            "run": self.run,
            "message": redacted(message.strip()),
        }
        sys.stderr.write(json.dumps(record | ({"counts": dict(counts)} if counts else {})) + "\n")
        sys.stderr.flush()


_current: JsonLog | None = None
"""Of this process, not of a thread or context, because Ray's threads print, too."""


@contextmanager
def json_log(job: str) -> Iterator[None]:
    """Log as JSON until the block ends."""
    global _current
    before, _current = _current, JsonLog(job)
    try:
        yield
    finally:
        _current = before


def current_log() -> JsonLog | None:
    """Return the log of this process; None: it is plain text."""
    return _current


def name_run(run: str) -> None:
    """Name the run that this process works on, in all lines that follow."""
    if _current is not None:
        _current.run = redacted(run)


def print_to_stderr(line: str) -> None:
    """Print a line on stderr, in the log's format, with its control characters escaped."""
    if _current is None:
        sys.stderr.write(f"{printable(line)}\n")
    else:
        _current.log(line)

"""The log as JSON, `--log-format json`: everything that a command prints becomes one object a line on stderr.

    {"time": "2026-03-01T02:00:12.345+00:00", "level": "info", "job": "score", "run": "20260301T020012.345Z-1a2b3c4d",
     "message": "scoring: 512 of 10,000, 21.3/s", "counts": {"done": 512, "total": 10000}}

`run` is null until the run has a name, and `counts` is left out if there are none. Secrets are redacted.

Standard output has only results for other programs (`print_result`), as they are. What libraries print there or on
stderr is logged, too, and so is the stderr of our own child processes (`child_stderr`).
"""

from __future__ import annotations

import datetime
import io
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Final

from agr_ray.redact import printable, redacted

_LEVELS: Final = ("warning", "error")
"""Words that begin our messages, followed by a colon."""
_STDERR: Final = 2


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
        self.results, self._stderr = sys.stdout, sys.stderr
        self._of_thread = threading.local()

    def fileno(self) -> int:
        """Return the descriptor of stderr, for native code, which can only report that the process crashes."""
        return self._stderr.fileno()

    def write(self, text: str) -> int:
        """Log each whole line; keep the rest until this thread has written the whole line."""
        *lines, self._of_thread.rest = (getattr(self._of_thread, "rest", "") + text).split("\n")
        for line in lines:
            if line.strip():
                self.log(line)
        return len(text)

    def log(self, line: str, counts: Mapping[str, Any] | None = None) -> None:
        """Log one line with its counts, in one write, because threads and processes share stderr."""
        self._stderr.write(self.formatted(line, counts))
        self._stderr.flush()

    def formatted(self, text: str, counts: Mapping[str, Any] | None = None) -> str:
        """Return a message with its counts as a line of the log."""
        level, colon, message = text.partition(": ")
        if not colon or level not in _LEVELS:
            level, message = "info", text
        record = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "level": level,
            "job": self.job,
            "run": self.run,
            "message": redacted(message.strip()),
        }
        return json.dumps(record | ({"counts": dict(counts)} if counts else {})) + "\n"


_current: JsonLog | None = None
"""Of this process, not of a thread or context, because Ray's threads print, too."""


@contextmanager
def json_log(job: str) -> Iterator[None]:
    """Log as JSON until the block ends. An error that leaves it, a bug, is logged with its traceback: status 1."""
    global _current
    log = JsonLog(job)
    before, _current = _current, log
    try:
        with redirect_stdout(log), redirect_stderr(log):
            yield
    except Exception:
        log.log(f"error: {traceback.format_exc()}")
        raise SystemExit(1) from None
    finally:
        log.write("\n")  # ends the last line, if it is not whole
        _current = before


def current_log() -> JsonLog | None:
    """Return the log of this process; None: it is plain text."""
    return _current


def name_run(run: str) -> None:
    """Name the run that this process works on, in all lines that follow."""
    if _current is not None:
        _current.run = redacted(run)


def print_result(text: str) -> None:
    """Print on standard output what other programs read, as it is."""
    print(text, file=None if _current is None else _current.results, flush=True)


def print_to_stderr(line: str) -> None:
    """Print a line on stderr, in the log's format, with its control characters escaped."""
    if _current is None:
        sys.stderr.write(f"{printable(line)}\n")
    else:
        _current.log(line)


def print_at_once(line: str) -> None:
    """Print a line on stderr from a signal handler, in the log's format. `print` may be what the signal interrupted."""
    os.write(_STDERR, (f"{line}\n" if _current is None else _current.formatted(line)).encode())


@contextmanager
def child_stderr() -> Iterator[int | None]:
    """Yield what a child process gets as `stderr`: ours, or with a JSON log a pipe whose lines are logged.

    The child must have ended when the block ends.
    """
    log = _current
    if log is None:
        yield None
        return
    reading, writing = os.pipe()

    def log_lines() -> None:
        with open(reading, errors="backslashreplace") as lines:
            for line in lines:
                log.write(f"{line}\n")

    thread = threading.Thread(target=log_lines, name="stderr of a child")
    thread.start()
    try:
        yield writing
    finally:
        os.close(writing)
        thread.join()

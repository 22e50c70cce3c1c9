"""Errors that end a job with one line."""

from __future__ import annotations

import platform
from collections.abc import Sequence


class ConfigError(Exception):
    """A configuration that can't be run. The message is one line: the key, the value and what is allowed."""


def missing_extra(extra: str, packages: Sequence[str]) -> str:
    """Return what to do about packages of one of the project's extras that are not installed."""
    missing, host = " and ".join(packages), platform.node()
    return f"needs {missing}, not installed on {host}; in a clone of the project: pip install '.[{extra}]'"


class JobError(Exception):
    """The job can't continue, although its configuration is valid. The message is one line; the exit status is 1."""

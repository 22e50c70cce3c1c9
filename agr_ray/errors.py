"""Errors that end a job with one line."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(Exception):
    """A configuration that can't be run. The message is one line: the key, the value and what is allowed."""


def missing_extra(extra: str, packages: Sequence[str]) -> str:
    """Return what to do about packages of one of the project's extras that are not installed."""
    return f"needs {' and '.join(packages)}, not installed here; in a clone of the project: pip install '.[{extra}]'"


class JobError(Exception):
    """The job can't continue, although its configuration is valid. The message is one line; the exit status is 1."""

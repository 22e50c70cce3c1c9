"""Errors that end a job with one line."""

from __future__ import annotations


class ConfigError(Exception):
    """A configuration that can't be run. The message is one line: the key, the value and what is allowed."""


class JobError(Exception):
    """The job can't continue, although its configuration is valid. The message is one line; the exit status is 1."""

"""Errors that end a job with one line."""

from __future__ import annotations


class ConfigError(Exception):
    """A configuration that can't be run: one line that names the key, the value and what is allowed."""


class JobError(Exception):
    """The work can't continue, and the settings are not at fault: one line, status 1."""

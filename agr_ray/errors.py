"""Errors that end a job with one line."""

from __future__ import annotations


class ConfigError(Exception):
    """A configuration that can't be run: one line that names the key, the value and what is allowed."""


class JobError(Exception):
    """The work itself can't go on, and nothing in the set-up is to blame: one line, status 1."""

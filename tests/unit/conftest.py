"""Shared fixtures of the unit tests."""

from __future__ import annotations

import os

# Before torch and OpenCV are imported: tiny arrays gain nothing from threads, and on busy cores lose much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

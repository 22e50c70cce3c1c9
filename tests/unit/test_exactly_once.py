"""Run the property test of `exactly_once.py`, which forks, in an interpreter without threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(0)  # each command in it has a time limit of its own
def test_each_image_is_published_exactly_once_under_faults() -> None:
    file = Path(__file__).with_name("exactly_once.py")
    seed = os.environ.get("AGR_TEST_SEED")
    seeded = [f"--hypothesis-seed={seed}"] if seed else []
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *seeded, str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]

"""The benchmarks can be imported. They are run by hand, so no other test notices that a name they use has changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_benchmark_can_be_imported() -> None:
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    assert len(names) > 5

    subprocess.run([sys.executable, "-c", f"import {', '.join(names)}"], cwd=BENCHMARKS, check=True)

"""How the tests are shared between processes."""

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"
DIES = """
import os

def test_before():
    pass

def test_dies():
    os._exit(1)

def test_after():
    pass
"""


def test_a_process_that_dies_costs_one_test_only(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_bytes(CONFTEST.read_bytes())
    (tmp_path / "test_dies.py").write_text(DIES)
    for name in "abcdef":
        (tmp_path / f"test_{name}.py").write_text("".join(f"def test_{n}():\n    pass\n" for n in range(3)))
    command = [sys.executable, "-m", "pytest", "-n", "2", "-q", "-p", "no:cacheprovider", tmp_path]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "1 failed, 20 passed" in run.stdout, run.stdout + run.stderr
    assert "crashed while running 'test_dies.py::test_dies'" in run.stdout

"""Every dependency that pyproject.toml declares is imported somewhere."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED_BY = {"pytz": "duckdb", "scikit-learn": "optuna.importance", "tensorboard": "torch.utils.tensorboard"}
"""Dependencies that a library imports only if they are installed."""


def imported(folder: Path) -> set[str]:
    """Return the top-level names that the modules of a folder import."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names


def test_every_dependency_is_imported() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^\w.-]", each)[0].lower() for each in declared}
    distributions = packages_distributions()
    used = {
        dist.lower().replace("_", "-") for name in imported(ROOT / "agr_ray") for dist in distributions.get(name, [])
    }

    assert sorted(names - used) == sorted(NEEDED_BY)


def test_the_audit_reads_the_whole_lock_and_every_pin_has_a_hash() -> None:
    # The audit itself asks a service on the internet. `pip-audit --dry-run` accepts this command.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of make test
    printed = subprocess.run(
        ["make", "-n", "audit"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    words = shlex.split(printed.splitlines()[-1])

    assert words[1:] == [
        *("tool", "run", "pip-audit", "--require-hashes", "--disable-pip", "--requirement", "requirements.lock")
    ]
    pins = re.split(r"\n(?=\S)", (ROOT / words[-1]).read_text())
    pins = [pin for pin in pins if not pin.startswith("#")]
    assert len(pins) > 100
    assert [pin for pin in pins if not re.match(r"\S+==\S+[^\n]*\\\n    --hash=sha256:", pin)] == []

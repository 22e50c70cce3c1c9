"""Code that the processes which a test starts run before all else."""

from __future__ import annotations

from pathlib import Path

import pytest


def run_first(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes that this one starts with its own `sys.path` run this code first; it is kept in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))

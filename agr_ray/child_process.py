"""Other processes of this machine that run a module of ours."""

from __future__ import annotations

import os
import sys
from typing import Any


def child_process(module: str, *arguments: str) -> dict[str, Any]:
    """Return what `subprocess.Popen` needs to run a module: it imports from the same folders as this process.

    So it finds our package where this process did: installed, or in the working folder of a submitted job.
    """
    return {
        "args": [sys.executable, "-P", "-m", module, *arguments],
        "env": os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    }

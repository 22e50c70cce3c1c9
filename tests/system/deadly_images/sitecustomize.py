"""Kills the process that decodes an image with a mark in its bytes, as a bug in a decoder or the OOM killer would.

Python imports this file at its start wherever this folder is in PYTHONPATH: so a test makes a cluster's workers mortal,
and the code under test does not know.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DECODER = "agr_ray.vision.decode"
MARK = b"kills with "
"""Goes before the name of a signal."""


class DeadlyDecoder(importlib.abc.MetaPathFinder):
    """Finds the decoder, and changes it once it is loaded."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != DECODER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_deadly(module: ModuleType) -> None:
            load(module)
            module.decode_image = deadly(module.decode_image)  # type: ignore[attr-defined]

        spec.loader.exec_module = load_deadly  # type: ignore[method-assign]
        return spec


def deadly(decode: Any) -> Any:
    """Return the decoder, which ends its process where the image says so."""

    def decode_or_die(data: bytes, **limits: Any) -> Any:
        _, mark, name = data.rpartition(MARK)
        if mark:
            os.kill(os.getpid(), signal.Signals[name.decode()])
        return decode(data, **limits)

    return decode_or_die


sys.meta_path.insert(0, DeadlyDecoder())

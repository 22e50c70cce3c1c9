"""The lines of docs/operations.md that submit jobs to a cluster. A system test runs them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


class SubmitLine(NamedTuple):
    job: str
    """Name of its script in jobs/."""
    text: str
    """The whole line, for a shell."""


def submit_lines() -> list[SubmitLine]:
    """Return the lines of the page's only block of them, in its order."""
    (block,) = re.findall(r"^```\n(ray job submit .*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [SubmitLine(re.findall(r" -- python jobs/(\w+)\.py ", line)[0], line) for line in lines]

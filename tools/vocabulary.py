"""Find phrases that plain English says otherwise, in every text file that git tracks.

    python tools/vocabulary.py

`vocabulary.txt` lists them, a line each: `phrase -> what to write instead`. Upper and lower case are the same, and a
phrase may continue on the next line of a paragraph, comment, table or string. An underscore counts as a blank.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LIST = Path(__file__).with_name("vocabulary.txt")
_BLANK = r"""(?:[ \t_]+|[ \t"'\\]*\n(?:[ \t]|[#>*|]|[frb]*["'])*)"""


def read_list(text: str) -> dict[str, str]:
    """Return the replacement of each phrase in the text of a list."""
    return dict(line.split(" -> ") for line in text.splitlines() if line and not line.startswith("#"))


def find(text: str, phrases: dict[str, str]) -> list[tuple[int, str]]:
    """Return the line, from 1, and the phrase of each hit in a text, in order."""
    hits, lower = [], text.lower()
    for phrase in phrases:
        words = phrase.split()
        if all(word in lower for word in words):  # saves most searches
            pattern = rf"(?<![^\W_]){_BLANK.join(map(re.escape, words))}(?![^\W_])"
            hits += [(lower.count("\n", 0, match.start()) + 1, phrase) for match in re.finditer(pattern, lower)]
    return sorted(hits)


def main() -> int:
    """Print each hit as `file:line: phrase -> replacement`. Return 1 if there is one, otherwise 0."""
    root, phrases, status = LIST.parents[1], read_list(LIST.read_text()), 0
    names = subprocess.run(["git", "-C", root, "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
    for path in [root / name for name in names.split("\0")]:
        is_ours = path.is_file() and path != LIST and path.name != "LICENSE"
        content = path.read_bytes() if is_ours else b""
        text = "" if b"\0" in content else content.decode(errors="replace")  # "" for an image
        for line, phrase in find(text, phrases):
            print(f"{path.relative_to(root)}:{line}: {phrase} -> {phrases[phrase]}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())

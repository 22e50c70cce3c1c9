"""A configuration as the recipe that gives it again: TOML, which the standard library reads and does not write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from agr_ray.config import Section

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def recipe_toml(sections: Mapping[str, Section], head: Sequence[str] = (), leave_out: Sequence[str] = ()) -> str:
    """Return a recipe that names every key of these sections.

    So it means the same under a version with other defaults. What is None has no word in TOML and is left out: it
    is None by default.

    Args:
        sections: by name.
        head: lines of comment to begin with.
        leave_out: dotted keys that are not written.
    """
    lines = [f"# {line}".rstrip() for line in head]
    for name, section in sections.items():
        lines += ["", f"[{name}]"] if lines else [f"[{name}]"]
        for key, value in section.model_dump(mode="json").items():
            if value is not None and f"{name}.{key}" not in leave_out:
                lines.append(f"{_key(key)} = {_value(value)}")
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    """Return plain values as TOML; its strings are JSON's, but that it has no escaped slash and no lone surrogates."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # DEL may stand in JSON's text as it is, and not in TOML's.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(each) for each in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(key)} = {_value(each)}' for key, each in value.items() if each is not None)}}}"
    raise TypeError(f"{value!r} has no form in TOML")

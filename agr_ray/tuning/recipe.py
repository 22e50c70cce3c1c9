"""Write a configuration as a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tomli_w

from agr_ray.config import Section


def recipe_toml(sections: Mapping[str, Section], head: Sequence[str] = (), leave_out: Sequence[str] = ()) -> str:
    """Return a recipe that sets every key of these sections, so that it means the same if defaults change.

    TOML has no null: keys that are None are left out. Their default is None.

    Args:
        sections: by name.
        head: lines of comment to begin with.
        leave_out: dotted keys that are not written.
    """
    tables = {
        name: {
            key: value
            for key, value in section.model_dump(mode="json", exclude_none=True).items()
            if f"{name}.{key}" not in leave_out
        }
        for name, section in sections.items()
    }
    comment = "".join(f"# {line}".rstrip() + "\n" for line in head)
    return f"{comment}\n{tomli_w.dumps(tables)}"

"""The base class of all sections, the types of their fields, and the digest that names configurations."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from agr_ray.redact import redacted

_LONGEST_NAME: Final = 200
_LONGEST_SHOWN: Final = 100
"""Maximum length of a rejected value in a message, in characters."""


def _one_or_several(value: Any) -> Any:
    """Return a list of strings, given as a list or as JSON, as JSON. One string stays, and a list of one becomes it."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f'{value!r} is not JSON; write a list as \'["a", "b"]\'') from None
    if not isinstance(value, list | tuple):
        return value
    if not all(isinstance(each, str) and each for each in value):
        raise ValueError(f"{list(value)} must be a list of non-empty strings")
    return json.dumps(value) if len(value) > 1 else "".join(value)


def _plain_name(value: str) -> str:
    """Reject a run name that is not a single folder name valid on every file system."""
    is_plain = value == value.strip() and value.isprintable() and "/" not in value and value not in (".", "..")
    if not is_plain or len(value.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"{value[:_LONGEST_NAME]!r} must be a single folder name: no slash, no control character, no space at "
            f"either end, {_LONGEST_NAME} bytes at most"
        )
    return value


def _without_login(value: str | None) -> str | None:
    """Reject credentials in a server's URL, because URLs appear in messages and records."""
    if value is not None and "@" in value:
        raise ValueError(
            f"{redacted(value)!r} must be a URL without user and password; keys come from the usual AWS variables"
        )
    return value


Name = Annotated[str, AfterValidator(_plain_name)]
Address = Annotated[str | None, AfterValidator(_without_login)]
OneOrSeveral = Annotated[str, BeforeValidator(_one_or_several)]
"""Text for all sources of settings: a union type would split paths at commas and parse 7 as a number."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
MAX_INT = 2**31 - 1
"""Largest integer that any knob accepts: some parts of torch, OpenCV and Ray accept no larger one."""
MAX_FLOAT = 1e38
"""Largest value of any other number: networks compute in float32, and this is its maximum."""
PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=MAX_FLOAT)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=MAX_FLOAT)]
AnyInt = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""NumPy, torch and Optuna all accept seeds in this range."""
Timeout = Annotated[float, Field(ge=0.1, le=1e6)]
"""Seconds; longer ones overflow the clocks of sockets and threads."""


class Section(BaseModel):
    """A table of the recipe: frozen, unknown keys refused, each field documented beneath it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def digest(*sections: BaseModel, length: int = 12) -> str:
    """Return the first hex digits of the SHA-256 of the sections' canonical JSON."""
    text = json.dumps([section.model_dump(mode="json") for section in sections], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def shown(value: Any) -> str:
    """Return a rejected value as messages show it. Tables are hidden, because they may hold a password."""
    if isinstance(value, dict):
        return "a table"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."

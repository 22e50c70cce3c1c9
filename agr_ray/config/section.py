"""The base class of all sections, the types of their fields, and the digest that names configurations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from agr_ray.redact import redacted, shown

_LONGEST_NAME: Final = 200


def _one_or_several(value: Any) -> Any:
    """Return several strings, given as a list or as JSON, as a JSON list; a single string is returned as it is."""
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
Private = Annotated[str, Field(repr=False)]
"""May hold a password, so it is not in the section's `repr`, which Ray's dashboard shows of a training run."""
ONE_OR_SEVERAL: Final = BeforeValidator(_one_or_several)
OneOrSeveral = Annotated[str, ONE_OR_SEVERAL]
"""A plain string, because pydantic-settings would split a union type at commas and parse 7 as a number."""


class FollowingWords:
    """Marks a `OneOrSeveral` field whose option takes all words up to the next option: `--compare A B`."""


SeveralWords = Annotated[OneOrSeveral, FollowingWords]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
MAX_INT = 2**31 - 1
"""Largest integer that any knob accepts: some parts of torch, OpenCV and Ray accept no larger one."""
MAX_FLOAT = 1e38
"""Largest value of any other number: networks compute in float32, whose maximum is 3.4e38."""
PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=MAX_FLOAT)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=MAX_FLOAT)]
AnyInt = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""NumPy, torch and Optuna all accept seeds in this range."""
Timeout = Annotated[float, Field(ge=0.1, le=1e6)]
"""Seconds; longer ones overflow the clocks of sockets and threads."""


class Section(BaseModel):
    """A table of the recipe: frozen, unknown keys are rejected, each field is documented below it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def digest(*sections: BaseModel, length: int = 12) -> str:
    """Return the first `length` hex digits of the SHA-256 of the sections' canonical JSON."""
    text = json.dumps([section.model_dump(mode="json") for section in sections], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


S = TypeVar("S", bound=Section)


def rebuilt(section: type[S], values: Any, name: str) -> S:
    """Rebuild a section from its complete `model_dump`.

    Args:
        section: the class to build.
        values: a value for every key.
        name: of the section, in messages.

    Raises:
        ValueError: a key is missing, unknown or has a value that is not allowed; one line.
    """
    check_keys(values, section.model_fields, name)
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, message = ".".join(map(str, (name, *first["loc"]))), first_message(error)
        raise ValueError(f"{key}: {message}, found {shown(first['input'])}") from None


def first_message(error: ValidationError) -> str:
    """Return the message of pydantic's first error, without the key and the value."""
    return error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")


def check_keys(values: Any, expected: Iterable[str], name: str) -> None:
    """Check that stored values are a table with exactly these keys.

    Raises:
        ValueError: they are not; one line, which begins with `name`.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected a table, found {shown(values)}")
    missing, unknown = sorted(set(expected) - set(values)), sorted(set(values) - set(expected))
    faults = [f"{kind} {', '.join(keys)}" for kind, keys in (("missing", missing), ("unknown", unknown)) if keys]
    if faults:
        raise ValueError(f"{name}: keys do not match: {'; '.join(faults)}")


def first_difference(theirs: object, ours: object, key: str = "") -> tuple[str, object, object] | None:
    """Return the dotted key of the first setting that differs, and both values of it; None: none does.

    Args:
        theirs: plain values; dictionaries are sections, unless one of them is empty. A missing key is None.
        ours: the values to compare with them.
        key: of the values, if they are not all settings.
    """
    if theirs == ours:
        return None
    if theirs and ours and isinstance(theirs, dict) and isinstance(ours, dict):
        names = sorted({*theirs, *ours})
        found = (first_difference(theirs.get(name), ours.get(name), f"{key}.{name}" if key else name) for name in names)
        return next((each for each in found if each is not None), None)
    return key, theirs, ours


def other_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any], without: Collection[str]) -> str:
    """Return what is different about settings that must be the same: `train.lr 0.01, not 0.1`, or `other data`.

    Args:
        theirs: plain values by section.
        ours: the same sections.
        without: dotted keys and sections that do not matter, which may differ.
    """

    def decisive(sections: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: {key: value for key, value in values.items() if f"{name}.{key}" not in without}
            if isinstance(values, dict)
            else values
            for name, values in sections.items()
            if name not in without
        }

    found = first_difference(decisive(theirs), decisive(ours))
    return "other data" if found is None else f"{found[0]} {found[1]}, not {found[2]}"

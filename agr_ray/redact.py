"""Make text safe to read, in messages, logs and records: without secrets, and without control characters."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import unquote

HIDDEN: Final = "***"

# Names of files and keys can be long words, so no pattern may take quadratic time: each word is read once. A match
# starts only at the first character of a word, and a word without `@` is matched whole.
_SCHEME: Final = r"(?<![a-z0-9+.-])[0-9+.-]*(?:s3://(?=[^\s'\"<>/]*[:@])|(?!s3://|file://)[a-z][a-z0-9+.-]*://)(?!/)"
_URL: Final = re.compile(rf"(?i)({_SCHEME})(?:([^\s'\"<>]*)@|[^\s'\"<>]*)")
_WORDS: Final = "password|passwd|passwort|pwd|secret|token|credential|signature|api_?key|access_?key"
_ASSIGNED: Final = re.compile(
    rf"(?i)(?<![\w.-])(?=[\w.-]*(?:{_WORDS}))([\w.-]+(?:=['\"]?|['\"]\s*:\s*['\"]?))([^\s&'\",;}}]+)"
)
_CONTROL: Final = re.compile("[\0-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_SECRET_VARIABLE: Final = re.compile(r"(?i)password|passwd|secret|token|credential|api_?key|access_?key")
_SHORTEST: Final = 3
"""Minimum length of a secret's parts that are hidden outside its URL: hiding shorter ones would garble the text."""
_LONGEST_SHOWN: Final = 100
"""Maximum length of a rejected value in a message, in characters."""
_SHORTEST_VARIABLE: Final = 8
"""Minimum length of an environment variable's secret: shorter values, such as MAX_TOKENS, are not secrets."""


def printable(text: str) -> str:
    """Return text with control characters escaped, newlines too, so that a name can't steer a terminal or forge a line.

    Characters that change the direction of text are escaped as well; tabs stay.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(value: Any) -> str:
    """Return a rejected value as messages show it. Tables are hidden, because they may hold a password."""
    if isinstance(value, dict):
        return "a table"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def redacted(text: str, *uris: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the text with `***` in place of passwords and tokens.

    It hides passwords in URLs (and a user name without a password, which may be a token), values of parameters with
    secret-looking names, values of environment variables with such names, and passwords in URLs of the environment.

    Args:
        text: the text to show.
        uris: URIs of the configuration; their passwords, and parts of them, are hidden everywhere in the text.
        environ: the environment.
    """
    secrets = [
        value for name, value in environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_VARIABLE
    ]
    secrets += [part for uri in uris for part in _secret_parts(uri)]
    servers = [value for value in environ.values() if "://" in value]  # proxies and endpoints
    # A short one, such as `app`, would hide that word everywhere.
    secrets += [part for uri in servers for part in _secret_parts(uri) if len(part) >= _SHORTEST_VARIABLE]
    text = _URL.sub(_without_password, text)
    text = _ASSIGNED.sub(rf"\g<1>{HIDDEN}", text)
    return _without(text, secrets)


def _without_password(found: re.Match[str]) -> str:
    scheme, user_info = found.groups()
    if user_info is None:
        return found[0]
    user, colon, _ = user_info.partition(":")
    return f"{scheme}{user}:{HIDDEN}@" if colon else f"{scheme}{HIDDEN}@"


def _secret_parts(uri: str) -> Iterable[str]:
    """Return the secrets in a URL: raw, decoded, and in the fragments that a confused URL parser may quote."""
    user_info = [found[2] for found in _URL.finditer(uri) if found[2] is not None]
    whole = [user.partition(":")[2] or user for user in user_info] + [found[2] for found in _ASSIGNED.finditer(uri)]
    for secret in whole:
        yield secret
        yield unquote(secret)
        yield from re.split(r"[@:/?#%\[\]]", secret)


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, HIDDEN)
    return text

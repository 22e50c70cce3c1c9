"""What all HTML pages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def page_environment(filters: Mapping[str, Callable[..., Any]]) -> Environment:
    """Return jinja's environment of the templates in this package: values are escaped, and a missing one is an error.

    Args:
        filters: of the page, by name.
    """
    environment = Environment(
        loader=PackageLoader("agr_ray.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment

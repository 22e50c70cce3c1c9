"""Parse a recipe, the environment and the command line into a job's configuration.

Later sources win: defaults < recipe (`--config`) < environment (`AGR_RAY_TRAIN__LR=3e-4`) < command line
(`--train.lr 3e-4`).
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import pairwise
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError, create_model
from pydantic_settings import EnvSettingsSource, SettingsError

from agr_ray.config.command_line import CommandParser, did_you_mean, fail
from agr_ray.config.infrastructure import StorageConfig
from agr_ray.config.jobs import SECTIONS, EvaluateJob, Job, PrepareJob, RenderJob, ScoreJob
from agr_ray.config.presets import dropped_weights, with_chosen_preset
from agr_ray.config.section import first_message
from agr_ray.config.source import COLUMN_WORDS, LabelColumn
from agr_ray.config.training_jobs import TuneJob
from agr_ray.config.tuning import ParameterConfig
from agr_ray.errors import ConfigError
from agr_ray.json_log import print_to_stderr
from agr_ray.redact import redacted, shown

J = TypeVar("J", bound=Job)
_PREFIX = "agr_ray_"


def built_in_recipes() -> dict[str, Traversable]:
    """Return the recipes of the package by name, in order."""
    recipes = sorted((files("agr_ray") / "recipes").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): file for file in recipes}


def read_local(path: str, storage: StorageConfig) -> bytes:  # noqa: ARG001  # the signature of all readers
    """Return the bytes of a recipe, given the name of one in the package or a path on the local disk.

    A name has neither a slash nor a dot.

    Raises:
        ConfigError: there is no such recipe, or it can't be read.
    """
    if "/" not in path and "." not in path:
        recipes = built_in_recipes()
        if path not in recipes:
            meant = did_you_mean(path, [*recipes])
            raise ConfigError(
                f"--config {path}: there is no such recipe{meant}; allowed: {', '.join(recipes)}, "
                "or a path that has a slash or ends in .toml"
            )
        return recipes[path].read_bytes()
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {getattr(error, 'strerror', error)}") from None


Reader = Callable[[str, StorageConfig], bytes]
"""Reads a recipe, given its name, path or URI and the storage settings. Raises ConfigError."""


def load(
    job: type[J],
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    read: Reader = read_local,
    prog: str | None = None,
) -> J:
    """Build a job's configuration, or print one line on stderr and exit with status 2.

    Args:
        job: the class to build.
        argv: the command line, without the program's name.
        environ: the environment; only variables that begin with `AGR_RAY_` are read.
        read: reads the recipe.
        prog: the program's name in the help; None: that of the script.
    """
    try:
        return parse(job, argv, environ, read, prog)
    except ConfigError as error:
        fail(str(error))


def parse(
    job: type[J],
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    read: Reader = read_local,
    prog: str | None = None,
) -> J:
    """Like `load`, but raise `ConfigError` instead of exiting. Unknown options and `--help` still exit."""
    parser = CommandParser(job, prog)
    try:
        parser.show_recipe(_read_recipe(parser.recipe_of_help(argv), job, StorageConfig(), read))
        try:
            recipe, from_command_line = parser.read(argv)
        except SettingsError as error:
            raise ConfigError(redacted(str(error).splitlines()[0], environ=environ)) from None
        from_environment = _read_environment(environ, job)
        overrides = _merged(from_environment, from_command_line)
        for name in overrides.keys() & SECTIONS.keys():
            if not isinstance(overrides[name], Mapping):
                raise ConfigError(f"{name}: {shown(overrides[name])} is not allowed: --{name}.KEY sets one of its keys")
        storage = StorageConfig(**overrides.get("storage", {})) if recipe else StorageConfig()
        values = _read_recipe(recipe, job, storage, read)
        replaced = with_chosen_preset(values, overrides)
        built = job(**_merged(replaced, overrides))
    except ValidationError as error:
        section = "storage" if error.title == StorageConfig.__name__ else ""
        raise ConfigError(redacted(_describe(error, job, section), environ=environ)) from None
    for key in built.needed():
        if not reduce(getattr, key.split("."), built):
            if key in job.positional:
                raise ConfigError(f"{key} missing: {_help_of(job, key)} For example: {job.example}")
            raise ConfigError(f"{key} is needed: {_help_of(job, key)} Give {job.option(key)} or set it in the recipe.")
    built._recipe = redacted(recipe or "")
    dropped = dropped_weights(values, replaced, overrides)
    if dropped is not None:
        warning = (
            "warning: model.pretrained {} of the recipe does not fit the preset {}, which starts from random weights"
        )
        print_to_stderr(redacted(warning.format(*dropped), environ=environ))
    return built


def wants_json(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the command line, or else the environment, asks for a JSON log, before they are checked."""
    words = [word for each in argv for word in each.split("=", 1)]
    given = [value for option, value in pairwise(words) if option.replace("_", "-") == "--log-format"]
    variable = next((value for name, value in environ.items() if name.lower() == "agr_ray_log_format"), "")
    return (given[-1] if given else variable) == "json"


_EVERY_SECTION = create_model(
    "_EverySection",
    __base__=BaseModel,
    **cast(Any, {name: (section, section()) for name, section in SECTIONS.items()}),
)
_EVERY_JOB: Sequence[type[Job]] = (RenderJob, PrepareJob, TuneJob, EvaluateJob, ScoreJob)
_FLAGS: Mapping[str, Any] = {
    name: (field.annotation, field)
    for each in _EVERY_JOB
    for name, field in each.model_fields.items()
    if name not in SECTIONS
}
"""Settings of jobs outside any section, such as new_run."""
_EVERYTHING = create_model("_Everything", __base__=_EVERY_SECTION, **cast(Any, _FLAGS))
"""Everything that an environment variable may set, in any job."""


def _read_environment(environ: Mapping[str, str], job: type[Job]) -> dict[str, Any]:
    """Return the values that our environment variables set for this job; check those for other jobs too.

    Raises:
        ConfigError: a variable names no setting of any job, is not JSON although JSON is required, or has an invalid
            value.
    """
    values: dict[str, Any] = {}
    for name, value in environ.items():
        if name.lower().startswith(_PREFIX):
            values = _merged(values, _read_variable(name, value))
    others = {name: value for name, value in values.items() if name not in job.model_fields}
    try:
        _EVERYTHING(**others)
    except ValidationError as error:
        raise ConfigError(redacted(_describe(error, _EVERYTHING), environ=environ)) from None
    return {name: value for name, value in values.items() if name in job.model_fields}


def _read_variable(name: str, value: str) -> dict[str, Any]:
    """Return what one variable sets."""
    top, _, below = name.lower().removeprefix(_PREFIX).partition("__")
    known = list(_EVERYTHING.model_fields)
    if top not in known:
        raise ConfigError(f"{name}: there is no section {top}{did_you_mean(top, known)}; allowed: {', '.join(known)}")
    if top in SECTIONS and not below:
        # Whole sections are never shown, because any part of them may be a password.
        try:
            section = json.loads(value)
        except ValueError:
            section = None
        if not isinstance(section, dict):
            raise ConfigError(
                f"{name}: its value is not a JSON object; a whole section is written as one, such as "
                f'{{"key": "value"}}; {name}__KEY sets one key'
            )
        return {top: section}
    if below and top not in SECTIONS:
        raise ConfigError(f"{name}: {top} has no keys; set {_PREFIX.upper()}{top.upper()}")
    source = EnvSettingsSource(
        cast(Any, _EVERYTHING), env_prefix=_PREFIX.upper(), env_nested_delimiter="__", env_parse_none_str=""
    )
    source.env_vars = {name.lower(): value}
    try:
        return source()
    except SettingsError:
        raise ConfigError(
            f"{name}: {redacted(value)!r} is not JSON; lists and tables are written as JSON, such as '[\"age\"]'"
        ) from None


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _read_recipe(path: str | None, job: type[Job], storage: StorageConfig, read: Reader) -> dict[str, Any]:
    """Return the recipe's values for this job; check the sections that belong to other jobs."""
    if path is None:
        return {}
    try:
        recipe = tomllib.loads(read(path, storage).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid TOML: {redacted(str(error))}") from None
    for name, values in recipe.items():
        if name not in SECTIONS:
            hint = did_you_mean(name, list(SECTIONS))
            raise ConfigError(f"{path}: there is no section [{name}]{hint}; allowed: {', '.join(SECTIONS)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {name} must be a table: [{name}]")
        if name not in job.model_fields:
            try:
                SECTIONS[name](**values)
            except ValidationError as error:
                raise ConfigError(f"{path}: {redacted(_describe(error, SECTIONS[name], prefix=name))}") from None
    return {name: values for name, values in recipe.items() if name in job.model_fields}


def _describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Return the first of pydantic's errors as one line: the key, the value and what is allowed."""
    first = error.errors(include_url=False)[0]
    path = [*([prefix] if prefix else []), *map(str, first["loc"])]
    key = ".".join(path)
    if path[-1:] == ["[key]"] and path[:2] == ["source", "columns"]:
        return _describe_column(path[2])
    if first["type"] == "extra_forbidden":
        owner = SECTIONS[path[0]] if len(path) > 1 and path[0] in SECTIONS else model
        owner = ParameterConfig if path[:2] == ["tune", "space"] else owner
        known = list(owner.model_fields)
        return f"{key}: there is no such key{did_you_mean(path[-1], known)}; allowed: {', '.join(known)}"
    message = first_message(error)
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    message = message[:1].lower() + message[1:]
    return f"{key}: {shown(first['input'])} is not allowed: {message}"


def _describe_column(word: str) -> str:
    """Return the message for a key of `source.columns` that is no column of ours."""
    known = get_args(LabelColumn)
    others = COLUMN_WORDS | dict.fromkeys(("file", "path", "image"), "key") | {"id": "subject"}
    column = others.get(word.casefold())
    meant = f"; did you mean {column}?" if column else did_you_mean(word, known)
    return f"source.columns: there is no column {word!r}{meant}; allowed: {', '.join(known)}"


def _help_of(job: type[Job], key: str) -> str:
    section, _, field = key.rpartition(".")
    model = SECTIONS[section] if section else job
    return " ".join((model.model_fields[field].description or "").split())

"""A sweep's search space: what [tune.space] means, checked against the configuration before anything starts.

A trial's parameters are in Optuna's form: one scalar per key, a list as its JSON text. Its values are in the form of
the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial
from pydantic import BaseModel, ValidationError

from agr_ray.config import PAPER_POINT, ParameterConfig, Scalar, TrainJob, TuneConfig, TuneJob
from agr_ray.config.section import first_message
from agr_ray.errors import ConfigError
from agr_ray.redact import shown
from agr_ray.tuning.trials import ERROR_TASKS

Params = Mapping[str, Scalar]
Space = Mapping[str, ParameterConfig]

SEARCHED: Final = ("model", "loss", "augment", "train", "predict")
"""Sections of which keys may be searched."""
FIXED: Final = {
    "model.preset": "search the keys that it sets, such as model.backbone",
    "model.tasks": "objectives of other tasks can't be compared",
    "train.data": "a sweep compares trainings on the same data",
    "train.out": "trials are in the sweep's folder",
    "train.name": "trials are named by their number",
    **dict.fromkeys(
        ("train.num_workers", "train.use_gpu", "train.gpus_per_worker", "train.cpus_per_worker"),
        "the number of concurrent trials depends on it",
    ),
    **dict.fromkeys(
        (
            "train.threads_per_worker",
            "train.max_failures",
            "train.outage_s",
            "train.lock_expiry_s",
            "train.num_to_keep",
            "train.cache_mib",
            "train.tf32",
            "train.compile",
            "train.mlflow_uri",
        ),
        "it does not affect what is learnt",
    ),
}
"""Keys that can't be searched, and why."""
_BETWEEN: Final = 0.6180339887
"""Position, between the bounds, of the value that stands for those in between when the space is checked."""


def check_space(job: TuneJob) -> None:
    """Check each bound, each choice and each given point against the configuration of the trials.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    space, base = job.tune.space, base_job(job)
    for key, parameter in space.items():
        _check_key(base, key)
        _check_condition(space, key, parameter)
    in_order(space)
    for key, parameter in space.items():
        # With the first value of each key that it depends on, because it has no meaning otherwise.
        conditions: dict[str, Any] = {}
        _add_conditions(space, key, conditions)
        for value in _tried(parameter):
            try:
                with_values(base, conditions | {key: value})
            except ConfigError as error:
                reason = str(error)
                where = "" if reason.startswith(f"{key}:") else f"{value!r} can't be combined with the recipe: "
                raise ConfigError(f'tune.space."{key}": {where}{reason.removeprefix(f"{key}: ")}') from None
    for point in job.tune.points_to_evaluate:
        _check_point(base, space, point, "tune.points_to_evaluate")
    if job.tune.paper_first:
        hint = "; widen the space, or set tune.paper_first = false"
        _check_point(base, space, paper_point(space), "tune.paper_first", hint)
    if job.tune.mode == "pareto" and len(job.model.tasks) < 2:
        raise ConfigError(f"tune.mode pareto needs two tasks, and model.tasks is {list(job.model.tasks)}")
    for name in job.tune.constraints:
        if ERROR_TASKS[name] not in job.model.tasks:
            raise ConfigError(
                f"tune.constraints {name} needs the task {ERROR_TASKS[name]}, and model.tasks is "
                f"{list(job.model.tasks)}"
            )
    if "train.epochs" in space and job.tune.asha and job.tune.mode == "scalar":
        raise ConfigError(
            'tune.space."train.epochs": can\'t be searched if trials are stopped early: schedules of other lengths '
            "can't be compared epoch by epoch; set tune.asha = false"
        )


def base_job(job: TuneJob) -> TrainJob:
    """Return the training job that each trial modifies."""
    return TrainJob(**{name: getattr(job, name) for name in TrainJob.model_fields})


def with_values(job: TrainJob, values: Mapping[str, Any]) -> TrainJob:
    """Return the job with other values of some dotted keys.

    Raises:
        ConfigError: the job can't be run with them.
    """
    data: dict[str, Any] = {}
    for name in TrainJob.model_fields:
        section = getattr(job, name)
        data[name] = section.model_dump() if isinstance(section, BaseModel) else section
    for key, value in values.items():
        section, _, field = key.partition(".")
        data[section][field] = value
    try:
        return TrainJob(**data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, message = ".".join(str(part) for part in first["loc"]), first_message(error)
        if first["type"] == "value_error":
            raise ConfigError(f"{key}: {message}" if key else message) from None
        named = next((name for name in values if f"{key}.".startswith(f"{name}.")), key)
        given, message = values.get(named, first["input"]), message[:1].lower() + message[1:]
        raise ConfigError(f"{named}: {shown(given)} is not allowed: {message}") from None


def values_of(space: Space, params: Params) -> dict[str, Any]:
    """Return a trial's parameters as values of the configuration."""
    return {key: _decoded(space[key], value) for key, value in params.items()}


def in_order(space: Space) -> list[str]:
    """Return the keys in an order in which each comes after those that it depends on (`when`).

    Raises:
        ConfigError: keys depend on each other in a circle.
    """
    ordered: list[str] = []
    while len(ordered) < len(space):
        ready = [key for key in space if key not in ordered and all(other in ordered for other in space[key].when)]
        if not ready:
            circle = [key for key in space if key not in ordered]
            raise ConfigError(f"tune.space: {', '.join(circle)} depend on each other in a circle (when)")
        ordered += ready
    return ordered


def suggest(trial: Trial, space: Space) -> dict[str, Scalar]:
    """Ask Optuna for a trial's parameters; those whose condition does not hold are left out."""
    params: dict[str, Scalar] = {}
    for key in in_order(space):
        parameter = space[key]
        if not is_searched(parameter, params, space):
            continue
        distribution = distribution_of(parameter)
        if isinstance(distribution, CategoricalDistribution):
            params[key] = trial.suggest_categorical(key, distribution.choices)  # type: ignore[assignment]  # no None
        elif isinstance(distribution, IntDistribution):
            params[key] = trial.suggest_int(key, distribution.low, distribution.high, step=distribution.step)
        else:
            assert isinstance(distribution, FloatDistribution)
            params[key] = trial.suggest_float(
                key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
    return params


def is_searched(parameter: ParameterConfig, params: Params, space: Space) -> bool:
    """Return whether the parameter's condition holds (`when`)."""
    return all(
        other in params and _decoded(space[other], params[other]) in _wanted(values)
        for other, values in parameter.when.items()
    )


def distribution_of(parameter: ParameterConfig) -> BaseDistribution:
    """Return the distribution from which Optuna draws a parameter."""
    if parameter.choice is not None:
        return CategoricalDistribution([_encoded(value) for value in parameter.choice])
    if parameter.integer is not None:
        step = int(parameter.step or 1)
        first, last = parameter.integer
        return IntDistribution(first, last - (last - first) % step, step=step)
    if parameter.log_uniform is not None:
        return FloatDistribution(*parameter.log_uniform, log=True)
    assert parameter.uniform is not None
    low, high = parameter.uniform
    if parameter.step:
        high = low + parameter.step * int((high - low) / parameter.step + 1e-9)
    return FloatDistribution(low, high, step=parameter.step)


def paper_point(space: Space) -> dict[str, Scalar]:
    """Return the paper's values of the searched keys, even if their conditions do not hold."""
    return {key: value for key, value in PAPER_POINT.items() if key in space}


def is_papers(job: TuneJob, params: Params) -> bool:
    """Return whether a trial has the paper's loss weights and learning rate, at least one of which is searched."""
    return bool(paper_point(job.tune.space)) and all(
        params.get(key, recipes_value(job, key)) == value for key, value in PAPER_POINT.items()
    )


def unlike_papers(job: TuneJob) -> list[str]:
    """Return the keys of the paper's point that are not searched and have another value in the recipe."""
    return [key for key, value in PAPER_POINT.items() if key not in job.tune.space and recipes_value(job, key) != value]


def recipes_value(job: TrainJob, key: str) -> Any:
    """Return the recipe's value of a dotted key."""
    section, _, field = key.partition(".")
    return getattr(getattr(job, section), field)


def points(config: TuneConfig) -> list[dict[str, Scalar]]:
    """Return the given parameters of the first trials, the paper's first."""
    own = [{key: _encoded(value) for key, value in point.items()} for point in config.points_to_evaluate]
    paper = paper_point(config.space) if config.paper_first else {}
    return [paper, *own] if paper else own


def _check_key(base: TrainJob, key: str) -> None:
    """Reject a key that does not exist or can't be searched."""
    section, _, field = key.partition(".")
    if section not in SEARCHED:
        allowed = ", ".join(f"{name}.*" for name in SEARCHED)
        raise ConfigError(f'tune.space."{key}": can\'t be searched; allowed: {allowed}')
    fields = type(getattr(base, section)).model_fields
    if field not in fields:
        raise ConfigError(f'tune.space."{key}": there is no such key; allowed in [{section}]: {", ".join(fields)}')
    if key in FIXED:
        raise ConfigError(f'tune.space."{key}": can\'t be searched: {FIXED[key]}')


def _check_condition(space: Space, key: str, parameter: ParameterConfig) -> None:
    for other, values in parameter.when.items():
        if other not in space:
            raise ConfigError(
                f'tune.space."{key}": when names {other}, which is not searched; searched: {", ".join(space)}'
            )
        for value in _wanted(values):
            _check_value(space, other, value, f'tune.space."{key}": when')


def _check_point(base: TrainJob, space: Space, point: Mapping[str, Any], where: str, hint: str = "") -> None:
    """Reject a point with a value outside the space, or that the configuration rejects as a whole."""
    conditions: dict[str, Any] = {}
    for key, value in point.items():
        if key not in space:
            raise ConfigError(f"{where}: {key} is not searched; searched: {', '.join(space)}")
        _check_value(space, key, value, where, hint)
        _add_conditions(space, key, conditions)
    values = conditions | dict(point)
    params = {key: _encoded(value) for key, value in values.items()}
    try:
        with_values(base, {key: value for key, value in values.items() if is_searched(space[key], params, space)})
    except ConfigError as error:
        shown_point = ", ".join(f"{key} {value}" for key, value in point.items())
        raise ConfigError(f"{where}: {shown_point} can't be combined with the recipe: {error}") from None


def _check_value(space: Space, key: str, value: Any, where: str, hint: str = "") -> None:
    """Reject a value outside the space."""
    parameter = space[key]
    if parameter.choice is not None:
        if not any(value == each and type(value) is type(each) for each in parameter.choice):
            raise ConfigError(f"{where}: {key} {value!r} is not in choice {list(parameter.choice)}{hint}")
        return
    kind = next(kind for kind in ("uniform", "log_uniform", "integer") if getattr(parameter, kind))
    is_number = isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    if not is_number or not parameter.low <= value <= parameter.high:
        low, high = f"{parameter.low:g}", f"{parameter.high:g}"
        raise ConfigError(f"{where}: {key} {value!r} is not in {kind} [{low}, {high}]{hint}")
    if parameter.step and abs((value - parameter.low) / parameter.step % 1.0 - 0.5) < 0.5 - 1e-6:
        raise ConfigError(
            f"{where}: {key} {value!r} is not {parameter.low:g} and a multiple of step {parameter.step:g}{hint}"
        )


def _add_conditions(space: Space, key: str, conditions: dict[str, Any]) -> None:
    for other, values in space[key].when.items():
        conditions[other] = _wanted(values)[0]
        _add_conditions(space, other, conditions)


def _tried(parameter: ParameterConfig) -> list[Any]:
    """Return the values with which `check_space` tests a parameter: its bounds and one between, or all choices."""
    if parameter.choice is not None:
        return list(parameter.choice)
    if parameter.integer is not None:
        return list(parameter.integer)
    if parameter.step:
        return [parameter.low, parameter.low + parameter.step, parameter.high]
    return [parameter.low, parameter.low + (parameter.high - parameter.low) * _BETWEEN, parameter.high]


def _wanted(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, list | tuple) else (values,)


def _encoded(value: Any) -> Scalar:
    scalar: Scalar = json.dumps(value) if isinstance(value, list | tuple) else value
    return scalar


def _decoded(parameter: ParameterConfig, value: Scalar) -> Any:
    if parameter.choice is None:
        return value
    return next(
        (each for each in parameter.choice if _encoded(each) == value and type(_encoded(each)) is type(value)), value
    )

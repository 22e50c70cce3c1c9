"""The tasks of a network, each with a head of its own."""

from __future__ import annotations

from agr_ray.config import ModelConfig
from agr_ray.errors import ConfigError
from agr_ray.labels import LabelSpace
from agr_ray.registry import HEADS


def ordered_tasks(config: ModelConfig) -> tuple[str, ...]:
    """Return the tasks of a network in the order of its heads."""
    return tuple(task for task in HEADS if task in config.tasks)


def check_tasks(config: ModelConfig, space: LabelSpace) -> None:
    """Reject a task that has no classes in the label space.

    Raises:
        ConfigError: there is such a task; the message names it.
    """
    if "race" in config.tasks and not space.races:
        allowed = ", ".join(task for task in config.tasks if task != "race") or "age, gender"
        raise ConfigError(f"model.tasks: the label space {space.name} has no races; allowed: {allowed}")

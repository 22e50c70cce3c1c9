"""Registers the parts of `toy_parts` in a process. Imports no torch, because Ray workers import it when they start."""

from __future__ import annotations

from agr_ray.registry import ATTENTION, BACKBONES, HEADS, Registry


def register() -> None:
    """Add the parts: one line each, and one for the fourth task."""
    BACKBONES.register("patches", "toy_parts:Patches")
    ATTENTION.register("gain", "toy_parts:Gain")
    HEADS["age"].register("log", "toy_parts:LogAge")
    HEADS["smile"] = Registry("smile head", {"square": "toy_parts:Smile"})


def unregister() -> None:
    """Take them out again."""
    for registry, name in ((BACKBONES, "patches"), (ATTENTION, "gain"), (HEADS["age"], "log")):
        registry.unregister(name)
    del HEADS["smile"]

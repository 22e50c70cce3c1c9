"""`agr-ray models`: the presets and the parts of networks, with their sizes and sources."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from agr_ray.config import ModelConfig
from agr_ray.config.presets import PRESETS
from agr_ray.console import make_console, make_table
from agr_ray.errors import ConfigError
from agr_ray.labels import UTKFACE
from agr_ray.models.network import MultiTaskNet
from agr_ray.registry import ATTENTION, BACKBONES, HEADS, NECKS, Registry

_SIDE_PX: Final = 224
_CHANNELS: Final = (256, 512, 1024, 2048)


def models() -> None:
    """Print two tables: the presets, and the parts."""
    console = make_console()
    missing: list[str] = []
    presets = make_table("preset", "stands for", "backbone", "side, px", "parameters", "multiply-adds")
    for name, preset in PRESETS.items():
        config = ModelConfig(preset=name)
        try:
            sizes = [millions(each) for each in preset_size(config)]
        except ConfigError as error:  # a package is missing
            missing.append(str(error))
            sizes = ["", ""]
        presets.add_row(name, preset.row, config.backbone, str(config.image_size), *sizes)
    console.print("agr-ray train --preset NAME trains a network, which stands for a system in Bosco and Chi (2025):")
    console.print(presets)
    parts = make_table("part", "name", "parameters", "source")
    for kind, registry in kinds().items():
        for name in registry.names:
            try:
                size = millions(part_size(kind, name))
            except ConfigError:
                size = ""
            parts.add_row(kind, name, size, source(registry[name]))
    keys = ", ".join(f"--model.{kind}" for kind in kinds())
    console.print(f"{keys} choose other parts. Sizes of blocks, necks and heads are those after a ResNet50:")
    console.print(parts)
    for line in dict.fromkeys(missing):
        console.print(line)


def kinds() -> dict[str, Registry]:
    """Return the registries by the key of `[model]` that chooses one of their parts."""
    return {"backbone": BACKBONES, "attention": ATTENTION, "neck": NECKS, "age_head": HEADS["age"]}


def preset_size(config: ModelConfig) -> tuple[int, int]:
    """Return the numbers of parameters and multiply-adds of a network, without allocating or computing anything."""
    with torch.device("meta"):
        return network_size(MultiTaskNet(config, UTKFACE).eval())


def network_size(network: MultiTaskNet) -> tuple[int, int]:
    """Return the numbers of parameters, and of multiply-adds for one image, of a network in evaluation mode."""
    side = network.config.image_size
    counter = FlopCounterMode(display=False)
    # The fast path of attention is one operator, which the counter does not know.
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), counter:
            network(torch.zeros(1, 3, side, side, device=next(network.parameters()).device))
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2


def part_size(kind: str, name: str) -> int:
    """Return the number of parameters of a part."""
    build: Callable[..., nn.Module] = kinds()[kind][name]
    arguments: tuple[Any, ...] = {
        "backbone": (name,),
        "attention": (_CHANNELS[-1],),
        "neck": (_CHANNELS,),
        "age_head": (_CHANNELS[-1], "age", UTKFACE),
    }[kind]
    with torch.device("meta"):
        return sum(p.numel() for p in build(*arguments).parameters())


def source(part: Callable[..., Any]) -> str:
    """Return the publication in a part's documentation, or what the documentation says instead."""
    if not part.__module__.startswith("agr_ray."):
        return ""
    module = inspect.getdoc(inspect.getmodule(part)) or ""
    text = " ".join((inspect.getdoc(part) or "").split())
    cited = re.search(r"Source: (.*?\b(?:19|20)\d\d\b)", text) or re.search(
        r"\((.*?\b(?:19|20)\d\d\b)\)", module.partition("\n\n")[0], re.DOTALL
    )
    return " ".join(cited[1].split()) if cited else module.partition("\n")[0].rstrip(".")


def millions(count: int) -> str:
    """Return a count in millions: `23.5 M`."""
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count / 1e6:.3f} M"

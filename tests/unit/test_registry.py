"""Registries: names, the parts they build, and errors."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from pydantic import ValidationError
from torch import nn

from agr_ray.config import ModelConfig
from agr_ray.registry import ATTENTION, BACKBONES, HEADS, NECKS, Registry


@pytest.mark.parametrize("registry", [BACKBONES, ATTENTION, NECKS, *HEADS.values()])
def test_every_entry_can_be_imported(registry: Registry) -> None:
    assert registry.names
    assert all(issubclass(registry[name], nn.Module) for name in registry.names)  # type: ignore[arg-type]  # classes


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"backbone": "resnet5O"}, "there is no backbone 'resnet5O'; allowed: resnet18, .*; did you mean resnet50?"),
        ({"attention": "cbm"}, "allowed: none, squeeze_excitation, cbam, .*; did you mean cbam?"),
        ({"neck": "max"}, "there is no neck 'max'; allowed: average, multi_scale, fully_connected$"),
        ({"age_head": "lin"}, "there is no age head 'lin'; allowed: linear, groups, .*; did you mean linear?"),
        ({"tasks": ("age", "rase")}, "must name at least one of age, gender, race, domain, each at most once"),
    ],
)
def test_an_unknown_name_is_rejected(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError) as raised:
        ModelConfig(**values)  # type: ignore[arg-type]  # wrong on purpose
    assert re.search(expected.replace("?", r"\?"), raised.value.errors()[0]["msg"])


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="there is already a neck 'average'"):
        NECKS.register("average", "torch.nn:Identity")


def test_names_are_checked_without_torch() -> None:
    config = "from agr_ray.config import ModelConfig; ModelConfig(backbone='resnet18')"
    code = f"import sys; {config}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"

"""Names of the network's parts. A part is added by one file in `models/` and one line here.

Entries are `module:name` until they are used, so checking a configuration and `--help` need no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any, Final

from agr_ray.redact import shown


class Registry:
    """Parts of one kind by name.

    Args:
        kind: name of the kind in messages, such as `backbone`.
        parts: name of each part -> `module:name` of the class or function that builds it.
    """

    def __init__(self, kind: str, parts: Mapping[str, str]) -> None:
        self._kind = kind
        self._parts: dict[str, str | Callable[..., Any]] = dict(parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names in the order of registration."""
        return tuple(self._parts)

    def register(self, name: str, part: str | Callable[..., Any]) -> None:
        """Add a part in this process: `module:name` of its builder, or the builder itself.

        Other processes, such as Ray's workers, know only the parts that this module lists.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._parts:
            raise ValueError(f"there is already a {self._kind} {name!r}")
        self._parts[name] = part

    def unregister(self, name: str) -> None:
        """Remove a part."""
        del self._parts[name]

    def check(self, name: str) -> str:
        """Return the name if there is such a part.

        Raises:
            ValueError: there is none; the message lists the allowed names.
        """
        if name not in self._parts:
            close = difflib.get_close_matches(name, self._parts, n=1)
            suggestion = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"there is no {self._kind} {shown(name)}; allowed: {', '.join(self._parts)}{suggestion}")
        return name

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Return the class or function that builds the part.

        Raises:
            ValueError: there is no such part.
        """
        part = self._parts[self.check(name)]
        if callable(part):
            return part
        builder: Callable[..., Any] = resolve_name(part)
        return builder


BACKBONES: Final = Registry(
    "backbone",
    {
        "resnet18": "agr_ray.models.backbones.resnet:ResNet",
        "resnet34": "agr_ray.models.backbones.resnet:ResNet",
        "resnet50": "agr_ray.models.backbones.resnet:ResNet",
        "mobilenet_v3_small": "agr_ray.models.backbones.mobilenet:MobileNetV3",
        "mobilenet_v3_large": "agr_ray.models.backbones.mobilenet:MobileNetV3",
    },
)
"""Builders are called with the backbone's name; see `models.backbones.base.Backbone`."""

ATTENTION: Final = Registry(
    "attention block",
    {
        "none": "torch.nn:Identity",
        "squeeze_excitation": "agr_ray.models.attention.squeeze_excitation:SqueezeExcitation",
        "cbam": "agr_ray.models.attention.cbam:Cbam",
    },
)
"""Builders are called with the number of channels. A block maps (n, channels, h, w) feature maps to the same shape."""

NECKS: Final = Registry("neck", {"average": "agr_ray.models.necks.average:AveragePool"})
"""Builders are called with the number of channels. A neck maps (n, channels, h, w) feature maps to (n, channels)."""

HEADS: Final = {
    "age": Registry(
        "age head",
        {
            "linear": "agr_ray.models.heads.linear_age:LinearAge",
            "distribution": "agr_ray.models.heads.distribution_age:DistributionAge",
        },
    ),
    "gender": Registry("gender head", {"binary": "agr_ray.models.heads.binary:Binary"}),
    "race": Registry("race head", {"softmax": "agr_ray.models.heads.softmax:Softmax"}),
}
"""Heads of each task. Builders are called with (number of features, task, label space); see `models.heads.base.Head`.

The tasks are in the order of the network's heads, and of everything else that has an entry for each task."""


def head_name(config: Any, task: str) -> str:
    """Return the name of a task's head: the configuration's `TASK_head` if it has one, else the first registered."""
    return str(getattr(config, f"{task}_head", None) or HEADS[task].names[0])

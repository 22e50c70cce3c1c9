"""Names of the network's parts. A part is added by one file in `models/` and one line here.

Entries are `module:name` until they are used, so checking a configuration and `--help` need no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
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
        return check_name(self._kind, name, self._parts)

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


def check_name(kind: str, name: str, known: Collection[str]) -> str:
    """Return the name if it is one of those of its kind.

    Raises:
        ValueError: it is not; the message lists the allowed names.
    """
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        suggestion = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"there is no {kind} {shown(name)}; allowed: {', '.join(known)}{suggestion}")
    return name


BACKBONES: Final = Registry(
    "backbone",
    {
        "resnet18": "agr_ray.models.backbones.resnet:ResNet",
        "resnet34": "agr_ray.models.backbones.resnet:ResNet",
        "resnet50": "agr_ray.models.backbones.resnet:ResNet",
        "resnet101": "agr_ray.models.backbones.resnet:ResNet",
        "mobilenet_v3_small": "agr_ray.models.backbones.mobilenet:MobileNetV3",
        "mobilenet_v3_large": "agr_ray.models.backbones.mobilenet:MobileNetV3",
        "efficientnet_b0": "agr_ray.models.backbones.efficientnet:EfficientNet",
        "efficientnet_b3": "agr_ray.models.backbones.efficientnet:EfficientNet",
        "vgg16": "agr_ray.models.backbones.vgg:VGG",
        "convnext_tiny": "agr_ray.models.backbones.convnext:ConvNeXt",
        "vit_b_16": "agr_ray.models.backbones.vit:ViT",
        "swin_t": "agr_ray.models.backbones.swin:Swin",
        "inception_resnet_v1": "agr_ray.models.backbones.inception_resnet:InceptionResNet",
        "plain_cnn": "agr_ray.models.backbones.plain_cnn:PlainCNN",
    },
)
"""Builders are called with the backbone's name; see `models.backbones.base.Backbone`."""

PUBLISHED_WEIGHTS: Final[Mapping[str, tuple[str, ...]]] = {
    "imagenet": (
        *("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v3_small", "mobilenet_v3_large"),
        *("efficientnet_b0", "efficientnet_b3", "vgg16", "convnext_tiny", "vit_b_16", "swin_t"),
    ),
    "vggface2": ("inception_resnet_v1",),
    "casia-webface": ("inception_resnet_v1",),
}
"""Values of `model.pretrained` that are downloads, and the backbones that have them."""

ATTENTION: Final = Registry(
    "attention block",
    {
        "none": "torch.nn:Identity",
        "squeeze_excitation": "agr_ray.models.attention.squeeze_excitation:SqueezeExcitation",
        "cbam": "agr_ray.models.attention.cbam:Cbam",
        "shuffle": "agr_ray.models.attention.shuffle:ShuffleAttention",
        "self_attention": "agr_ray.models.attention.self_attention:SelfAttention",
    },
)
"""Builders are called with the number of channels. A block maps (n, channels, h, w) feature maps to the same shape."""

NECKS: Final = Registry(
    "neck",
    {
        "average": "agr_ray.models.necks.average:AveragePool",
        "multi_scale": "agr_ray.models.necks.multi_scale:MultiScale",
        "fully_connected": "agr_ray.models.necks.fully_connected:FullyConnected",
    },
)
"""Builders are called with the channels of the feature map after each stage. A neck maps these feature maps, (n,
channels, h, w) each, to (n, channels of the last)."""

HEADS: Final = {
    "age": Registry(
        "age head",
        {
            "linear": "agr_ray.models.heads.linear_age:LinearAge",
            "groups": "agr_ray.models.heads.group_age:GroupAge",
            "expectation": "agr_ray.models.heads.expectation_age:ExpectationAge",
            "distribution": "agr_ray.models.heads.distribution_age:DistributionAge",
            "mean_variance": "agr_ray.models.heads.mean_variance_age:MeanVarianceAge",
            "coral": "agr_ray.models.heads.coral_age:CoralAge",
            "corn": "agr_ray.models.heads.corn_age:CornAge",
            "soft_ordinal": "agr_ray.models.heads.soft_ordinal_age:SoftOrdinalAge",
        },
    ),
    "gender": Registry("gender head", {"binary": "agr_ray.models.heads.binary:Binary"}),
    "race": Registry("race head", {"softmax": "agr_ray.models.heads.softmax:Softmax"}),
    "domain": Registry("domain head", {"reversal": "agr_ray.models.heads.domain:Domain"}),
}
"""Heads of each task. Builders are called with (number of features, task, label space); see `models.heads.base.Head`.

The tasks are in the order of the network's heads, and of everything else that has an entry for each task."""


def head_name(config: Any, task: str) -> str:
    """Return the name of a task's head: the configuration's `TASK_head` if it has one, else the first registered."""
    return str(getattr(config, f"{task}_head", None) or HEADS[task].names[0])

"""The interface of all backbones."""

from __future__ import annotations

import http.client
import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import torch
from torch import Tensor, nn

After: TypeAlias = Callable[[int, Tensor], Tensor]
"""Called after a stage with its index and its feature map, (n, channels, h, w); returns the map that replaces it."""


class WeightsError(Exception):
    """Pretrained weights can't be read, or do not fit the backbone. The message is one line."""


def download(url: str, fetch: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Return what `fetch` downloads from the URL.

    Raises:
        WeightsError: the download failed.
    """
    try:
        return fetch()
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, http.client.HTTPException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # torch keeps what it has downloaded, which may be a proxy's page instead of the file.
        with suppress(OSError):
            Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(url).name).unlink()
        raise WeightsError(
            f"{url} could not be downloaded: {reason}; without internet access, download the file elsewhere and set "
            "model.pretrained to its path, or to none"
        ) from None


class Backbone(nn.Module):
    """Maps normalised images, (n, 3, side, side) float, to feature maps.

    A subclass sets `num_channels` and `num_features`, and defines `forward`. It may override the other methods. One
    whose feature map shrinks in stages overrides `stage_channels` and `feature_maps`: `staged.StagedBackbone` does.
    """

    num_channels: int
    """Channels of the last feature map."""
    num_features: int
    """Number of features after pooling and `project`."""
    min_side_px: int = 32
    """Smallest side of images that it takes."""
    side_multiple: int = 1
    """Sides must be multiples of this."""
    published: tuple[str, ...] = ()
    """Names of the weights that can be downloaded, as in `registry.PUBLISHED_WEIGHTS`."""
    replaced_layers: tuple[str, ...] = ()
    """Name prefixes of tensors in published state dicts that the heads replace."""

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Return the channels of the feature map after each stage."""
        return (self.num_channels,)

    def feature_maps(self, images_nchw: Tensor, after: After) -> list[Tensor]:
        """Return the feature map after each stage, (n, channels, h, w) each, as `after` left it.

        Args:
            images_nchw: normalised images.
            after: for instance an attention block after some of the stages.
        """
        return [after(0, self(images_nchw))]

    def project(self, pooled: Tensor) -> Tensor:
        """Map the pooled feature map, (n, num_channels), to (n, num_features)."""
        return pooled

    def stages(self) -> list[list[nn.Parameter]]:
        """Return all parameters in stages, from the image to the features (`train.layer_decay`)."""
        return [list(self.parameters())]

    @classmethod
    def check_available(cls) -> None:
        """Check that the packages of this backbone are installed.

        Raises:
            ConfigError: one is missing.
        """

    def published_weights(self, name: str) -> Mapping[str, Tensor]:
        """Download one of the `published` weights, named as in `state_dict`.

        Raises:
            WeightsError: the download failed.
        """
        raise NotImplementedError(name)

    def fuse(self, device: torch.device) -> bool:  # noqa: ARG002  # for subclasses
        """Fuse layers in place for inference on this device, in evaluation mode, without changing the function.

        Returns:
            Whether all layers may also compute in bfloat16 outside autocast, inputs included.
        """
        return False

"""The arithmetic of forward and backward passes."""

from __future__ import annotations

import torch

from agr_ray.device import has_bfloat16


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a network runs: bfloat16 where `precision` asks for it, or else as it is."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(device, precision))


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """Say whether `precision` asks for bfloat16 on this device.

    `auto` asks for it where the device has instructions for it. A CPU without them takes some twenty times as long
    for a step in bfloat16 as in float32.
    """
    return precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))

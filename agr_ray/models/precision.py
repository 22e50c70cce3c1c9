"""The arithmetic of forward and backward passes."""

from __future__ import annotations

import torch

from agr_ray.device import has_bfloat16


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a network runs: in the type that `precision` asks for, or else as it is."""
    dtype = compute_dtype(device, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the type that `precision` asks for on this device.

    `auto` asks for bfloat16 where the device has instructions for it. A CPU without them takes some twenty times as
    long for a step in bfloat16 as in float32.
    """
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Return what keeps float16 gradients in range; in any other type it leaves losses and steps as they are.

    float16 ends at 6e-8 and 65504. The loss is multiplied so that small gradients are not lost; where large ones
    overflow, the step is left out and the factor halved, and after 2000 steps without that it is doubled again.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def allow_tf32(device: torch.device, is_allowed: bool) -> None:
    """Say, for this process, whether a GPU may multiply float32 in TF32; a CPU is left as it is."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if is_allowed else "highest")
        torch.backends.cudnn.allow_tf32 = is_allowed  # convolutions, for which torch's own default is yes

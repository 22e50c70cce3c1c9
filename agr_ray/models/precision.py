"""Data types of the forward and backward passes."""

from __future__ import annotations

import contextlib

import torch

from agr_ray.device import has_bfloat16


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a `precision`; for float32, it is disabled."""
    dtype = compute_dtype(device, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def in_float32(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast; PyTorch's meta device, on which networks are only counted, has none."""
    is_available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if is_available else contextlib.nullcontext()


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the data type of a `precision` on this device.

    `auto` is bfloat16 if the device has instructions for it, else float32. A CPU without them takes some twenty times
    as long for a step in bfloat16 as in float32. Of an int8 network, PyTorch computes the heads only, in float32.
    """
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Return the gradient scaler of a `precision`; it is enabled for float16 only.

    float16 has a range of 6e-8 to 65504. The loss is scaled up so that small gradients do not underflow. If large ones
    overflow, the step is skipped and the scale is halved; after 2000 steps without overflow it is doubled.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def allow_tf32(device: torch.device, is_allowed: bool) -> None:
    """Set, for this process, whether GPUs may use TF32 for float32 products; do nothing if the device is a CPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if is_allowed else "highest")
        torch.backends.cudnn.allow_tf32 = is_allowed  # for convolutions; torch's default is True

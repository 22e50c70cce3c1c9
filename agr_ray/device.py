"""Names and capabilities of devices."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch


def cpu_name() -> str:
    """Return the name of this machine's CPU; on systems other than Linux, only its architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 natively.

    A CPU does not if `ATEN_CPU_CAPABILITY=avx2` limits PyTorch, so that one computer can imitate another.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last: Arm's

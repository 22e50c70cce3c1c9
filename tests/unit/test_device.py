"""What this machine's devices can do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from agr_ray.device import has_bfloat16

CODE = "import torch\nfrom agr_ray.device import has_bfloat16\nprint(has_bfloat16(torch.device('cpu')))"


def test_a_cpu_has_bfloat16_if_its_flags_say_so() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    assert has_bfloat16(torch.device("cpu")) == bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)


def test_a_limit_of_pytorch_to_avx2_takes_bfloat16_away() -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["False"]

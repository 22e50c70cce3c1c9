"""benchmarks/gpu.sh as on a GPU, but tiny and on the CPU: each measurement works, Ray's included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_every_measurement_succeeds_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [str(ROOT / "benchmarks/gpu.sh"), "--device", "cpu", "--smoke", "--minutes", "28", "--out", str(out)]

    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["finished"]
    results = record["measurements"]
    assert len(results) == 14
    speeds = {name: result.get("images_per_s", 0.0) for name, result in results.items() if name != "prepare"}
    assert min(speeds.values()) > 0.0, speeds
    compared = {name: result["largest_difference"] for name, result in results.items() if "predict" in name}
    assert len(compared) == 5
    assert compared["predict_float32"] == {"age": 0.0, "gender": 0.0, "race": 0.0}
    assert compared["predict_bfloat16"]["age"] > 0.0
    assert all(0.0 <= results[name]["wait_share"] <= 1.0 for name in results if "train" in name)

"""benchmarks/gpu.sh: its budget, its JSON file and its exit status, with measurements that only pretend."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu
import gpu_measures
import random_network

from agr_ray.config import PredictConfig
from agr_ray.models.transform import Transform
from agr_ray.predict.attributes import AttributePredictor

BENCHMARKS = Path(gpu.__file__).parent

PRETENDED = """
import json, os, sys, time
from pathlib import Path
name, folder, device, size = sys.argv[1:]
def write(result): Path(folder, name + ".json").write_text(json.dumps(result))
print("this is", name)
if name == "prepare":
    write({"machine": {"gpu": "none", "cpus": 3}, "arguments": [device, size]})
elif name in ("good", "double"):
    import packed
    write({"images_per_s": packed.SPEED * (1 + (name == "double")), "wait_share": 0.25})
elif name == "wrong":
    write({"images_per_s": 3.0})
    sys.exit("age differs")
elif name == "killed":
    os.kill(os.getpid(), 9)
elif name == "still":
    write({"images_per_s": 0.0})
elif name == "slow":
    write({"images_per_s": 4.0})
    Path(folder).with_name("slow.pid").write_text(str(os.getpid()))
    time.sleep(600)
elif name != "silent":
    raise ValueError("no such name")
"""


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs pretended measurements, and returns the exit status and the JSON file."""
    script = tmp_path / "pretended.py"
    script.write_text(PRETENDED)
    packed = b"SPEED = 50.0\n"
    member = tarfile.TarInfo("./packed.py")
    member.size = len(packed)
    with tarfile.open(tmp_path / "site.tar.xz", "w:xz") as archive:
        archive.addfile(member, io.BytesIO(packed))
    monkeypatch.setattr(gpu, "SCRIPT", script)
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own handlers

    def run(*measurements: gpu.Measurement, options: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(gpu, "MEASUREMENTS", (gpu.Measurement(gpu.PREPARE, 60.0), *measurements))
        out = tmp_path / "gpu.json"
        status = gpu.main(["--out", str(out), "--site", str(tmp_path / "site.tar.xz"), *options])
        return status, json.loads(out.read_text())

    return run


def test_every_measurement_has_a_function_and_a_baseline_that_exist() -> None:
    names = [each.name for each in gpu.MEASUREMENTS]

    assert names[0] == gpu.PREPARE
    assert sorted(names) == sorted(gpu_measures.MEASURES)
    assert [each.baseline for each in gpu.MEASUREMENTS if each.baseline not in ("", *names)] == []


def test_results_are_written_and_compared_with_their_baselines(pretend: Any, capsys: pytest.CaptureFixture) -> None:
    status, record = pretend(gpu.Measurement("good", 60.0), gpu.Measurement("double", 60.0, "good"))

    assert status == 0
    assert record["finished"]
    assert record["measurements"]["prepare"]["arguments"] == ["cuda", "full"]
    assert [record["measurements"][name]["images_per_s"] for name in ("good", "double")] == [50.0, 100.0]
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if line.startswith("double")] == [
        ["double", "100.0", "200.0%", "of", "good", "25.0%"]
    ]
    assert "gpu none, cpus 3" in out


@pytest.mark.parametrize(
    ("name", "error", "last_lines"),
    [
        ("wrong", "exit status 1", ["this is wrong", "age differs"]),
        ("killed", "exit status -9", []),
        ("silent", "it wrote no result", ["this is silent"]),
        ("still", "it measured no speed", ["this is still"]),
        ("slow", "stopped after 2 s", ["this is slow"]),
    ],
)
def test_a_failure_is_recorded_and_the_others_run(pretend: Any, name: str, error: str, last_lines: list[str]) -> None:
    status, record = pretend(gpu.Measurement(name, 2.0 if name == "slow" else 60.0), gpu.Measurement("good", 60.0))

    assert status == 1
    assert record["finished"]
    failed = record["measurements"][name]
    assert failed["error"] == error
    assert failed["last_lines"][: len(last_lines)] == last_lines
    assert record["measurements"]["good"]["images_per_s"] == 50.0


def test_figures_of_a_measurement_that_failed_are_kept_but_not_compared(
    pretend: Any, capsys: pytest.CaptureFixture
) -> None:
    _, record = pretend(gpu.Measurement("wrong", 60.0), gpu.Measurement("good", 60.0, "wrong"))

    assert record["measurements"]["wrong"]["images_per_s"] == 3.0
    assert "of wrong" not in capsys.readouterr().out


def test_nothing_runs_once_the_preparation_has_failed(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PREPARE", "silent")

    status, record = pretend(gpu.Measurement("good", 60.0))

    assert status == 1
    assert record["measurements"]["good"] == {"error": "not run, because silent failed"}


def test_nothing_is_started_without_time(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    status, record = pretend(gpu.Measurement("good", 60.0), options=("--minutes", "0.1"))

    assert status == 1
    assert [result["error"] for result in record["measurements"].values()] == [
        "not run, because less than 10 s were left",
        "not run, because prepare failed",
    ]


def test_only_some_can_be_measured(pretend: Any) -> None:
    status, record = pretend(
        gpu.Measurement("slow", 1.0), gpu.Measurement("good", 60.0), options=("--only", "good", "--smoke")
    )

    assert status == 0
    assert list(record["measurements"]) == ["prepare", "good"]
    assert record["measurements"]["prepare"]["arguments"] == ["cuda", "smoke"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--site", "nowhere.tar.xz"), "--site nowhere.tar.xz: no such file"),
        (("--site", __file__), f"--site {__file__}: "),
        (("--minutes", "0"), "--minutes 0: must be greater than 0"),
        (("--minutes", "nan"), "--minutes nan: must be greater than 0"),
        (("--out", "nowhere/gpu.json"), "--out nowhere/gpu.json: its folder does not exist"),
        (("--only", "everything"), "invalid choice: 'everything'"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments_are_rejected(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    command = [str(BENCHMARKS / "gpu.sh"), *options]

    done = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_benchmark_ends_its_measurement_and_leaves_the_results(tmp_path: Path) -> None:
    (tmp_path / "pretended.py").write_text(PRETENDED)
    code = f"""
import sys
sys.path.append({str(BENCHMARKS)!r})
import gpu
from pathlib import Path
gpu.SCRIPT = Path("pretended.py")
gpu.MEASUREMENTS = (gpu.Measurement(gpu.PREPARE, 60.0), gpu.Measurement("slow", 600.0))
sys.exit(gpu.main([]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)})
    pid_file = tmp_path / "slow.pid"
    until_s = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < until_s:
        time.sleep(0.05)

    process.terminate()

    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert not record["finished"]
    assert list(record["measurements"]) == ["prepare"]


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, NDArray[np.float32]]]:
    """Return a folder as `prepare` leaves it, without expected.npz, and what that holds."""
    folder = tmp_path_factory.mktemp("predicted")
    crops = np.random.default_rng(0).integers(0, 256, (16, 38, 38, 3), np.uint8)
    np.save(folder / "crops.npy", crops)
    transform, checkpoint = Transform(32, 32), folder / "checkpoint"
    random_network.save_random_network(gpu_measures.SIZES["smoke"].model, crops, transform, checkpoint)
    return folder, dict(AttributePredictor.load(checkpoint, PredictConfig()).predict(crops))


@pytest.mark.parametrize(
    ("task", "error", "difference"),
    [("age", 0.9, 0.9), ("age", -1.1, 1.1), ("race", 0.06, 0.06), ("gender", np.nan, None), ("race", np.nan, None)],
)
def test_predictions_that_differ_from_the_cpus_are_wrong(
    predicted: Any, monkeypatch: pytest.MonkeyPatch, task: str, error: float, difference: float | None
) -> None:
    folder, right = predicted
    shifted = right[task].copy()
    shifted[(-1,) * shifted.ndim] += error
    np.savez(folder / "expected.npz", **right | {task: shifted})
    monkeypatch.setattr(sys, "argv", ["gpu_measures.py", "predict_float32", str(folder), "cpu", "smoke"])

    if error == 0.9:  # within the limit
        gpu_measures.main()
    else:
        with pytest.raises(SystemExit, match="differs from the CPU's"):
            gpu_measures.main()

    result = json.loads((folder / "predict_float32.json").read_text())
    assert result["images_per_s"] > 0.0
    assert result["largest_difference"] == pytest.approx(
        {"age": 0.0, "gender": 0.0, "race": 0.0} | {task: difference}, abs=1e-4
    )

"""Commands as processes with `--log-format json`: stderr has an object a line, and stdout only results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from test_json_log import logged
from this_process import model

from agr_ray.data.rendered import render_chip
from agr_ray.vision.decode import encode_jpeg

__all__ = ["model"]  # a fixture
IN_THE_WORKER = """
import os, sys, time
from agr_ray.predict.face_finder import FaceFinder
find = FaceFinder.find
def find_with_words(finder, bodies):
    os.write(2, b"Premature end of JPEG file\\n")  # as native code does
    print("warning: an odd photograph", file=sys.stderr)
    if {sleep_s}:
        open({mark!r}, "w").close()
        time.sleep({sleep_s})
    return find(finder, bodies)
FaceFinder.find = find_with_words
"""


def photographs(folder: Path, number: int = 2) -> Path:
    folder.mkdir()
    for name in range(number):
        (folder / f"{name}.jpg").write_bytes(encode_jpeg(render_chip(0, name).image_rgb))
    return folder


def started(folder: Path, *words: object, sleep_s: int = 0) -> subprocess.Popen[str]:
    """Start a command, whose worker prints by itself, and sleeps when it has touched `folder`/mark."""
    code = folder / "code"
    code.mkdir()
    (code / "sitecustomize.py").write_text(
        "import sys\nif 'agr_ray.scoring.local_worker' in sys.orig_argv:\n"
        + "".join(
            f"    {line}\n" for line in IN_THE_WORKER.format(sleep_s=sleep_s, mark=str(folder / "mark")).splitlines()
        )
    )
    return subprocess.Popen(
        [sys.executable, "-c", "from agr_ray.cli import main; main()", *map(str, words), "--log-format", "json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(code), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_run_logs_what_its_worker_prints(model: Path, tmp_path: Path) -> None:
    source = photographs(tmp_path / "in")

    process = started(tmp_path, "score", "--checkpoint", model, "--input", source, "--out", tmp_path / "out")
    out, errors = process.communicate()

    lines = logged(errors)
    assert (process.returncode, out) == (0, ""), errors
    (run_id,) = (path.stem.removeprefix("run=") for path in (tmp_path / "out" / "_SUCCESS").iterdir())
    begins = next(n for n, line in enumerate(lines) if line["message"].startswith("2 listed"))
    assert {line["run"] for line in lines[begins:]} == {run_id}
    said = [(line["level"], line["message"], line["run"]) for line in lines]
    assert said.count(("info", "Premature end of JPEG file", run_id)) == 1
    assert said.count(("warning", "an odd photograph", run_id)) == 1


@pytest.mark.slow
def test_sigterm_is_logged_with_the_run(model: Path, tmp_path: Path) -> None:
    source = photographs(tmp_path / "in")

    process = started(
        tmp_path, "score", "--checkpoint", model, "--input", source, "--out", tmp_path / "out", sleep_s=600
    )
    while not (tmp_path / "mark").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate()

    lines = logged(errors)
    assert (process.returncode, out) == (143, "")
    messages = [line["message"] for line in lines]
    stopping = messages.index("stopping")
    assert messages[-1] == "stopped by SIGTERM; run the same command again to resume it"
    assert lines[-1]["level"] == "error"
    assert len({line["run"] for line in lines[stopping:]}) == 1
    assert lines[stopping]["run"] is not None


@pytest.mark.slow
def test_json_lines_of_predict_are_results(model: Path, tmp_path: Path) -> None:
    source = photographs(tmp_path / "in")
    (source / "x.jpg").write_bytes(b"no image")

    process = started(tmp_path, "predict", source, "--checkpoint", model, "--json-lines")
    out, errors = process.communicate()

    results = [json.loads(line) for line in out.splitlines()]
    assert process.returncode == 0, errors
    assert [Path(each["source"]).name for each in results] == ["0.jpg", "1.jpg", "x.jpg"]
    assert all("message" not in each for each in results)
    assert [line["job"] for line in logged(errors)] == ["predict"] * len(errors.splitlines())

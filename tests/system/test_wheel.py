"""The wheel, installed into a fresh environment without this checkout: the command and the API work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path += [str(Path(__file__).parents[1] / name) for name in ("unit", "ray")]
from sets import checkpoint

from agr_ray.data.rendered.scene import render_photograph

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")

PREDICT = """
import sys
import agr_ray

model = agr_ray.load(sys.argv[1])
photo = model.predict(sys.argv[2])
for face in photo.faces:
    print(face.box, face.age, face.age_interval, face.gender, face.p_male, face.race, face.flags)
photo.draw().save(sys.argv[3])
"""


def run(*command: object, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not UV.exists(), reason="needs the uv that make setup installs")
def test_an_installed_wheel_predicts(tmp_path: Path) -> None:
    run(UV, "build", "--wheel", "--quiet", "--out-dir", tmp_path, ROOT, folder=tmp_path)
    run(UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv", folder=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    # From the folder of the wheel, so that no override of this project applies.
    run(UV, "pip", "install", "--quiet", "--python", python, *tmp_path.glob("*.whl"), folder=tmp_path)
    model = checkpoint(tmp_path / "model")
    Image.fromarray(render_photograph(0, 1, 900, 600, 3).image_rgb).save(tmp_path / "photo.jpg")

    assert "facenet-pytorch" not in run(UV, "pip", "list", "--python", python, folder=tmp_path)
    assert "prepare" in run(python.with_name("agr-ray"), "--help", folder=tmp_path)
    assert "paper" in run(python.with_name("agr-ray"), "recipes", folder=tmp_path)
    said = run(python, "-c", PREDICT, model, "photo.jpg", "faces.png", folder=tmp_path)
    assert said.count("male") >= 1
    assert Image.open(tmp_path / "faces.png").size == Image.open(tmp_path / "photo.jpg").size

"""The commands and the Python of the README run as written, here on rendered faces and with short trainings.

`tests/system/test_local_cluster.py` runs the guide's commands that need a bucket and a cluster, and
`tests/unit/test_docs.py` parses all others.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pyarrow.dataset
import pytest
import torch
import torchvision

from agr_ray import cli
from agr_ray.data.rendered import render_chip
from agr_ray.vision.decode import encode_jpeg

pytestmark = pytest.mark.usefixtures("ray_cluster")

README = (Path(__file__).parents[2] / "README.md").read_text()
OPERATIONS = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", f"## first screen\n{README}", re.DOTALL | re.MULTILINE))
SMALL = {
    "RENDER__NUM_CHIPS": "80",
    "RENDER__NUM_PHOTOGRAPHS": "2",
    "PREPARE__NUM_WORKERS": "1",
    "TRAIN__EPOCHS": "1",
    "TRAIN__NUM_WORKERS": "1",
    "TRAIN__BATCH_SIZE": "16",
    "TUNE__TRIALS": "1",
    "SCORE__NUM_WORKERS": "1",
}
NUM_CHIPS = 60
UTKFACE_RACES = ("white", "black", "asian", "indian", "others")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder the current one, and the README's work small."""
    monkeypatch.chdir(tmp_path)
    for key, value in SMALL.items():
        monkeypatch.setenv(f"AGR_RAY_{key}", value)
    return tmp_path


def run_commands(section: str) -> list[str]:
    """Run a section's `agr-ray` commands in this process, and return them."""
    blocks = re.findall(r"^```\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("agr-ray ")]
    for line in lines:
        cli.main(shlex.split(line, comments=True)[1:])
    return lines


def run_python(section: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE):
        exec(block, {})


def write_utkface(folder: Path) -> None:
    """Write rendered chips under UTKFace's names."""
    folder.mkdir()
    for index in range(NUM_CHIPS):
        chip = render_chip(0, index)
        codes = f"{chip.age_years:.0f}_{int(chip.gender == 'female')}_{UTKFACE_RACES.index(chip.race)}"
        (folder / f"{codes}_20170116174525{index:03d}.jpg.chip.jpg").write_bytes(encode_jpeg(chip.image_rgb))


def test_the_demo_and_the_first_screen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run_commands("The demo, step by step")) == 6
    assert len(run_commands("first screen")) == 1
    capsys.readouterr()

    run_python("first screen")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "demo-out/faces/photographs/photograph-000000.jpg: ok"
    assert all(line.startswith("  box (") for line in shown[1:])
    run_python("I want to score a bucket every night")
    assert "faces" in capsys.readouterr().out

    assert (here / "demo-out" / "faces.png").is_file()


@pytest.mark.slow
def test_ones_own_photographs(here: Path) -> None:
    write_utkface(here / "UTKFACE")
    for folder in ("PHOTOGRAPHS", "FOLDER"):
        (here / folder).mkdir()
    labels = ["key,age,gender,race"]
    for index in range(NUM_CHIPS):
        chip = render_chip(0, index)
        picture = encode_jpeg(chip.image_rgb)
        (here / "FOLDER" / f"{index}.jpg").write_bytes(picture)
        labels.append(f"{index}.jpg,{chip.age_years},{chip.gender},{chip.race}")
    (here / "FOLDER" / "labels.csv").write_text("\n".join(labels))
    (here / "PHOTOGRAPHS" / "one.jpg").write_bytes(picture)
    fairface = torchvision.models.resnet34(num_classes=18).state_dict()
    torch.save(fairface, here / "res34_fair_align_multi_7_20190809.pt")

    assert len(run_commands("I have photographs and no model")) == 7
    assert pyarrow.dataset.dataset("scored/images").count_rows() == 2  # one run of each model
    assert len(run_commands("I have labelled photographs")) == 5
    run_python("I have labelled photographs")


@pytest.mark.slow
def test_a_comparison(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGR_RAY_COMPARE__PRESETS", '["paper", "lightweight"]')
    write_utkface(here / "UTKFACE")

    assert len(run_commands("I want to compare networks")) == 3
    assert pyarrow.dataset.dataset("comparison/comparison.parquet").count_rows() == 2


@pytest.mark.slow
def test_a_sweep(here: Path) -> None:
    write_utkface(here / "UTKFACE")

    assert len(run_commands("I want better settings")) == 3
    (more,) = re.findall(r"^agr-ray (tune .*--add) 12$", OPERATIONS, re.MULTILINE)
    cli.main([*shlex.split(more), "1"])
    assert pyarrow.dataset.dataset("sweeps/lite/trials.parquet").count_rows() == 2

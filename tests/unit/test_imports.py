"""What processes import: torch costs each of them seconds and half a gigabyte."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import agr_ray

ROOT = Path(agr_ray.__file__).parent
WITHOUT_TORCH = sorted(
    "agr_ray." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
    if re.search(r"\A\"\"\"[^\"]*\b(imports neither torch|does not import torch)", path.read_text(), re.IGNORECASE)
)


def test_modules_say_that_they_do_without_torch() -> None:
    assert WITHOUT_TORCH == [
        "agr_ray.data.crops",
        "agr_ray.learn.progress",
        "agr_ray.models.check_network",
        "agr_ray.models.checkpoint",
        "agr_ray.models.int8",
        "agr_ray.models.transform",
        "agr_ray.predict.columns",
        "agr_ray.runtime.crop_stream",
        "agr_ray.scoring.driver",
        "agr_ray.scoring.scorer",
    ]


def test_these_modules_do_not_load_torch() -> None:
    modules = [
        *WITHOUT_TORCH,
        "agr_ray.cli",
        "agr_ray.predict.crop_maker",
        "agr_ray.runtime.render",
        "agr_ray.runtime.score",
        "agr_ray.runtime.score_on_ray",
        "agr_ray.scoring.publish",
        "agr_ray.vision.decode",
    ]
    code = "import sys\n" + "".join(f"import {name}; print({name!r}, 'torch' in sys.modules)\n" for name in modules)

    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.splitlines() == [f"{name} False" for name in modules]


def test_the_default_network_mtcnn_and_the_training_loop_do_without_torchvision() -> None:
    code = (
        "import sys, agr_ray.learn.loop; from agr_ray.config import ModelConfig; from agr_ray.labels import UTKFACE; "
        "from agr_ray.models.network import MultiTaskNet; from agr_ray.vision.detect import make_detector; "
        "MultiTaskNet(ModelConfig(), UTKFACE); make_detector('mtcnn'); "
        "print({'torchvision', 'torch._dynamo'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"

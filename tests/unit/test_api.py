"""The Python API: lazy imports, and the arguments and results of `predict`."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_inference import network
from test_resolve import calibrate

import agr_ray
from agr_ray.config import GatesConfig, VisionConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.data.rendered import render_chip
from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint_network import save_checkpoint
from agr_ray.models.transform import Transform
from agr_ray.vision.decode import ImageError

STORED = Pipeline(vision=VisionConfig(detector="haar"))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, agr_ray; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    heavy = ["torch", "ray", "pyarrow", "numpy", "PIL", "cv2", "boto3", "pydantic"]
    assert [name for name in heavy if name in loaded] == []
    assert "agr_ray" in loaded


def test_every_public_name_is_there() -> None:
    assert [name for name in agr_ray.__all__ if not hasattr(agr_ray, name)] == []
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        agr_ray.lode  # noqa: B018


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "checkpoint"
    save_checkpoint(folder, network("resnet18"), Transform(64, 64), pipeline=STORED)
    calibrate(folder, STORED)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> agr_ray.FaceModel:
    return agr_ray.load(str(checkpoint))


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """Return a photograph of two faces, lying on its side with an EXIF orientation that sets it upright."""
    pixels = np.full((260, 520, 3), 128, np.uint8)
    pixels[30:230, 20:220] = face = np.asarray(render_chip(0, 16).image_rgb)
    pixels[30:230, 300:500] = face[:, ::-1]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    path = tmp_path / "two faces.png"
    Image.fromarray(np.rot90(pixels)).save(path, exif=exif)
    return path


def test_every_form_of_a_photograph_gives_the_same_faces(
    model: agr_ray.FaceModel, photograph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upright = np.rot90(np.asarray(Image.open(photograph)), -1)
    monkeypatch.chdir(photograph.parent)
    given: list[Any] = [
        photograph,
        str(photograph),
        photograph.name,
        photograph.as_uri(),
        photograph.read_bytes(),
        Image.open(photograph),
        Image.fromarray(upright),
        upright,
    ]

    photos = model.predict(given)

    assert [photo.source for photo in photos] == [
        *([str(photograph)] * 2),
        photograph.name,
        photograph.as_uri(),
        *[""] * 4,
    ]
    assert [(photo.status, photo.width_px, photo.height_px, photo.rotation_degrees) for photo in photos] == [
        ("ok", 520, 260, 0)
    ] * 8
    assert len(photos[0].faces) == 2
    assert photos[0].faces[0].box[0] < photos[0].faces[1].box[0]
    assert all(photo.faces == photos[0].faces for photo in photos)
    alone = model.predict(photograph)
    assert alone.faces == photos[0].faces
    assert alone.faces[0].age_interval is not None
    assert alone.faces[0].age_interval[0] <= alone.faces[0].age < alone.faces[0].age_interval[1]
    assert model.predict([]) == []


def test_a_bad_image_among_good_ones_has_a_status_or_raises(model: agr_ray.FaceModel, photograph: Path) -> None:
    torn = io.BytesIO(photograph.read_bytes()[:2000])
    given = [photograph, b"no image", photograph.parent / "nowhere.jpg", Image.open(torn), b"", photograph.parent]

    photos = model.predict([*given, photograph])

    assert [str(photo.status) for photo in photos] == [
        *("ok", "not_an_image", "missing", "unreadable", "not_an_image", "failed", "ok")
    ]
    assert [photo.error is None for photo in photos] == [True, *[False] * 5, True]
    assert [len(photo.faces) for photo in photos] == [2, 0, 0, 0, 0, 0, 2]
    with pytest.raises(ImageError, match=r"nowhere\.jpg: "):
        model.predict(photograph.parent / "nowhere.jpg", strict=True)
    with pytest.raises(ImageError, match="not one of JPEG"):
        photos[1].draw()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"RGB, \(height, width, 3\) uint8.* this one is \(4, 4\) uint8"),
        (np.zeros((4, 4, 3)), "this one is .* float64"),
        (np.zeros((0, 4, 3), np.uint8), "not empty"),
        (7, "a path, URI, bytes, PIL image or RGB array, or a list of these, not int"),
    ],
)
def test_a_file_that_is_not_an_image_is_an_error(model: agr_ray.FaceModel, given: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        model.predict(given)


def test_a_drawn_photograph_shows_its_faces(model: agr_ray.FaceModel, photograph: Path) -> None:
    photo = model.predict(photograph)

    drawn = np.asarray(photo.draw())

    assert drawn.shape == (260, 520, 3)
    changed = (drawn != np.rot90(np.asarray(Image.open(photograph)), -1)).any(axis=2)
    x0, y0, x1, _ = (int(each) for each in photo.faces[0].box)
    assert changed[y0, x0:x1].all()
    assert not changed[: y0 - 2].any()


def test_a_face_label_contains_the_known_attributes() -> None:
    row = {"box": [0, 0, 9, 9], "detector_score": 0.9, "sharpness": 5.0, "flags": []}
    told = row | {"age": 33.6, "age_low": 27.2, "age_high": 40.9, "gender": "female", "race": "black", "abstain": []}

    assert agr_ray.Face.from_row(told).label == "34 (27-41), female, black"
    unsure = agr_ray.Face.from_row(told | {"abstain": ["race"], "race_probs": [("white", 0.5), ("black", 0.5)]})
    assert unsure.label == "34 (27-41), female, race ?"
    assert (unsure.race, unsure.race_probs) == (None, {"white": 0.5, "black": 0.5})
    assert agr_ray.Face.from_row(row | {"age": 20.0}).label == "20"


def test_a_printed_photograph_has_a_line_for_each_face(model: agr_ray.FaceModel, photograph: Path) -> None:
    photo = model.predict(photograph)

    heading, *faces = str(photo).splitlines()

    assert heading == f"{photograph}: ok"
    assert [line.partition(": ")[2] for line in faces] == [face.label for face in photo.faces]
    assert "missing.jpg: missing: " in str(model.predict("missing.jpg"))


def test_gates_flag_faces(checkpoint: Path, photograph: Path) -> None:
    model = agr_ray.load(checkpoint, gates=GatesConfig(min_side_px=10_000))

    assert [face.flags for face in model.predict(photograph).faces] == [("small",)] * 2


def test_a_missing_checkpoint_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no checkpoint there \(a folder with meta\.json\)"):
        agr_ray.load(str(tmp_path))


def test_the_folder_of_a_run_names_its_best_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "run" / "best")
    with pytest.raises(ConfigError, match=r"meta\.json\); did you mean .*/run/best\?$"):
        agr_ray.load(tmp_path / "run")


@pytest.mark.parametrize("name", ["", "best"])
def test_an_unfinished_run_has_no_checkpoint_yet(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{}")

    with pytest.raises(ConfigError, match=r"because the training run .*/mine has not finished; the same agr-ray train"):
        agr_ray.load(tmp_path / "mine" / name)


def test_a_model_trained_on_rendered_faces_warns_once(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "rendered")
    meta = json.loads((tmp_path / "rendered" / "meta.json").read_text())
    (tmp_path / "rendered" / "meta.json").write_text(json.dumps(meta | {"data": {"source": "rendered"}}))

    with pytest.warns(
        UserWarning, match="was trained on rendered faces only, so its estimates for real people mean"
    ) as w:
        agr_ray.load(tmp_path / "rendered")

    assert len(w) == 1


def test_a_pickled_photo_does_not_contain_the_model(model: agr_ray.FaceModel, photograph: Path) -> None:
    body = pickle.dumps(model.predict(photograph))

    assert len(body) < 20_000
    assert pickle.loads(body).draw().size == (520, 260)

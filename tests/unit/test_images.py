"""The part of a detection that every job uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from agr_ray.config import PrepareConfig, VisionConfig
from agr_ray.data.manifest import content_hash
from agr_ray.data.rendered import render_chip
from agr_ray.predict import face_finder
from agr_ray.predict.crop_maker import CropMaker
from agr_ray.predict.face_finder import FaceFinder, Photograph, Reject, landmark_columns
from agr_ray.schema import CROPS, MANIFEST
from agr_ray.storage import Storage
from agr_ray.storage.parts import Parts
from agr_ray.vision.align import align
from agr_ray.vision.decode import DecodedImage, decode_image, encode_jpeg


def test_landmarks_and_pose_are_columns() -> None:
    landmarks = np.array([[30, 29], [70, 29], [49, 53], [32, 69], [67, 69]], np.float32)

    columns = landmark_columns(landmarks)

    assert columns["landmarks"] == [30, 29, 70, 29, 49, 53, 32, 69, 67, 69]
    assert all(np.isfinite(columns[name]) for name in ("yaw", "pitch", "roll"))


def test_a_detector_without_landmarks_leaves_their_columns_null() -> None:
    assert landmark_columns(np.full((5, 2), np.nan, np.float32)) == {}


DETECTORS = ("mtcnn", "haar")
WIDTH_PX, HEIGHT_PX = 560, 400


@pytest.fixture(scope="module")
def upright() -> np.ndarray:
    """Return a drawn face that is right of and above the middle of a grey photograph."""
    rgb = np.full((HEIGHT_PX, WIDTH_PX, 3), 128, np.uint8)
    rgb[20:220, 320:520] = np.asarray(render_chip(0, 16).image_rgb)
    return rgb


def turned_clockwise(rgb: np.ndarray, degrees: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(rgb, -degrees // 90))


def turned_points(points: np.ndarray, degrees: int) -> np.ndarray:
    """Return where points (n, 2) of the upright photograph lie once it is turned clockwise, a quarter at a time."""
    width, height = WIDTH_PX, HEIGHT_PX
    for _ in range(degrees // 90):
        points = np.stack([height - points[:, 1], points[:, 0]], axis=1)
        width, height = height, width
    return points


def read_one(tmp_path: Path, rgb: np.ndarray, **vision: Any) -> Photograph:
    path = tmp_path / "photograph.png"
    Image.fromarray(rgb).save(path)
    (photograph,) = FaceFinder(VisionConfig(**vision), 100).find([path.read_bytes()])
    assert isinstance(photograph, Photograph)
    return photograph


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("max_side_px", [1280, 400])
def test_a_sideways_face_is_found_in_its_place(
    tmp_path: Path, upright: np.ndarray, detector: str, degrees: int, max_side_px: int
) -> None:
    expected = read_one(tmp_path, upright, detector=detector)
    assert len(expected.faces) == 1

    photograph = read_one(
        tmp_path, turned_clockwise(upright, degrees), detector=detector, try_rotations=True, max_side_px=max_side_px
    )

    assert (photograph.rotation_degrees + degrees) % 360 == 0
    assert len(photograph.faces) == 1
    corners = turned_points(expected.faces.boxes_xyxy.reshape(2, 2), degrees)
    box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
    assert photograph.original_faces.boxes_xyxy[0] == pytest.approx(box, abs=24)
    if detector == "mtcnn":
        landmarks = turned_points(expected.faces.landmarks[0], degrees)
        assert photograph.original_faces.landmarks[0] == pytest.approx(landmarks, abs=4)
    rgb, faces = photograph.turned_rgb, photograph.faces
    crop = align(rgb, faces.boxes_xyxy[0], faces.landmarks[0], 100).astype(float)
    upright_crop = align(upright, expected.faces.boxes_xyxy[0], expected.faces.landmarks[0], 100).astype(float)
    errors = [np.abs(np.rot90(crop, turns) - upright_crop).mean() for turns in range(4)]
    assert int(np.argmin(errors)) == 0


def test_a_photograph_is_rotated_only_on_request(tmp_path: Path, upright: np.ndarray) -> None:
    photograph = read_one(tmp_path, turned_clockwise(upright, 180), detector="haar")

    assert (len(photograph.faces), photograph.rotation_degrees) == (0, 0)


def test_without_a_face_in_any_rotation_a_photograph_is_not_rotated(tmp_path: Path) -> None:
    photograph = read_one(tmp_path, np.full((60, 90, 3), 128, np.uint8), try_rotations=True)

    assert (len(photograph.faces), photograph.rotation_degrees) == (0, 0)
    assert photograph.turned_rgb.shape == (60, 90, 3)


@pytest.mark.parametrize(("small_faces", "num_faces"), [(False, 0), (True, 1)])
def test_small_faces_finds_small_faces_in_large_photographs(tmp_path: Path, small_faces: bool, num_faces: int) -> None:
    rgb = np.full((1500, 6000, 3), 128, np.uint8)
    rgb[900:1000, 2200:2300] = cv2.resize(np.asarray(render_chip(0, 16).image_rgb), (100, 100))

    photograph = read_one(tmp_path, rgb, small_faces=small_faces)

    assert len(photograph.faces) == num_faces
    for x0, y0, x1, y1 in photograph.original_faces.boxes_xyxy:
        assert 2170 < x0 < x1 < 2330
        assert 870 < y0 < y1 < 1030


def test_switches_without_an_effect_are_rejected() -> None:
    with pytest.raises(ValueError, match="max_side_px"):
        VisionConfig(small_faces=True, max_side_px=2000)
    with pytest.raises(ValueError, match="detector = none"):
        VisionConfig(detector="none", try_rotations=True)


@pytest.mark.parametrize("degrees", [0, 180])
def test_the_crop_row_says_how_the_photograph_was_turned(tmp_path: Path, upright: np.ndarray, degrees: int) -> None:
    path = tmp_path / "photograph.png"
    Image.fromarray(turned_clockwise(upright, degrees)).save(path)
    row = dict.fromkeys(MANIFEST.names) | {"image_id": "0", "uri": str(path), "key": "0", "source": "", "status": "ok"}
    parts = Parts(Storage(), str(tmp_path))
    maker = CropMaker(parts, VisionConfig(try_rotations=True), PrepareConfig())

    crops = maker.crop_rows([row, row | {"uri": str(tmp_path / "gone.png")}], parts.begin(0))
    crops = pa.Table.from_pylist(crops, schema=CROPS).to_pylist()

    assert [row["status"] for row in crops] == ["ok", "missing"]
    assert [row["rotation_degrees"] for row in crops] == [(360 - degrees) % 360, None]
    corners = turned_points(np.array([[320.0, 20.0], [520.0, 220.0]]), degrees)
    box = np.array(crops[0]["box"]).reshape(2, 2)
    assert box.mean(axis=0) == pytest.approx(corners.mean(axis=0), abs=40)


def test_few_images_are_decoded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def decode(body: bytes, **kwargs: Any) -> DecodedImage:
        decoded.append(len(decoded))
        return decode_image(body, **kwargs)

    monkeypatch.setattr(face_finder, "decode_image", decode)
    monkeypatch.setattr(face_finder, "_MAX_DECODED_PIXELS", 2 * 24 * 24)
    bodies = [chip_bytes(), b"no image", *[chip_bytes()] * 3]
    seen = FaceFinder(VisionConfig(detector="none"), 16).find(bodies)

    num_decoded = []
    kinds = []
    for each in seen:
        num_decoded.append(len(decoded))
        kinds.append(type(each))

    assert kinds == [Photograph, Reject, Photograph, Photograph, Photograph]
    assert num_decoded == [4, 4, 4, 5, 5]  # one is decoded to see that it is too many


def test_an_image_is_hashed_where_it_is_read_and_keeps_its_labels(tmp_path: Path) -> None:
    bodies = {"ok": chip_bytes(), "text": b"no image", "huge": bytes(2**20 + 1), "changed": chip_bytes()}
    for name, body in bodies.items():
        (tmp_path / name).write_bytes(body)
    etags = {"changed": "another"}
    rows = [
        dict.fromkeys(MANIFEST.names)
        | {"image_id": name, "uri": str(tmp_path / name), "etag": etags.get(name), "age": 30.0, "status": status}
        for name, status in [*dict.fromkeys(bodies, "ok").items(), ("gone", "ok"), ("unlabelled", "bad_label")]
    ]
    parts = Parts(Storage(), str(tmp_path))
    maker = CropMaker(parts, VisionConfig(detector="none", max_mib=1), PrepareConfig())

    made = maker.crop_rows(rows, parts.begin(0))

    assert [(row["image_id"], row["status"], row["content_hash"]) for row in made] == [
        ("ok", "fallback", content_hash(bodies["ok"])),
        ("text", "not_an_image", content_hash(bodies["text"])),
        ("huge", "too_large", None),
        ("changed", "changed", None),
        ("gone", "missing", None),
        ("unlabelled", "bad_label", None),
    ]
    assert [row["age"] for row in made] == [30.0] * 6


def chip_bytes() -> bytes:
    return encode_jpeg(np.full((24, 24, 3), 90, np.uint8))

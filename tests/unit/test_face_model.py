"""Evaluation and scoring predict the same, whatever the batch; and a checkpoint used from Python."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from test_inference import network
from test_resolve import calibrate
from this_process import scoring_of

from agr_ray.config import EvaluateConfig, PredictConfig, ScoreConfig, VisionConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.data.crops import decoded_crops, read_pose
from agr_ray.data.rendered import render_chip
from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint import META
from agr_ray.models.checkpoint_files import portable_checkpoint
from agr_ray.models.checkpoint_network import save_checkpoint
from agr_ray.models.transform import Transform
from agr_ray.predict import attributes
from agr_ray.predict.attributes import AttributePredictor
from agr_ray.predict.crop_predictor import CropPredictor
from agr_ray.predict.face_finder import FaceFinder, Reject
from agr_ray.predict.face_model import FaceModel
from agr_ray.schema import CROPS, IMAGES
from agr_ray.scoring.planning import plan
from agr_ray.scoring.scorer import Found, PartScorer, RowPredictor
from agr_ray.storage import Storage
from agr_ray.vision.align import stored_side_px
from agr_ray.vision.decode import encode_jpeg

SIDE_PX = 64
STORED = Pipeline(vision=VisionConfig(detector="haar"), predict=PredictConfig(flip_average=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a ResNet18 with head pose, whose kernels oneDNN chooses by the batch size."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    own = network("resnet18", head_pose=True, age_head="distribution")
    save_checkpoint(folder, own, Transform(SIDE_PX, SIDE_PX), pipeline=STORED)
    return folder


@pytest.mark.parametrize("num_together", [1, 2, 7, 19])
def test_evaluation_and_scoring_predict_the_same_to_the_last_bit(
    model: Path, tmp_path: Path, num_together: int
) -> None:
    side = stored_side_px(SIDE_PX)
    pixels = np.random.default_rng(0).integers(0, 256, (19, side, side, 3), np.uint8)
    # The last face has no landmarks.
    poses = [{"yaw": 3.0 * n, "pitch": 2.0 * n - 9, "roll": -1.0 * n} for n in range(18)] + [{}]
    rows = [
        {"image_id": str(index), "uri": "u", "key": "k", "source": "s", "split": "test", "status": "ok"}
        | {"crop": encode_jpeg(crop)}
        | poses[index]
        for index, crop in enumerate(pixels)
    ]
    table = pa.Table.from_pylist(rows, schema=CROPS)
    pq.write_table(table, tmp_path / "part-0.parquet")
    config = EvaluateConfig(split="test", batch_size=13)
    unposed = AttributePredictor.load(model, STORED.predict).predict(decoded_crops(table, SIDE_PX))["gender"]
    evaluated = CropPredictor(Storage(), portable_checkpoint(model), SIDE_PX, config, STORED.predict, {})
    measured = pa.concat_tables(evaluated(pa.table({"part": [str(tmp_path / "part-0.parquet")]})))

    crops = decoded_crops(table, SIDE_PX)
    predictor = RowPredictor(scoring_of(model, predict=STORED.predict))
    faces: list[dict[str, Any]] = []
    for start in range(0, len(crops), num_together):
        chunk = crops[start : start + num_together]
        row = {"image_id": "i", "uri": "u", "status": "ok", "faces": []}
        row["faces"] = [pose | {"flags": []} for pose in poses[start : start + num_together]]
        images = pa.Table.from_pylist([row], schema=IMAGES)
        faces += predictor.fill(Found(np.arange(1), images, chunk)).to_pylist()[0]["faces"]

    assert len({row["p_male"] for row in measured.to_pylist()}) == 19
    assert (np.asarray(measured["p_male"]) == unposed).tolist() == [False] * 18 + [True]
    assert measured["precision"].to_pylist() == ["float32"] * 19
    for name, other in (("age_pred", "age"), ("p_male", "p_male"), ("gender_pred", "gender"), ("race_pred", "race")):
        assert measured[name].to_pylist() == [face[other] for face in faces]
    assert measured["race_probs"].to_pylist() == [face["race_probs"] for face in faces]
    # Scoring does not write the spread, but the intervals depend on it.
    pose, scorer = read_pose(table), AttributePredictor.load(model, STORED.predict)
    starts = range(0, len(crops), num_together)
    together = [scorer.predict(*(each[i : i + num_together] for each in (crops, pose)))["age_spread"] for i in starts]
    assert measured["age_spread"].to_pylist() == np.concatenate(together).tolist()
    assert len({*measured["age_spread"].to_pylist()}) == 19


def test_every_forward_pass_has_the_same_number_of_crops(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    predict = attributes.predict
    monkeypatch.setattr(attributes, "predict", lambda *args: sizes.append(len(args[1])) or predict(*args))
    predictor = AttributePredictor.load(model, PredictConfig())
    side = stored_side_px(SIDE_PX)

    lengths = [len(predictor.predict(np.zeros((n, side, side, 3), np.uint8))["age"]) for n in (0, 1, 8, 9)]

    assert lengths == [0, 1, 8, 9]
    assert sizes == [8] * 5


@pytest.fixture
def photographs(tmp_path: Path) -> dict[str, bytes]:
    """Return the bodies of a photograph of two faces, one of none, one of one, and a text."""
    two = np.full((260, 520, 3), 128, np.uint8)
    two[30:230, 20:220] = face = np.asarray(render_chip(0, 16).image_rgb)
    two[30:230, 300:500] = face[:, ::-1]
    bodies = {
        "a.jpg": encode_jpeg(two),
        "b.jpg": encode_jpeg(np.full((80, 80, 3), 90, np.uint8)),
        "c.jpg": encode_jpeg(render_chip(0, 16).image_rgb),
        "d.jpg": b"no image",
    }
    (tmp_path / "in").mkdir()
    for name, body in bodies.items():
        (tmp_path / "in" / name).write_bytes(body)
    return bodies


def test_a_face_model_gives_the_faces_that_a_scoring_run_writes(
    model: Path, tmp_path: Path, photographs: dict[str, bytes]
) -> None:
    face_model = FaceModel.load(str(model))

    photos = face_model.predict([*photographs.values()])

    run = scoring_of(model, tmp_path / "work", vision=STORED.vision, predict=STORED.predict)
    plan(run.storage, ScoreConfig(input=str(tmp_path / "in")), run.parts.manifest)
    list(PartScorer(run)({"part": np.array([0])}))
    rows = {Path(row["uri"]).name: row for row in run.storage.read_table(run.parts.uri(0)).to_pylist()}
    assert face_model.resolved.pipeline == STORED
    assert [len(photo.faces) for photo in photos] == [2, 0, 1, 0]
    for name, photo in zip(photographs, photos, strict=True):
        row = rows[name]
        assert (photo.status, photo.error) == (row["status"], row["error"])
        assert (photo.width_px, photo.height_px) == (row["width_px"], row["height_px"])
        for face, written in zip(photo.faces, row["faces"] or [], strict=True):
            assert face.box == pytest.approx(written["box"])
            assert (face.age, face.p_male) == (written["age"], written["p_male"])
            assert (face.gender, face.race) == (written["gender"], written["race"])
            assert face.race_probs == dict(written["race_probs"])
            assert face.detector_score == pytest.approx(written["detector_score"])
            assert (face.landmarks, face.yaw, face.age_interval, face.flags) == (None, None, None, ())


def test_overrides_are_rejected_or_allowed_as_in_scoring(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    save_checkpoint(own, network("resnet18"), Transform(SIDE_PX, SIDE_PX), pipeline=STORED)
    calibrate(own, STORED)
    rotated = Pipeline(vision=VisionConfig(try_rotations=True))

    with pytest.raises(ConfigError, match=r"^checkpoint: vision\.try_rotations = True, but .* calibrated with False"):
        FaceModel.load(str(own), overrides=rotated)
    allowed = FaceModel.load(str(own), overrides=rotated, allow_uncalibrated=True).resolved
    assert (allowed.calibration, allowed.pipeline.vision.detector) == (None, "haar")
    assert allowed.pipeline.vision.try_rotations
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FaceModel.load(str(own)).resolved.calibration is not None
    assert json.loads((own / META).read_text())["vision"]["detector"] == "haar"


def test_a_calibration_of_another_precision_triggers_a_warning(tmp_path: Path) -> None:
    own = tmp_path / "own"
    save_checkpoint(own, network("resnet18"), Transform(SIDE_PX, SIDE_PX), pipeline=STORED)
    calibrate(own, STORED, precisions=("bfloat16",))

    with pytest.warns(UserWarning, match="own: predicted in float32, but calibrated on predictions in bfloat16"):
        FaceModel.load(str(own))


@pytest.mark.parametrize("detector", ["mtcnn", "mtcnn_int8"])
def test_the_minimum_score_holds_for_either_cascade(detector: str) -> None:
    body = encode_jpeg(np.asarray(render_chip(0, 0).image_rgb))

    def num_faces(min_score: float) -> int:
        finder = FaceFinder(VisionConfig(detector=detector, min_score=min_score), 112)
        (photograph,) = finder.find([body])
        assert not isinstance(photograph, Reject)
        return len(photograph.faces)

    assert (num_faces(0.5), num_faces(1.0)) == (1, 0)

"""Networks in int8: `agr-ray quantize`, and a checkpoint that has one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray
from prepared_sets import SIDE_PX, prepared_set
from pydantic import ValidationError

from agr_ray import cli
from agr_ray.config import ModelConfig, PredictConfig, TrainJob
from agr_ray.config.pipeline import Pipeline
from agr_ray.errors import ConfigError
from agr_ray.labels import UTKFACE
from agr_ray.models.checkpoint import CheckpointError, model_digest, read_checkpoint
from agr_ray.models.checkpoint_files import portable_checkpoint, publish_checkpoint, unpacked_checkpoint
from agr_ray.models.checkpoint_network import load_train_state, save_checkpoint
from agr_ray.models.int8 import GRAPH_FILE, WEIGHTS_FILE
from agr_ray.models.int8_network import Int8Net, quantize
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.transform import Transform
from agr_ray.predict.attributes import AttributePredictor, int8_batch_size
from agr_ray.predict.face_model import FaceModel
from agr_ray.predict.resolve import resolve
from agr_ray.storage import Storage
from agr_ray.vision.align import stored_side_px
from agr_ray.vision.decode import encode_jpeg

INT8 = PredictConfig(precision="int8")
CROP_PX = stored_side_px(SIDE_PX)


def crops(num: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return smooth random images: int8 ranges are measured on such."""
    coarse = np.random.default_rng(seed).integers(0, 256, (num, 4, 4, 3), np.uint8)
    factor = -(-CROP_PX // 4)
    return coarse.repeat(factor, axis=1).repeat(factor, axis=2)[:, :CROP_PX, :CROP_PX]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an untrained checkpoint, `float`, and a prepared set of 40 crops, `set`."""
    root = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    model = MultiTaskNet(ModelConfig(preset="plain_cnn", image_size=SIDE_PX), UTKFACE).eval()
    with torch.no_grad():  # so that predictions differ between images
        for parameter in model.heads.parameters():
            parameter.mul_(4.0)
    codes = torch.tensor([1, 2, 3])
    save_checkpoint(root / "float", model, Transform(SIDE_PX, SIDE_PX), train_images=codes, metrics={"age_mae": 5.0})
    prepared_set(root / "set")
    part = root / "set" / "crops" / "part-0.parquet"
    row = pq.read_table(part).to_pylist()[0]
    rows = [
        {**row, "image_id": f"{i}.jpg", "split": "train" if i < 25 else "val", "crop": encode_jpeg(crop)}
        for i, crop in enumerate(crops(40))
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(part)), part)
    record = json.loads((root / "set" / "prepare.json").read_text())
    record |= {"counts": {"ok": 40}, "splits": {"train": 25, "val": 15, "test": 0}}
    (root / "set" / "prepare.json").write_text(json.dumps(record))
    return root


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Path:
    """Return the checkpoint that `agr-ray quantize` makes."""
    cli.main(["quantize", "--checkpoint", str(folder / "float"), "--data", str(folder / "set")])
    return folder / "float-int8"


def test_predictions_are_nearly_those_of_float32(folder: Path, quantized: Path) -> None:
    images = crops(21, seed=1)
    exact = AttributePredictor.load(folder / "float", PredictConfig()).predict(images)
    rough = AttributePredictor.load(quantized, INT8).predict(images)
    assert rough.keys() == exact.keys()
    spread = np.ptp(exact["age"])
    difference = np.abs(rough["age"] - exact["age"])
    assert 0.0 < difference.max() < 0.1 * spread  # not the float network, but like it
    assert np.abs(rough["gender"] - exact["gender"]).max() < 0.1
    assert np.abs(rough["race"] - exact["race"]).max() < 0.1


@pytest.mark.parametrize(("size", "side_px"), [(4, (512, 225, 224, 159)), (8, (158, 128, 113)), (16, (112, 88, 32))])
def test_batches_of_small_images_are_larger(size: int, side_px: tuple[int, ...]) -> None:
    assert [int8_batch_size(each) for each in side_px] == [size] * len(side_px)


def test_a_face_has_the_same_prediction_whatever_else_is_in_its_batch(quantized: Path) -> None:
    predictor, images = AttributePredictor.load(quantized, INT8), crops(11)
    together = predictor.predict(images)
    alone = [predictor.predict(image[None]) for image in images]
    for task, values in together.items():
        np.testing.assert_array_equal(values, np.concatenate([each[task] for each in alone]))
    assert predictor.predict(images[:0])["age"].shape == (0,)


def test_the_new_checkpoint_is_another_model_with_the_same_history(folder: Path, quantized: Path) -> None:
    before, after = read_checkpoint(folder / "float"), read_checkpoint(quantized)
    assert after.pipeline.predict.precision == "int8"
    assert before.meta["metrics"]
    assert not after.meta["metrics"]  # they are of the network before
    assert load_train_state(quantized)["train_images"].tolist() == [1, 2, 3]
    assert after.digest != before.digest
    with unpacked_checkpoint(portable_checkpoint(quantized)) as directory:
        assert model_digest(directory) == after.digest
    weights = (quantized / WEIGHTS_FILE).read_bytes()
    try:
        (quantized / WEIGHTS_FILE).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        assert model_digest(quantized) != after.digest
    finally:
        (quantized / WEIGHTS_FILE).write_bytes(weights)


def test_workers_get_the_weights_of_the_heads_only(folder: Path, quantized: Path) -> None:
    files = portable_checkpoint(quantized, is_int8=True)
    assert len(files["weights.safetensors"]) < len(portable_checkpoint(quantized)["weights.safetensors"]) / 10
    images = crops(11)
    with unpacked_checkpoint(files) as directory:
        sent = AttributePredictor.load(directory, INT8).predict(images)
        with pytest.raises(CheckpointError, match=r"weights\.safetensors: "):
            AttributePredictor.load(directory, PredictConfig(precision="float32"))
    for task, values in AttributePredictor.load(quantized, INT8).predict(images).items():
        np.testing.assert_array_equal(sent[task], values)


def test_missing_weights_of_the_heads_are_named(quantized: Path) -> None:
    files = portable_checkpoint(quantized, is_int8=True)
    weights = safetensors.numpy.load(files["weights.safetensors"])
    name = next(iter(weights))
    files["weights.safetensors"] = safetensors.numpy.save({key: weights[key] for key in weights if key != name})
    problem = rf"weights\.safetensors: {re.escape(name)}: expected shape .*, found nothing"
    with unpacked_checkpoint(files) as directory, pytest.raises(CheckpointError, match=problem):
        AttributePredictor.load(directory, INT8)


def test_publishing_the_same_model_keeps_its_calibration(quantized: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    publish_checkpoint(Storage(), quantized, out)
    Path(out, "calibration.json").write_text("{}")
    publish_checkpoint(Storage(), quantized, out)
    assert Path(out, "calibration.json").exists()
    assert read_checkpoint(Path(out)).int8 is not None


def test_the_command_prints_differences_speed_and_the_next_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    cli.main(["quantize", "--checkpoint", str(folder / "float"), "--data", str(folder / "set"), "--out", out])
    printed = capsys.readouterr().out
    assert "16 training images" in printed  # of 25: one batch
    assert "int8 against float32 on 15 validation images" in printed
    assert "crops/s on one CPU" in printed
    assert f"evaluate --checkpoint {out} --data {folder / 'set'} --split val --calibrate" in printed


def test_photographs_and_predict_use_it(quantized: Path) -> None:
    model = FaceModel.load(quantized)
    assert model.predictor.precision == "int8"
    as_float = FaceModel.load(quantized, overrides=Pipeline(predict=PredictConfig(precision="float32")))
    assert as_float.predictor.precision == "float32"


def test_openvino_reports_nothing_to_its_makers(quantized: Path) -> None:
    assert sys.modules["openvino_telemetry"] is None


def resolved(directory: Path, precision: str, **options: bool) -> None:
    given = Pipeline(predict=PredictConfig(precision=precision))
    resolve(read_checkpoint(directory), given, key="score.checkpoint", **options)


def test_int8_is_rejected_where_it_is_not_possible(
    folder: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^score.checkpoint: predict.precision int8: .* no int8 network; agr-ray qu"):
        resolved(folder / "float", "int8")
    with pytest.raises(ConfigError, match=r"^score.checkpoint: predict.precision int8 is for CPUs; leave out use_gpu"):
        resolved(quantized, "int8", on_gpu=True)
    resolved(quantized, "float32", on_gpu=True)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"needs openvino, not installed on .*; .*pip install '\.\[openvino\]'"):
            resolved(quantized, "int8")
        with pytest.raises(SystemExit):
            cli.main(["quantize", "--checkpoint", str(folder / "float"), "--data", str(folder / "set")])
    with pytest.raises(ValidationError, match=r"predict.precision int8: agr-ray quantize makes an"):
        TrainJob(predict=INT8)


@pytest.mark.parametrize("name", [GRAPH_FILE, WEIGHTS_FILE])
def test_a_damaged_file_is_named(quantized: Path, tmp_path: Path, name: str) -> None:
    publish_checkpoint(Storage(), quantized, str(tmp_path / "copy"))
    (tmp_path / "copy" / name).write_bytes(b"<net")
    with pytest.raises(ConfigError, match=rf"^score.checkpoint: {GRAPH_FILE} or {WEIGHTS_FILE} is damaged: \S"):
        resolved(tmp_path / "copy", "int8")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--checkpoint", "nowhere", "checkpoint nowhere: there is no checkpoint there"),
        ("--data", "nowhere", "data .*nowhere: not a prepared set"),
        ("--images", "4", "images.*greater than or equal to 16"),
        ("--out", "float", "out float: exists; give a new folder or prefix"),
        ("--checkpoint", "float-int8", "checkpoint float-int8: has an int8 network already"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path,
    quantized: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    options = {"--checkpoint": "float", "--data": "set", "--out": "new"} | {option: value}
    with pytest.raises(SystemExit):
        cli.main(["quantize", *(word for pair in options.items() for word in pair)])
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(message, error), error


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "lightweight", "cbam", "sa_net", "mhsa", "multi_scale", "vit", "swin"])
def test_every_kind_of_network_can_be_quantized(preset: str) -> None:
    torch.manual_seed(0)
    side = 64 if preset not in ("vit", "swin", "mhsa") else 224  # OpenVINO 2026.4 crashes with mhsa at 64 px
    model = MultiTaskNet(ModelConfig(preset=preset, image_size=side), UTKFACE).eval()
    batches = [np.random.default_rng(i).normal(size=(2, 3, side, side)).astype(np.float32) for i in range(3)]
    net = Int8Net(model, quantize(model, batches))
    with torch.inference_mode():
        exact, rough = model(torch.from_numpy(batches[0])), net(torch.from_numpy(batches[0]))
    assert net.heads_by_task.keys() == model.heads_by_task.keys()
    for task, head in model.heads_by_task.items():
        a, b = head.read_out(exact[task]), head.read_out(rough[task])
        assert torch.isfinite(b).all()
        assert (a - b).abs().max() <= 0.25 * (1.0 + a.abs().max()), task

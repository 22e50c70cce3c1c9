"""The checkpoint directory: saving, loading, and the errors of damaged ones."""

from __future__ import annotations

import errno
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agr_ray.config import ModelConfig, PredictConfig, VisionConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.errors import ConfigError
from agr_ray.labels import UTKFACE
from agr_ray.models import checkpoint_files, checkpoint_network
from agr_ray.models.card import model_card
from agr_ray.models.checkpoint import CARD, META, TRAIN_STATE, WEIGHTS, CheckpointError, model_digest, read_checkpoint
from agr_ray.models.checkpoint_files import local_checkpoint
from agr_ray.models.checkpoint_network import (
    content_codes,
    given_network,
    load_network,
    load_train_state,
    save_checkpoint,
)
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.transform import Transform
from agr_ray.storage import Storage

CONFIG = ModelConfig(preset="lightweight", image_size=32, age_head="distribution", bn_momentum=None)
# printf a | sha256sum: ca978112ca1bbdca...
A, B = (hashlib.sha256(body).hexdigest() for body in (b"a", b"b"))
TRANSFORM = Transform(image_size=32, crop_side_px=40)
PIPELINE = Pipeline(vision=VisionConfig(detector="haar", max_side_px=900), predict=PredictConfig(flip_average=True))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(
        tmp_path / "checkpoint",
        MultiTaskNet(CONFIG, UTKFACE),
        TRANSFORM,
        pipeline=PIPELINE,
        train_state={"epoch": 3, "history": [{"lr": 0.1}], "seed": torch.tensor(7)},
        train_images=content_codes([A, B]),
        data={"split_manifest_sha256": "ab"},
        git_commit="c0ffee",
        created="2026-01-02T03:04:05+00:00",
    )
    return tmp_path / "checkpoint"


def edit_meta(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    meta = json.loads((directory / META).read_text())
    change(meta)
    (directory / META).write_text(json.dumps(meta))


def test_loaded_network_predicts_the_same(saved: Path) -> None:
    torch.manual_seed(0)
    model = MultiTaskNet(CONFIG, UTKFACE).eval()
    checkpoint = read_checkpoint(saved)
    images = torch.randn(2, 3, 32, 32)
    assert checkpoint.transform == TRANSFORM
    assert checkpoint.config == CONFIG
    loaded = load_network(checkpoint)
    assert not loaded.training
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)


def test_meta_records_its_origin(saved: Path) -> None:
    meta = read_checkpoint(saved).meta
    assert meta["git_commit"] == "c0ffee"
    assert meta["data"] == {"split_manifest_sha256": "ab"}
    assert meta["label_space"]["genders"] == ["female", "male"]
    assert set(meta["versions"]) == {"agr_ray", "torch"}


def test_vision_and_predict_settings_are_restored(saved: Path) -> None:
    checkpoint = read_checkpoint(saved)
    assert checkpoint.pipeline == PIPELINE
    assert sorted(checkpoint.meta["vision"]) == sorted(VisionConfig.model_fields)
    assert checkpoint.meta["predict"] == {"flip_average": True, "precision": "float32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta["vision"].pop("min_score"), r"vision: keys do not match: missing min_score$"),
        (lambda meta: meta["predict"].update(a=1), r"predict: keys do not match: unknown a$"),
        (lambda meta: meta["predict"].update(precision="int4"), r"predict\.precision: .*found 'int4'"),
        (lambda meta: meta["model"].pop("neck"), r"model: keys do not match: missing neck$"),
        (lambda meta: meta["model"].update(neck_size=1), r"model: keys do not match: unknown neck_size$"),
        (lambda meta: meta["model"].update(attention="se"), r"model\.attention: there is no attention block 'se'"),
        (lambda meta: meta["label_space"].update(races=[]), r"model\.tasks: the label space utkface has no races"),
        (lambda meta: meta["transform"].pop("mean"), r"transform: expected the keys"),
        (
            lambda meta: meta["transform"].update(window=[-0.2, 0.0, 1.0]),
            r"transform: window \[-0\.2, 0\.0, 1\.0\] exceeds the stored crop of 48 pixels",
        ),
        (
            lambda meta: meta["transform"].update(window=[0, 1]),
            r"transform: expected three numbers for window, found 2",
        ),
        (lambda meta: meta.pop("predict"), r"top level: keys do not match: missing predict$"),
        (lambda meta: meta.update(a=1, b=2), r"top level: keys do not match: unknown a, b$"),
        (lambda meta: meta.update(data=None), r"data: expected a table, found None$"),
    ],
)
def test_missing_unknown_and_invalid_keys_of_meta_are_named(
    saved: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_meta(saved, change)
    with pytest.raises(CheckpointError, match=rf"checkpoint/meta\.json: {message}"):
        read_checkpoint(saved)


def test_a_metric_that_is_nan_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_checkpoint(tmp_path / "new", MultiTaskNet(CONFIG, UTKFACE), TRANSFORM, metrics={"val": {"n": math.nan}})
    assert not (tmp_path / "new").exists()


def test_the_model_card_matches_meta(saved: Path) -> None:
    assert (saved / CARD).read_text(encoding="utf-8") == model_card(read_checkpoint(saved).meta)
    assert "c0ffee" in (saved / CARD).read_text(encoding="utf-8")


def test_train_state_comes_back_with_the_images(saved: Path) -> None:
    state = load_train_state(saved)
    assert state["epoch"] == 3
    assert state["history"] == [{"lr": 0.1}]
    assert state["seed"] == 7
    assert torch.equal(state["train_images"], content_codes([B, A, B]))


def test_content_codes_are_64_bits_of_the_hash() -> None:
    assert content_codes([A]).tolist() == [0xCA978112CA1BBDCA - 2**64]
    assert content_codes([]).dtype == torch.int64


def test_digest_follows_weights_and_transform_only(saved: Path, tmp_path: Path) -> None:
    model = load_network(read_checkpoint(saved))
    digest = model_digest(saved)
    model.config = CONFIG.model_copy(update={"pretrained": "imagenet"})
    save_checkpoint(tmp_path / "same", model, TRANSFORM, git_commit="another")
    save_checkpoint(tmp_path / "transform", model, Transform(image_size=32, crop_side_px=44))
    with torch.no_grad():
        model.heads["race"].layer.bias[0] += 1.0
    save_checkpoint(tmp_path / "weights", model, TRANSFORM)
    assert model_digest(tmp_path / "same") == digest
    assert len({digest, model_digest(tmp_path / "transform"), model_digest(tmp_path / "weights")}) == 3


@pytest.mark.parametrize("name", [META, WEIGHTS])
def test_missing_file_is_named_in_the_error(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: expected .* no such file"):
        load_network(read_checkpoint(saved))


@pytest.mark.parametrize("name", [META, WEIGHTS])
def test_damaged_file_is_named_in_the_error(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"\x00\xff")
    with pytest.raises(CheckpointError, match=f"{name}: expected"):
        load_network(read_checkpoint(saved))


@pytest.mark.parametrize("name", [META, WEIGHTS])
def test_unreadable_file_is_named_in_the_error(saved: Path, name: str) -> None:
    (saved / name).unlink()
    (saved / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: expected"):
        load_network(read_checkpoint(saved))


def test_a_checkpoint_that_cannot_be_copied_gives_one_line(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(_: Storage, uri: str, *__: str, **___: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", f"{uri}/{WEIGHTS}")

    monkeypatch.setattr(Storage, "download_tree", deny)
    monkeypatch.setattr(checkpoint_files, "_REPLACED_WITHIN_S", 0.0)
    with (
        pytest.raises(ConfigError, match=r"^score\.checkpoint .*: can't be copied .*Permission denied: .*weights"),
        local_checkpoint(Storage(), str(saved), "score.checkpoint"),
    ):
        pytest.fail("copied")


def test_missing_or_damaged_train_state_is_named_in_the_error(saved: Path) -> None:
    for damaged in (b"\x00\xff", b"hello world"):  # the latter is a KeyError of the unpickler
        (saved / TRAIN_STATE).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=TRAIN_STATE):
            load_train_state(saved)
    (saved / TRAIN_STATE).unlink()
    with pytest.raises(CheckpointError, match=f"{TRAIN_STATE}: expected .* no such file"):
        load_train_state(saved)


def test_another_format_is_rejected(saved: Path) -> None:
    edit_meta(saved, lambda meta: meta.update(format_version=1))
    with pytest.raises(CheckpointError, match="expected format_version 5, found 1; train it again"):
        read_checkpoint(saved)


def test_another_order_of_labels_is_rejected(saved: Path) -> None:
    edit_meta(saved, lambda meta: meta["label_space"].update(genders=["male", "female"]))
    with pytest.raises(CheckpointError, match="label_space: genders must be female and male, in this order, not "):
        read_checkpoint(saved)


def cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1])


def reshape(weights: Path) -> None:
    save_file(load_file(weights) | {"heads.race.layer.bias": torch.zeros(7)}, weights)


def take_one(weights: Path) -> None:
    save_file({name: each for name, each in load_file(weights).items() if name != "heads.race.layer.bias"}, weights)


def add_one(weights: Path) -> None:
    save_file(load_file(weights) | {"heads.height.bias": torch.zeros(2)}, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "expected safetensors, found "),
        (reshape, r"heads\.race\.layer\.bias: expected shape \[5\], found \[7\]$"),
        (take_one, r"heads\.race\.layer\.bias: expected shape \[5\], found nothing$"),
        (add_one, r"heads\.height\.bias: expected no such tensor, found shape \[2\]$"),
    ],
)
def test_weights_that_do_not_fit_the_network_are_named_in_the_error(
    saved: Path, change: Callable[[Path], None], message: str
) -> None:
    change(saved / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"weights\.safetensors: {message}"):
        load_network(read_checkpoint(saved))
    with pytest.raises(ConfigError, match=rf"^score\.checkpoint s3://models/best: .*weights\.safetensors: {message}"):
        given_network(read_checkpoint(saved), "s3://models/best", "score.checkpoint")


@pytest.mark.parametrize("error", [ConfigError, TypeError, ValueError])
def test_a_network_that_cannot_be_built_names_the_file(
    saved: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error("no such network\nmore")

    checkpoint = read_checkpoint(saved)
    monkeypatch.setattr(checkpoint_network, "MultiTaskNet", fail)
    with pytest.raises(CheckpointError, match=r"checkpoint/meta\.json: no such network$"):
        load_network(checkpoint)

"""Every preset is trained, saved, loaded, evaluated, calibrated and used for prediction, with tiny images."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import STILL, TRANSFORM, faces

from agr_ray.config import ModelConfig, PredictConfig, TrainConfig, TrainJob, parse
from agr_ray.config.pipeline import DEFAULT_PIPELINE
from agr_ray.config.presets import PRESETS
from agr_ray.errors import ConfigError
from agr_ray.evaluation.audit import metrics_report
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import UTKFACE, Labels
from agr_ray.learn.context import EpochReport, LocalContext
from agr_ray.learn.loop import train
from agr_ray.models.backbones.base import WeightsError
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.models.checkpoint_network import load_network, save_checkpoint
from agr_ray.models.network import MultiTaskNet, preset_config
from agr_ray.models.pretrained import load_backbone
from agr_ray.predict.attributes import AttributePredictor
from agr_ray.predict.columns import attribute_columns

SIDES_PX = {"facenet_bias": 96, "faceage": 96}  # Inception-ResNet-v1 needs 80
KEYS = {
    "paper": "01afd97f1fe3",
    "single_task_age": "75834c9c2176",
    "single_task_gender": "916319d81e2c",
    "single_task_race": "3fff0b72469b",
    "lightweight": "06c2e4577099",
    "vgg16_transfer": "aec5ce3b21ad",
    "cnn_features": "5f8d816904f9",
    "sa_net": "afda6cdfcd22",
    "gender_routed": "f0b219039db5",
    "head_pose": "a1bf43ce2c39",
    "multi_scale": "9563c51b7aa7",
    "ldl": "33cd6653b974",
    "plain_cnn": "ffc76866e1fb",
    "facenet_bias": "8659bd93d30d",
    "faceage": "d30804e46cda",
    "mhsa": "5812018032fd",
    "se": "abb6c22e3314",
    "cbam": "8191615b57a8",
    "vit": "1bcfddd68c73",
    "swin": "db90d6855529",
    "domain_adapt": "2bbebc46b350",
}
"""Digest of the names and shapes of each preset's tensors. If one changes, older checkpoints can't be loaded."""


def side_px(preset: str) -> int:
    return SIDES_PX.get(preset, 32)


def keys_digest(model: MultiTaskNet) -> str:
    """Return a digest of the names and shapes in a network's state dict."""
    lines = [f"{name} {list(tensor.shape)}" for name, tensor in sorted(model.state_dict().items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_works_from_training_to_prediction(preset: str, tmp_path: Path) -> None:
    job = TrainJob(
        model=ModelConfig(preset=preset, image_size=side_px(preset)),
        train=TrainConfig(epochs=1, batch_size=4, lr=1e-3),
        augment=STILL,
    )
    data = faces(8) | {"set_index": np.arange(8) % 2}
    labels = Labels.from_arrays(UTKFACE, data)
    transform = TRANSFORM.__class__(**{**TRANSFORM.__dict__, "image_size": side_px(preset)})
    torch.manual_seed(0)
    model = MultiTaskNet(job.model, UTKFACE)
    model.initialise(labels.arrays)
    assert keys_digest(model) == KEYS[preset]

    reports: list[EpochReport] = []
    context = LocalContext(data, data, 4, on_report=reports.append)
    (row,) = train(context, model, transform, job, Baseline.fit(labels), 8)
    assert row["step"] == 2
    assert np.isfinite(row["train_loss"])

    save_checkpoint(tmp_path / "checkpoint", reports[-1].model, transform)
    checkpoint = read_checkpoint(tmp_path / "checkpoint")
    loaded = load_network(checkpoint)
    predictor = AttributePredictor(loaded, transform, PredictConfig())
    predictions = predictor.predict(data["crop"])
    assert [name for name in predictions if name != "age_spread"] == list(job.model.tasks)
    has_spread = "age" in job.model.tasks and job.model.age_head not in ("linear", "groups")
    assert ("age_spread" in predictions) is has_spread
    report = metrics_report(labels, predictions)
    if "age" in predictions:
        assert report["age"]["mae_years"] == pytest.approx(row["val_age_mae_years"], rel=1e-3)

    calibration = Calibration.fit(
        labels,
        predictions,
        coverage=0.9,
        risk=0.05,
        model_digest=checkpoint.digest,
        pipeline=DEFAULT_PIPELINE,
        precisions=("float32",),
        split_manifest_sha256="",
        content_codes=(),
        num_seen_in_training=0,
    )
    calibrated = AttributePredictor(loaded, transform, PredictConfig(), calibration).attributes(data["crop"])
    columns = attribute_columns(calibrated, 8, UTKFACE)
    shown = {"age": "age", "gender": "p_male", "race": "race"}
    assert [name for task, name in shown.items() if task in job.model.tasks and name not in columns] == []


def test_a_preset_on_the_command_line_gives_way_to_explicit_keys() -> None:
    job = parse(TrainJob, ["--data", "d", "--preset", "vit", "--lr", "0.1", "--model.image_size", "64"], {})

    assert (job.model.backbone, job.model.image_size) == ("vit_b_16", 64)
    assert (job.train.optimizer, job.train.lr, job.train.layer_decay) == ("adamw", 0.1, 1.0)


def test_a_preset_in_code_brings_its_settings_of_training() -> None:
    job = TrainJob(model=ModelConfig(preset="swin"), train=TrainConfig(data="d", lr=0.1))

    assert (job.train.optimizer, job.train.weight_decay, job.train.lr, job.train.data) == ("adamw", 0.05, 0.1, "d")
    plain = TrainConfig(data="d", lr=0.1)
    assert TrainJob(train=plain).train == TrainJob(model=ModelConfig(), train=plain).train == plain


def test_a_preset_on_the_command_line_replaces_the_recipes_network_and_optimiser() -> None:
    job = parse(TrainJob, ["--config", "utkface_lite", "--data", "d", "--preset", "vit"], {})

    assert (job.model.backbone, job.model.image_size) == ("vit_b_16", 88)
    assert (job.train.optimizer, job.train.schedule, job.train.weight_decay) == ("adamw", "cosine", 0.05)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", ["utkface_lite", "paper"])
def test_a_preset_on_the_command_line_is_the_same_network_with_any_recipe(recipe: str, preset: str) -> None:
    job = parse(TrainJob, ["--config", recipe, "--data", "d", "--preset", preset], {})

    free = {"image_size", "dropout", "pretrained"}
    assert job.model.model_dump(exclude=free) == ModelConfig(preset=preset).model_dump(exclude=free)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--preset", "domain_adapt", "--loss.weighting", "uncertainty"], "that of the task domain must stay 1"),
        (["--preset", "head_pose", "--augment.mixup_alpha", "0.2"], "model.head_pose: images mixed by"),
        (["--preset", "head_pose", "--augment.cutmix_alpha", "1"], "model.head_pose: images mixed by"),
    ],
)
def test_settings_that_do_not_go_together_are_rejected(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(TrainJob, ["--data", "d", *given], {})


def test_pretrained_layers_do_not_read_shuffled_channels() -> None:
    sa_net = MultiTaskNet(ModelConfig(preset="sa_net", backbone="resnet18"), UTKFACE)
    state = sa_net.backbone.state_dict()

    with pytest.raises(WeightsError, match=r"model\.attention shuffle after stage 2 reorders the channels"):
        load_backbone(sa_net, state)
    load_backbone(MultiTaskNet(ModelConfig(preset="paper", backbone="resnet18", attention="shuffle"), UTKFACE), state)


@pytest.mark.parametrize(
    ("preset", "side"), [("vit", 112), ("paper", 100), ("facenet_bias", 100), ("lightweight", 100)]
)
def test_a_preset_takes_the_next_side_that_its_backbone_takes(preset: str, side: int) -> None:
    assert preset_config(preset, 100).image_size == side
    assert preset_config("facenet_bias", 64).image_size == 80


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_keeps_imagenet_weights_if_its_backbone_has_them(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = parse(TrainJob, ["--config", "paper", "--data", "d", "--preset", preset], {})

    fits = preset not in ("sa_net", "plain_cnn", "facenet_bias", "faceage")
    assert job.model.pretrained == ("imagenet" if fits else "none")
    assert fits or job.train.freeze_epochs == 0
    warning = f"model.pretrained imagenet of the recipe does not fit the preset {preset}, which starts from random"
    assert (warning in capsys.readouterr().err) is not fits


def test_weights_of_a_file_are_kept_for_the_same_backbone_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text('[model]\npreset = "paper"\npretrained = "own.pth"\n')
    given = ["--config", str(recipe), "--data", "d"]

    assert parse(TrainJob, [*given, "--preset", "cbam"], {}).model.pretrained == "own.pth"
    assert parse(TrainJob, [*given, "--preset", "vit", "--model.pretrained", "none"], {}).model.pretrained == "none"
    assert capsys.readouterr().err == ""
    assert parse(TrainJob, [*given, "--preset", "vit"], {}).model.pretrained == "none"
    assert "model.pretrained own.pth of the recipe does not fit the preset vit" in capsys.readouterr().err


def test_a_backbone_is_frozen_only_with_pretrained_weights() -> None:
    random = parse(TrainJob, ["--data", "d", "--preset", "cnn_features"], {})
    pretrained = parse(TrainJob, ["--data", "d", "--preset", "cnn_features", "--model.pretrained", "imagenet"], {})

    assert random.train.freeze_epochs == 0
    assert pretrained.train.freeze_epochs > 1e6


def test_an_unknown_preset_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(Exception, match=r"there is no preset 'vitt'.*; allowed: paper, .*domain_adapt"):
        parse(TrainJob, ["--data", "d", "--preset", "vitt"], {})


def test_routing_needs_both_tasks() -> None:
    with pytest.raises(ValueError, match=r"age_routing soft needs the tasks age and gender"):
        ModelConfig(age_routing="soft", tasks=("age",))


def test_attention_after_a_missing_stage_is_rejected() -> None:
    config = ModelConfig(backbone="swin_t", attention="cbam", attention_stages=(5,))

    with pytest.raises(Exception, match=r"model\.attention_stages 5: the backbone swin_t has stages 1 to 4"):
        MultiTaskNet(config, UTKFACE)

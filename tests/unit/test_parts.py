"""A new attention block, head and backbone: each is one class and one line, and works from training to prediction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from test_loop import STILL, TRANSFORM, faces
from torch import Tensor, nn

from agr_ray.config import LossConfig, ModelConfig, PredictConfig, TrainConfig, TrainJob
from agr_ray.evaluation.metrics import Baseline, metrics_report
from agr_ray.labels import UTKFACE, Labels, LabelSpace
from agr_ray.learn.context import EpochReport, LocalContext
from agr_ray.learn.loop import train
from agr_ray.models.backbones.base import Backbone
from agr_ray.models.checkpoint import load_checkpoint, save_checkpoint
from agr_ray.models.heads import ages
from agr_ray.models.heads.base import Head, Targets, TaskSum
from agr_ray.models.network import MultiTaskNet
from agr_ray.predict.forward import predict
from agr_ray.predict.inference import for_inference
from agr_ray.registry import ATTENTION, BACKBONES, HEADS, Registry


class Patches(Backbone):
    """Patches, embedded and mixed, without batch norm and without a name that a ResNet has."""

    def __init__(self, name: str) -> None:  # as all backbones
        super().__init__()
        self.num_channels, self.num_features = 16, 12
        self.embed = nn.Conv2d(3, 16, 8, stride=8)
        self.mixer = nn.Sequential(nn.GroupNorm(4, 16), nn.GELU(), nn.Conv2d(16, 16, 1))
        self.squash = nn.Linear(16, 12)

    def forward(self, images_nchw: Tensor) -> Tensor:
        embedded = self.embed(images_nchw)
        return embedded + self.mixer(embedded)

    def project(self, pooled: Tensor) -> Tensor:
        return self.squash(pooled)


class Gain(nn.Module):
    """A learnt gain for each channel."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_channels, 1, 1))

    def forward(self, feature_map_nchw: Tensor) -> Tensor:
        return feature_map_nchw * self.gain


class LogAge(Head):
    """The logarithm of the age and its spread: two outputs in a tuple."""

    labels = ages.LABELS
    metric = "mae_years"

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:  # as all heads
        super().__init__()
        self.two = nn.Linear(num_features, 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        logarithm, spread = self.two(features).unbind(dim=1)
        return logarithm + 3.0, spread

    def labelled(self, targets: Targets) -> Tensor:
        return targets["age"].isfinite()

    def losses(self, outputs: tuple[Tensor, Tensor], targets: Targets, config: LossConfig) -> Tensor:
        known = self.labelled(targets)
        logarithm, spread = (torch.where(known, output, 0.0) for output in outputs)
        truth = torch.where(known, targets["age"], 0.0).log1p()
        return torch.where(known, (logarithm - truth).square() * torch.exp(-spread) + spread, 0.0)

    def read_out(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        return ages.clamped(outputs[0].expm1())

    def score(self, outputs: tuple[Tensor, Tensor], targets: Targets) -> TaskSum:
        return ages.age_score(self.read_out(outputs), targets)


class Smile(Head):
    """A fourth task: how broad a smile is, 0 to 1."""

    labels: ClassVar[dict[str, float]] = {"smile": float("nan")}
    metric = "mae_years"

    def __init__(self, num_features: int, task: str, space: LabelSpace) -> None:  # as all heads
        super().__init__()
        self.layer = nn.Linear(num_features, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features).squeeze(1)

    def labelled(self, targets: Targets) -> Tensor:
        return targets["smile"].isfinite()

    def losses(self, outputs: Tensor, targets: Targets, config: LossConfig) -> Tensor:
        known = self.labelled(targets)
        return torch.where(known, outputs - torch.where(known, targets["smile"], 0.0), 0.0).square()

    def read_out(self, outputs: Tensor) -> Tensor:
        return outputs.clamp(0.0, 1.0)

    def score(self, outputs: Tensor, targets: Targets) -> TaskSum:
        known = self.labelled(targets)
        errors = torch.where(known, (self.read_out(outputs) - targets["smile"]).abs(), 0.0)
        return TaskSum(errors.sum(), known.sum().float())


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    BACKBONES.register("patches", Patches)
    HEADS["smile"] = Registry("smile head", {})
    HEADS["smile"].register("square", Smile)
    ATTENTION.register("gain", Gain)
    HEADS["age"].register("log", LogAge)
    yield
    for registry, name in ((BACKBONES, "patches"), (ATTENTION, "gain"), (HEADS["age"], "log")):
        registry.unregister(name)
    del HEADS["smile"]


PARTS = {
    "backbone": {"backbone": "patches"},
    "attention": {"preset": "lightweight", "attention": "gain"},
    "head": {"preset": "lightweight", "age_head": "log"},
    "all": {"backbone": "patches", "attention": "gain", "age_head": "log", "bn_momentum": 0.1},
    "squeeze_excitation": {"preset": "lightweight", "attention": "squeeze_excitation"},
    "cbam": {"preset": "lightweight", "attention": "cbam"},
}


@pytest.mark.parametrize("model_values", PARTS.values(), ids=PARTS)
def test_a_part_is_trained_saved_loaded_evaluated_and_used(model_values: dict[str, Any], tmp_path: Path) -> None:
    values = {"epochs": 2, "batch_size": 8, "lr": 2e-3, "layer_decay": 0.9, "freeze_epochs": 1, "ema_decay": 0.5}
    job = TrainJob(
        model=ModelConfig(image_size=32, **model_values),
        train=TrainConfig(**values),
        augment=STILL,
        loss=LossConfig(weighting="uncertainty"),
    )
    data = faces(24)
    torch.manual_seed(0)
    model = MultiTaskNet(job.model, UTKFACE)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    labels = Labels.from_arrays(UTKFACE, data)
    reports: list[EpochReport] = []
    context = LocalContext(data, data, 8, on_report=reports.append)
    rows = train(context, model, TRANSFORM, job, Baseline.fit(labels), 24)
    assert all(row["val_age_mae_years"] is not None and np.isfinite(row["train_loss"]) for row in rows)
    assert all(not torch.equal(value, first[name]) for name, value in model.named_parameters())

    save_checkpoint(tmp_path / "checkpoint", reports[-1].model, TRANSFORM)
    loaded = load_checkpoint(tmp_path / "checkpoint").model
    predictions = predict(loaded, data["crop"], TRANSFORM, job.predict)
    report = metrics_report(labels, predictions)
    assert report["age"]["mae_years"] == pytest.approx(rows[-1]["val_age_mae_years"], rel=1e-4)
    assert report["race"]["accuracy"] == pytest.approx(rows[-1]["val_race_accuracy"])

    for precision in ("float32", "bfloat16"):
        config = PredictConfig(precision=precision)  # type: ignore[arg-type]  # one of them
        plain = predict(loaded, data["crop"], TRANSFORM, config)
        ready = predict(for_inference(loaded, precision), data["crop"], TRANSFORM, config)
        is_known = job.model.backbone != "patches"  # what is not known is not fused, and so is exactly the same
        tolerance = {"rtol": 0.05, "atol": 0.5} if is_known else {"rtol": 0.0, "atol": 0.0}
        for before, after in zip(plain, ready, strict=True):
            np.testing.assert_allclose(after, before, **tolerance)


def test_a_fourth_task_is_learnt_beside_the_others() -> None:
    tasks = ("age", "gender", "race", "smile")
    job = TrainJob(
        model=ModelConfig(image_size=32, backbone="patches", tasks=tasks),
        train=TrainConfig(epochs=2, batch_size=8, lr=2e-3),
        augment=STILL.model_copy(update={"mixup_alpha": 0.4}),
        loss=LossConfig(weighting="uncertainty"),
    )
    data = faces(24) | {"smile": np.linspace(0, 1, 24).astype(np.float32)}
    data["smile"][::3] = np.nan
    torch.manual_seed(0)
    model = MultiTaskNet(job.model, UTKFACE)
    assert model.tasks == tasks
    before = model.heads["smile"].layer.weight.clone()
    reports: list[EpochReport] = []
    context = LocalContext(data, data, 8, on_report=reports.append)
    rows = train(context, model, TRANSFORM, job, Baseline.fit(Labels.from_arrays(UTKFACE, data)), 24)
    assert all(np.isfinite(row["train_loss"]) and np.isfinite(row["val_objective"]) for row in rows)
    assert not torch.equal(model.heads["smile"].layer.weight, before)
    assert reports[-1].train_state()["log_variances"].shape == (4,)

"""A new attention block, head and backbone: each is one class and one line, and works from training to prediction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_registry
from test_loop import STILL, TRANSFORM, faces

from agr_ray.config import LossConfig, ModelConfig, PredictConfig, TrainConfig, TrainJob
from agr_ray.evaluation.audit import metrics_report
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import UTKFACE, Labels
from agr_ray.learn.context import EpochReport, LocalContext
from agr_ray.learn.loop import train
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.models.checkpoint_network import load_network, save_checkpoint
from agr_ray.models.network import MultiTaskNet
from agr_ray.predict.attributes import AttributePredictor
from agr_ray.predict.columns import attribute_columns, uncalibrated
from agr_ray.predict.forward import predict
from agr_ray.predict.inference import for_inference


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    toy_registry.register()
    yield
    toy_registry.unregister()


PARTS = {
    "backbone": {"backbone": "patches"},
    "attention": {"preset": "lightweight", "attention": "gain"},
    "head": {"preset": "lightweight", "age_head": "log"},
    "all": {"backbone": "patches", "attention": "gain", "age_head": "log", "bn_momentum": 0.1},
    "squeeze_excitation": {"preset": "lightweight", "attention": "squeeze_excitation"},
    "cbam": {"preset": "lightweight", "attention": "cbam"},
}


@pytest.mark.parametrize("model_values", PARTS.values(), ids=PARTS)
def test_a_new_network_part_can_be_trained_saved_loaded_evaluated_and_used(
    model_values: dict[str, Any], tmp_path: Path
) -> None:
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
    loaded = load_network(read_checkpoint(tmp_path / "checkpoint"))
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
        for task, before in plain.items():
            np.testing.assert_allclose(ready[task], before, **tolerance)


def test_a_fourth_task_is_trained_with_the_others() -> None:
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
    predictor = AttributePredictor(model.eval(), TRANSFORM, PredictConfig())
    predictions = predictor.predict(data["crop"])
    assert list(predictions) == list(tasks)
    assert predictions["smile"].shape == (24,)
    assert list(attribute_columns(uncalibrated(predictions), 24, UTKFACE)) == [
        *("age", "p_male", "gender", "race_probs", "race", "abstain")
    ]

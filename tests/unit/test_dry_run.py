"""`--dry-run`: its counts and times, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from prepared_sets import SIDE_PX, prepared_set

from agr_ray.config import ModelConfig, TrainConfig, TrainJob
from agr_ray.errors import JobError
from agr_ray.labels import UTKFACE
from agr_ray.learn.dry_run import count_memory
from agr_ray.learn.loop import train as train_loop
from agr_ray.models.backbones.base import Backbone
from agr_ray.models.network import MultiTaskNet
from agr_ray.runtime.train import train

CPU = torch.device("cpu")


def dry_job(data: Path, *, dry_run: bool = True, **changes: Any) -> TrainJob:
    settings = {
        "data": str(data),
        "out": str(data.parent / "runs"),
        "batch_size": 4,
        "epochs": 3,
        "threads_per_worker": 1,
    } | changes
    return TrainJob(
        model=ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX, tasks=("age", "gender")),
        train=TrainConfig(**settings),
        dry_run=dry_run,
    )


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a prepared set of two training crops; Ray must not be started."""
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    return prepared_set(tmp_path / "prepared")


def test_a_dry_run_prints_the_plan_and_writes_nothing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(dry_job(data, num_workers=1, optimizer="adamw", ema_decay=0.9))

    said = capsys.readouterr().out
    assert f"warning: train.data {data}: its crops were made with vision.detector none" in said
    num_parameters = sum(p.numel() for p in MultiTaskNet(dry_job(data).model, UTKFACE).parameters())
    assert f"data: {data}: 2 training crops, 0 validation crops" in said
    assert "training labels, gender: female 1, male 1" in said
    assert f"heads age, gender, {num_parameters:,} parameters, {SIDE_PX} px" in said
    assert "steps: 1 per epoch, 4 images each; 3 in all 3 epochs" in said
    assert "workers: 1 x 1 CPU, 4 images per step each; including reading, 3 logical CPUs in all" in said
    assert "memory of a worker's step: " in said
    assert "average of weights " in said
    assert "kept after the first epoch" in said
    assert "ms per step" in said
    assert "total time: " in said
    assert "dry run: nothing was written" in said
    assert [path.name for path in data.parent.iterdir()] == ["prepared"]


def test_a_dry_run_times_every_image_size(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(dry_job(data, image_sizes=(48, SIDE_PX)))

    said = capsys.readouterr().out
    assert ", 48 then 32 px" in said
    assert "time at 48 px" in said
    assert said.count("per epoch with validation, epochs: 1") == 1  # of three epochs the first
    assert said.count("per epoch with validation, epochs: 2") == 1


def test_a_dry_run_times_steps_with_an_unfrozen_backbone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[bool] = []

    def loop(context: Any, model: MultiTaskNet, *args: Any) -> Any:
        history = train_loop(context, model, *args)
        frozen.append(not all(parameter.requires_grad for parameter in model.parameters()))
        return history

    monkeypatch.setattr("agr_ray.learn.dry_run.train_loop", loop)
    train(dry_job(data, freeze_epochs=1))

    assert frozen == [False]


def test_slow_steps_are_timed_only_a_few_times(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agr_ray.learn.dry_run.MAX_S", 0.0)
    contexts: list[Any] = []

    def watched(context: Any, *arguments: Any) -> Any:
        contexts.append(context)
        return train_loop(context, *arguments)

    monkeypatch.setattr("agr_ray.learn.dry_run.train_loop", watched)

    train(dry_job(data, num_workers=1))

    assert [context.num_steps for context in contexts] == [2]
    assert "ms per step" in capsys.readouterr().out


def test_a_dry_run_counts_the_images_of_a_part(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(dry_job(data, batch_size=10, grad_accum_steps=4))

    said = capsys.readouterr().out
    assert "workers: 1 x 1 CPU, 10 images per step each in 4 micro-batches; including reading" in said
    assert f"for 3 images of {SIDE_PX} px in float32" in said


def test_a_dry_run_with_a_non_finite_loss_ends_with_one_line(data: Path) -> None:
    with pytest.raises(JobError, match=r"^dry run: epoch 1, step \d+: loss (nan|inf).*image_id a.jpg"):
        train(dry_job(data, lr=1e30, optimizer="sgd"))


def test_settings_that_only_change_rounding_may_change_on_resume(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A run without a name is named by the digest of what decides what is learnt.
    monkeypatch.setattr("agr_ray.runtime.train.dry_run", lambda *_: None)
    plain = train(dry_job(data))

    assert train(dry_job(data, compile=True)) == plain
    assert train(dry_job(data, tf32=False)) == plain
    assert train(dry_job(data, grad_accum_steps=2)) != plain  # batch norm sees the parts
    assert train(dry_job(data, precision="bfloat16")) != plain


@pytest.mark.parametrize(("optimizer", "copies"), [("adamw", 2), ("sgd", 1)])
def test_memory_of_optimiser_and_gradients_follows_the_parameters(tmp_path: Path, optimizer: str, copies: int) -> None:
    job = dry_job(tmp_path, optimizer=optimizer, ema_decay=0.9)
    model = MultiTaskNet(job.model, UTKFACE)
    parameters = 4 * sum(p.numel() for p in model.parameters())

    memory = count_memory(model, job, SIDE_PX, 4, CPU)

    assert memory.gradients == parameters
    assert memory.optimizer == pytest.approx(copies * parameters, rel=1e-3)  # and a counter for each tensor
    assert parameters < memory.weights == memory.average < 1.1 * parameters
    assert memory.total == sum((memory.weights, memory.gradients, memory.optimizer, memory.average, memory.activations))


class _Linear(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3 * SIDE_PX**2, 1024)

    def forward(self, images_nchw: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layer(images_nchw.flatten(1))
        return features


class _Last(torch.nn.Module):
    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return maps[-1]


def test_activation_memory_is_what_the_layers_store(tmp_path: Path) -> None:
    # A linear layer keeps its input, and no weight counts: the pixels of each image, and the features of its heads.
    job = dry_job(tmp_path)
    model = MultiTaskNet(job.model, UTKFACE)
    model.backbone, model.neck = _Linear(), _Last()

    assert count_memory(model, job, SIDE_PX, 6, CPU).activations == 6 * 4 * (3 * SIDE_PX**2 + 1024)


@pytest.mark.parametrize("preset", ["gender_routed", "multi_scale", "head_pose", "domain_adapt"])
def test_memory_is_counted_whatever_the_heads_return(tmp_path: Path, preset: str) -> None:
    model = ModelConfig(preset=preset, backbone="resnet18", image_size=SIDE_PX)

    memory = count_memory(MultiTaskNet(model, UTKFACE), dry_job(tmp_path), SIDE_PX, 4, CPU)

    assert memory.gradients == 4 * sum(p.numel() for p in MultiTaskNet(model, UTKFACE).parameters())


def test_counting_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    job = dry_job(tmp_path)
    model = MultiTaskNet(job.model, UTKFACE)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    count_memory(model, job, SIDE_PX, 4, CPU)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

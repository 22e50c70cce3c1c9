"""Options that make steps faster or smaller must not change the result of training."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loop import STILL, TRANSFORM, _Rank, faces, job, network, part, run, run_ranks, still_norms, weights
from torch import Tensor, nn

from agr_ray.config import AugmentConfig, LossConfig, TrainConfig, TrainJob
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import UTKFACE, Labels
from agr_ray.learn import step
from agr_ray.learn.context import EpochReport, LocalContext
from agr_ray.learn.loop import train
from agr_ray.learn.monitor import NonFiniteLossError
from agr_ray.learn.optimise import build_optimizer
from agr_ray.models.backbones.base import Backbone
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.models.checkpoint_network import load_network, load_train_state, save_checkpoint
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.precision import allow_tf32, autocast

CPU = torch.device("cpu")
MIXED = AugmentConfig(flip_probability=0, rotation_degrees=0, shift=0, mixup_alpha=0.4, cutmix_alpha=1.0)


def some_unlabelled(num: int) -> dict[str, Any]:
    data = faces(num)
    data["age"][:3] = np.nan
    data["gender"][num // 2 :] = -1
    return data


def scaled_by(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Scale gradients although the arithmetic is float32, which has the range for any scale."""
    monkeypatch.setattr(step, "grad_scaler", lambda device, precision: torch.amp.GradScaler(device.type, **options))


# float16


def test_float16_multiplies_in_float16() -> None:
    with autocast(CPU, "float16"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.float16


def test_float16_trains_and_keeps_its_scale() -> None:
    config = job({"epochs": 2, "precision": "float16", "use_gpu": True, "grad_clip_norm": 1.0})
    rows, reports, model = run(config, faces(16))
    assert all(np.isfinite(row["val_loss"]) for row in rows)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(weights(model), weights(network(config)))
    assert reports[-1].train_state()["scaler"]["scale"] > 0


def test_other_precisions_have_no_loss_scale() -> None:
    _, reports, _ = run(job({"epochs": 1}), faces(8))
    assert reports[0].train_state()["scaler"] == {}


@pytest.mark.parametrize("grad_clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_scaled_gradients_give_the_same_step(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, grad_clip_norm: float
) -> None:
    config, data = job({"epochs": 1, "optimizer": optimizer, "grad_clip_norm": grad_clip_norm}), faces(16)
    _, _, plain = run(config, data)
    scaled_by(monkeypatch, init_scale=2.0**10)
    _, _, scaled = run(config, data)
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=0, atol=0)  # powers of two round nothing


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_steps_with_overflowing_gradients_are_skipped(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    values = {"epochs": 1, "optimizer": optimizer, "grad_clip_norm": 1.0, "ema_decay": 0.9}
    config, data = job(values, loss=LossConfig(age_weight=1e6)), faces(24)
    scaled_by(monkeypatch, init_scale=2.0**127)  # float32 ends at the next power of two
    model = network(config)
    before = copy.deepcopy(dict(model.named_parameters()))

    rows, reports, _ = run(config, data, model=model)

    assert rows[0]["step"] == 3
    assert reports[0].train_state()["scaler"]["scale"] == 2.0**124
    for kept in (model, reports[0].model):
        assert all(torch.equal(value, before[name]) for name, value in kept.named_parameters())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_skipped_first_step_leaves_no_state(optimizer: str) -> None:
    models = [nn.Linear(50, 20) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    config = TrainConfig(optimizer=optimizer, lr=0.1)  # type: ignore[arg-type]  # one of them
    scaler = torch.amp.GradScaler("cpu")
    for model, factors in zip(models, ([np.inf, 1.0, 1.0], [1.0, 1.0]), strict=True):
        built = build_optimizer(model, config)  # type: ignore[arg-type]  # any module will do
        rubbish = [torch.full_like(p, 7.0) for p in model.parameters() for _ in range(50)]
        del rubbish  # what the first step would find in memory
        for factor in factors:
            built.zero_grad()
            scaler.scale(model(torch.linspace(-1, 1, 50)).square().sum() * factor).backward()
            scaler.step(built)
            scaler.update()
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-6, atol=1e-7)


def test_a_non_finite_loss_also_stops_a_run_with_loss_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    config = job({"epochs": 1})
    model = network(config)
    with torch.no_grad():
        model.heads["age"].layer.bias.fill_(np.nan)
    scaled_by(monkeypatch)
    with pytest.raises(NonFiniteLossError, match="epoch 1, step 1"):
        run(config, faces(16), model=model)


def test_a_resumed_run_keeps_its_loss_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The scale doubles after each three steps, and there are two in an epoch: its counter must be resumed as well.
    scaled_by(monkeypatch, init_scale=4.0, growth_interval=3)
    config, data = job({"epochs": 3, "ema_decay": 0.9}), faces(16)

    def save(report: EpochReport) -> None:
        states.append(report.train_state()["scaler"])
        if report.row["epoch"] == 2:
            save_checkpoint(tmp_path, report.model, TRANSFORM, train_state=report.train_state())

    states: list[dict[str, Any]] = []
    _, _, whole = run(config, data, on_report=save)
    _, reports, resumed = run(
        config, data, model=load_network(read_checkpoint(tmp_path)), resume=load_train_state(tmp_path)
    )

    assert [state["scale"] for state in states] == [4.0, 8.0, 16.0]
    assert reports[-1].train_state()["scaler"] == states[-1]
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


# Micro-batches


@pytest.mark.parametrize("augment", [STILL, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
@pytest.mark.parametrize("age_head", ["linear", "distribution"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    augment: AugmentConfig, weighting: Any, age_head: str
) -> None:
    gradients: list[list[Tensor]] = []
    states = []
    data = some_unlabelled(8)
    for grad_accum_steps in (1, 3):
        config = job(
            {"epochs": 1, "optimizer": "sgd", "grad_accum_steps": grad_accum_steps},
            {"age_head": age_head, "backbone": "resnet18"},
            augment,
            LossConfig(weighting=weighting),
        )
        model = still_norms(network(config))
        rows, reports, _ = run(config, data, model=model)
        gradients.append([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
        states.append((rows[0]["train_loss"], reports[0].train_state()["log_variances"]))
    whole, in_parts = (torch.cat(each) for each in gradients)
    assert (in_parts - whole).norm() < 1e-6 * whole.norm()
    for one, other in zip(*gradients, strict=True):
        assert (other - one).norm() < 1e-5 * one.norm()
    assert states[1][0] == pytest.approx(states[0][0], rel=1e-6)
    if weighting == "uncertainty":
        torch.testing.assert_close(states[1][1], states[0][1], rtol=0, atol=1e-7)


def test_two_ranks_with_micro_batches_take_the_same_step_as_one_process() -> None:
    data = some_unlabelled(8)
    config = job({"epochs": 1, "optimizer": "sgd", "lr": 1e-2, "grad_accum_steps": 2}, loss=LossConfig())
    whole = job({"epochs": 1, "optimizer": "sgd", "lr": 1e-2})
    models = [still_norms(network(config)) for _ in range(3)]
    run_ranks(config, [part(data, slice(0, 4)), part(data, slice(4, 8))], [faces(2), faces(2)], models[:2])
    run(whole, data, model=models[2])
    torch.testing.assert_close(weights(models[0]), weights(models[2]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("num_faces", "expected"),
    [(12, [3, 3, 3, 3]), (10, [2, 3, 2, 3]), (5, [2, 3]), (3, [3]), (1, [1])],
    ids=str,
)
def test_only_a_batch_of_one_has_a_part_with_a_single_image(num_faces: int, expected: list[int]) -> None:
    seen: list[int] = []
    config = job({"epochs": 1, "batch_size": 12, "grad_accum_steps": 4})
    model = network(config)
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append(len(inputs[0])) if torch.is_grad_enabled() else None
    )
    rows, _, _ = run(config, faces(num_faces), model=model)
    assert seen == expected
    assert rows[0]["num_train_rows"] == num_faces


@pytest.fixture
def process_group() -> Iterator[None]:
    """Start a process group of one, so that torch's own DDP can be used."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class _Counting(LocalContext):
    """Gradients go through torch's own DDP, which counts what it sends."""

    num_sent = 0

    def wrap(self, model: nn.Module) -> nn.Module:
        wrapped = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)

        def send(_, bucket):  # torch wants annotations that are no strings, or none
            self.num_sent += bucket.buffer().numel()
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        wrapped.register_comm_hook(None, send)
        return wrapped


def test_gradients_are_exchanged_once_a_step_whatever_its_parts(process_group: None) -> None:
    data = faces(16)
    baseline = Baseline.fit(Labels.from_arrays(UTKFACE, data))
    loss = LossConfig(weighting="uncertainty")
    models = []
    for grad_accum_steps in (1, 4):
        config = job({"epochs": 1, "optimizer": "sgd", "grad_accum_steps": grad_accum_steps}, loss=loss)
        models.append(still_norms(network(config)))
        context = _Counting(data, data, 8)
        train(context, models[-1], TRANSFORM, config, baseline, 16)
        assert context.num_sent == 2 * (3 + sum(p.numel() for p in models[-1].parameters()))
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-4, atol=1e-6)


# A compiled network


@pytest.fixture
def num_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compile without a compiler, and note how often: its element is the number of graphs."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        graphs[0] += 1
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield graphs
    torch.compiler.reset()


class _Small(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 1024, 5, stride=5), nn.BatchNorm2d(1024), nn.ReLU())

    def forward(self, images_nchw: Tensor) -> Tensor:
        feature_map: Tensor = self.layers(images_nchw)
        return feature_map


def small(config: TrainJob) -> MultiTaskNet:
    """Return a network of three layers, which compiles quickly."""
    model = network(config)
    model.backbone = _Small()
    return model


@pytest.mark.parametrize("train_values", [{}, {"ema_decay": 0.9, "grad_accum_steps": 2, "freeze_epochs": 1}], ids=str)
def test_a_compiled_network_learns_the_same_under_the_same_names(
    num_compiled: list[int], train_values: dict[str, Any]
) -> None:
    config = job({"epochs": 2, "optimizer": "sgd", "compile": True, **train_values})
    plain = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    first = small(config)
    _, plain_reports, model = run(plain, faces(19), model=copy.deepcopy(first))
    assert num_compiled == [0]
    _, reports, compiled = run(config, faces(19), model=copy.deepcopy(first))
    assert num_compiled[0] > 0
    assert list(compiled.state_dict()) == list(model.state_dict())
    assert list(reports[-1].model.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(weights(compiled), weights(model), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(reports[-1].model), weights(plain_reports[-1].model), rtol=1e-5, atol=1e-6)


def test_a_second_image_size_compiles_once_more_and_a_third_does_not(num_compiled: list[int]) -> None:
    config = job({"epochs": 3, "image_sizes": (64, 48, 32), "compile": True})
    after: list[int] = []
    run(config, faces(16), model=small(config), on_report=lambda report: after.append(num_compiled[0]))
    assert after == [1, 2, 2]  # and none for validation


def test_ddp_accepts_a_compiled_network(process_group: None, num_compiled: list[int]) -> None:
    data = faces(16)
    baseline = Baseline.fit(Labels.from_arrays(UTKFACE, data))
    config = job({"epochs": 1, "optimizer": "sgd", "compile": True, "grad_accum_steps": 2})
    models = [small(config)]
    models.append(copy.deepcopy(models[0]))
    context = _Counting(data, data, 8)
    train(context, models[0], TRANSFORM, config, baseline, 16)
    assert context.num_sent == 2 * sum(p.numel() for p in models[0].parameters())
    assert num_compiled[0] > 0
    run(job({"epochs": 1, "optimizer": "sgd", "grad_accum_steps": 2}), data, model=models[1])
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-5, atol=1e-6)


# Batch norm over all workers


def test_synchronised_batch_norms_keep_their_names(tmp_path: Path) -> None:
    # One process on a CPU has nobody to synchronise with: what is learnt is what it was without.
    values, data = {"epochs": 2, "ema_decay": 0.9}, faces(16)
    _, _, plain = run(job(values), data)
    _, reports, model = run(job({**values, "sync_batch_norm": True, "use_gpu": True}), data)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(weights(model), weights(plain), rtol=0, atol=0)
    save_checkpoint(tmp_path, reports[-1].model, TRANSFORM)
    torch.testing.assert_close(weights(load_network(read_checkpoint(tmp_path))), weights(reports[-1].model))


@pytest.mark.parametrize("sync", [True, False])
def test_if_one_rank_has_too_few_rows_all_keep_their_batch_norm_statistics(
    monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    monkeypatch.setattr(_Rank, "wrap", lambda self, model: model)  # its hooks count on equal numbers of parts
    # Synchronised batch norms wait for each other; rank 1 has no second batch, and one row too few for its parts.
    data = faces(11)
    config = job({"epochs": 1, "grad_accum_steps": 2, "batch_size": 8, "sync_batch_norm": sync, "use_gpu": True})
    models = [network(config), network(config)]
    seen: list[list[tuple[int, bool]]] = [[], []]
    for model, noted in zip(models, seen, strict=True):
        model.register_forward_pre_hook(
            lambda module, inputs, noted=noted: (
                noted.append((len(inputs[0]), module.training)) if torch.is_grad_enabled() else None
            )
        )
    run_ranks(config, [part(data, slice(0, 8)), part(data, slice(8, 11))], [faces(2), faces(2)], models)
    if sync:
        assert seen == [[(2, False)] * 4, [(3, False), (1, False)]]
    else:
        assert seen == [[(2, True)] * 4, [(3, True), (1, False)]]


def test_ranks_with_enough_rows_all_train_their_batch_norms() -> None:
    data = faces(9)
    config = job({"epochs": 1, "grad_accum_steps": 2, "batch_size": 8, "sync_batch_norm": True, "use_gpu": True})
    models = [network(config), network(config)]
    seen: list[bool] = []
    for model in models:
        model.register_forward_pre_hook(
            lambda module, inputs: seen.append(module.training) if torch.is_grad_enabled() else None
        )
    run_ranks(config, [part(data, slice(0, 4)), part(data, slice(4, 8))], [faces(2), faces(2)], models)
    assert seen == [True] * 4


# Arithmetic and optimisers


def test_tf32_is_for_gpus_and_can_be_disabled() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        allow_tf32(torch.device("cuda"), is_allowed=True)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        allow_tf32(CPU, is_allowed=False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        allow_tf32(torch.device("cuda"), is_allowed=False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_sgd_is_torchs_own() -> None:
    models = [nn.Linear(50, 20) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    config = TrainConfig(optimizer="sgd", lr=0.1, weight_decay=0.01)
    mine = build_optimizer(models[0], config)  # type: ignore[arg-type]  # any module will do
    theirs = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for number in range(5):
        for model, optimizer in zip(models, (mine, theirs), strict=True):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1 + number, 50)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-6, atol=1e-6)


def test_sgd_works_with_a_backbone_that_is_unfrozen_later() -> None:
    config = job({"epochs": 2, "freeze_epochs": 1, "optimizer": "sgd"})
    kept: list[Tensor] = []
    run(config, faces(8), on_report=lambda report: kept.append(weights(report.model.backbone)))
    assert torch.equal(kept[0], weights(network(config).backbone))
    assert not torch.equal(kept[1], kept[0])

"""The training loop without a cluster: learning, resuming, stopping, and ranks with uneven shares."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agr_ray.config import AugmentConfig, LossConfig, ModelConfig, PredictConfig, TrainConfig, TrainJob
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import UTKFACE, Labels
from agr_ray.learn import loop
from agr_ray.learn.batches import Batch
from agr_ray.learn.context import EpochReport, LocalContext, Snapshot
from agr_ray.learn.history import Row
from agr_ray.learn.loop import train
from agr_ray.learn.monitor import NonFiniteLossError
from agr_ray.learn.optimise import Ema, build_optimizer, set_learning_rate
from agr_ray.learn.sampling import Sampler
from agr_ray.learn.schedule import epoch_side_px, learning_rate, plateau_cuts, steps_per_epoch
from agr_ray.models.checkpoint import read_checkpoint
from agr_ray.models.checkpoint_network import load_network, load_train_state, save_checkpoint
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.precision import autocast
from agr_ray.models.transform import Transform
from agr_ray.predict.forward import predict
from agr_ray.schema import HISTORY

SIDE = 32
TRANSFORM = Transform(image_size=SIDE, crop_side_px=SIDE)
SWIN = [(k, n) for k, num in ((1, 2), (3, 2), (5, 6), (7, 2)) for n in range(num)]
CONVNEXT = [(k, n) for k, num in ((1, 3), (3, 3), (5, 9), (7, 3)) for n in range(num)]
"""Modules of each stage, and blocks of each module."""
STILL = AugmentConfig(flip_probability=0, rotation_degrees=0, shift=0)


def faces(num: int, seed: int = 0) -> dict[str, Any]:
    """Return crops whose colours say everything: red the gender, green the race, blue the age."""
    rng = np.random.default_rng(seed)
    gender, race, age = rng.integers(0, 2, num), rng.integers(0, 5, num), rng.integers(0, 100, num)
    crop = rng.integers(0, 30, (num, 38, 38, 3))
    crop += np.stack([gender * 200, race * 50, age * 2], axis=1)[:, None, None, :]
    return {"crop": crop.astype(np.uint8), "age": age.astype(np.float32), "gender": gender, "race": race}


def job(
    train: dict[str, Any],
    model: dict[str, Any] | None = None,
    augment: AugmentConfig = STILL,
    loss: LossConfig | None = None,
) -> TrainJob:
    model = {"preset": "lightweight", "image_size": SIDE, **(model or {})}
    train = {"batch_size": 8, "lr": 2e-3, "schedule": "constant", "early_stopping_patience": 0, **train}
    return TrainJob(model=ModelConfig(**model), train=TrainConfig(**train), augment=augment, loss=loss or LossConfig())


def network(config: TrainJob) -> MultiTaskNet:
    torch.manual_seed(0)
    model = MultiTaskNet(config.model, UTKFACE)
    model.initialise({"age": np.array([30.0, 70.0])})
    return model


def run(
    config: TrainJob,
    data: dict[str, Any],
    val: dict[str, Any] | None = None,
    model: MultiTaskNet | None = None,
    **options: Any,
) -> tuple[list[Row], list[EpochReport], MultiTaskNet]:
    reports: list[EpochReport] = []
    resume = options.pop("resume", None)
    on_report = options.pop("on_report", reports.append)
    context = LocalContext(data, data if val is None else val, config.train.batch_size, on_report=on_report, **options)
    model = network(config) if model is None else model
    baseline = Baseline.fit(Labels.from_arrays(UTKFACE, data))
    rows = train(context, model, TRANSFORM, config, baseline, len(data["age"]), resume)
    return rows, reports, model


def still_norms(model: MultiTaskNet) -> MultiTaskNet:
    """Freeze batch norm's statistics, so that a row's gradient does not depend on the other rows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]
            module.training = False
    return model


def weights(model: nn.Module) -> Tensor:
    """Return all weights and statistics, but not the batches that a rank has seen, which nothing reads."""
    state = model.state_dict()
    return torch.cat([state[name].double().flatten() for name in state if not name.endswith("num_batches_tracked")])


@pytest.mark.parametrize("age_head", [pytest.param("linear", marks=pytest.mark.slow), "distribution"])
def test_a_few_faces_can_be_overfitted(age_head: str) -> None:
    model = {"backbone": "resnet18", "preset": "paper", "age_head": age_head, "bn_momentum": 0.3}
    train_values = {"epochs": 30, "batch_size": 16, "lr": 2e-3, "schedule": "one_cycle"}
    loss = LossConfig(age_weight=0.1, gender_weight=1.0, race_weight=1.0)
    rows, _, _ = run(job(train_values, model, loss=loss), faces(16))
    assert rows[-1]["val_gender_accuracy"] == rows[-1]["val_race_accuracy"] == 1.0
    assert rows[-1]["val_age_mae_years"] < 15
    assert rows[-1]["val_objective"] < 0.25 < rows[0]["val_objective"]


def test_history_has_the_columns_of_the_schema_and_counts_every_row() -> None:
    rows, _, _ = run(job({"epochs": 2}), faces(19), faces(11, seed=1))
    assert [list(row) for row in rows] == [HISTORY.names] * 2
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0]["num_train_rows"] == 19
    assert rows[0]["num_val_rows"] == 11


def test_validation_uses_the_predictions_of_predict() -> None:
    data = faces(10)
    _, reports, model = run(job({"epochs": 1}), data)
    predictions = predict(model.eval(), data["crop"], TRANSFORM, PredictConfig())
    error = np.abs(predictions["age"] - data["age"]).mean()
    assert reports[0].metrics["age"]["mae_years"] == pytest.approx(float(error), rel=1e-4)
    np.testing.assert_allclose(predictions["race"].sum(axis=1), 1.0, rtol=1e-5)


def test_flip_average_is_the_mean_of_both_views() -> None:
    model, crops = network(job({})).eval(), faces(3)["crop"]
    crops[:, :, :19] //= 2
    averaged = predict(model, crops, TRANSFORM, PredictConfig(flip_average=True))
    plain, mirrored = (predict(model, c, TRANSFORM, PredictConfig()) for c in (crops, crops[:, :, ::-1].copy()))
    assert list(averaged) == ["age", "gender", "race"]
    for task, mean in averaged.items():
        np.testing.assert_allclose(mean, (plain[task] + mirrored[task]) / 2, rtol=1e-5)


def test_a_domain_head_whose_gradient_is_not_reversed_learns_alone() -> None:
    data = faces(8) | {"set_index": np.arange(8) % 2}
    values = {"epochs": 1, "optimizer": "sgd", "lr": 0.1}
    _, _, plain = run(job(values, {"tasks": ("gender",)}), data)
    adapted = job(values, {"tasks": ("gender", "domain")}, loss=LossConfig(domain_weight=0.0))
    _, _, model = run(adapted, data)

    torch.testing.assert_close(weights(model.backbone), weights(plain.backbone), rtol=0.0, atol=0.0)
    first = network(adapted)
    assert (weights(model.heads["domain"]) - weights(first.heads["domain"])).abs().max() > 1e-3


def test_predicting_no_images_gives_no_rows() -> None:
    predictions = predict(network(job({})).eval(), faces(0)["crop"], TRANSFORM, PredictConfig())
    assert predictions["race"].shape == (0, 5)


@pytest.mark.parametrize(
    "train_values",
    [
        pytest.param({"optimizer": "adam"}, marks=pytest.mark.slow),
        {"optimizer": "adamw", "ema_decay": 0.9},
        {"schedule": "plateau", "plateau_epochs": 1, "gamma": 0.1, "freeze_epochs": 3, "layer_decay": 0.5},
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, train_values: dict[str, Any]
) -> None:
    # Everything that draws at random or keeps state is on; the interruption is after epoch 2 of 4.
    config = job(
        {"epochs": 4, "schedule": "one_cycle", "grad_clip_norm": 1.0, **train_values},
        {"dropout": 0.3},
        AugmentConfig(brightness=0.2, mixup_alpha=0.2, cutmix_alpha=1.0),
        LossConfig(weighting="uncertainty"),
    )
    data = faces(20)

    def save(report: EpochReport) -> None:
        if report.row["epoch"] == 2:
            save_checkpoint(tmp_path, report.model, TRANSFORM, train_state=report.train_state())

    rows, _, whole = run(config, data, on_report=save)
    resumed_rows, reports, resumed = run(
        config, data, model=load_network(read_checkpoint(tmp_path)), resume=load_train_state(tmp_path)
    )
    assert [report.row["epoch"] for report in reports] == [3, 4]
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    timings = {"epoch_s", "samples_per_s", "data_wait_share"}
    for row, other in zip(rows, resumed_rows, strict=True):
        assert {k: v for k, v in row.items() if k not in timings} == {
            k: v for k, v in other.items() if k not in timings
        }


class _TakenAway(Exception):
    """The machine is gone."""


class _Preempted(LocalContext):
    """Is told in the first epoch, after its fifth step, that its machine will be taken away, and then it is."""

    snapshot: Snapshot | None = None

    def train_batches(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:
        for number, batch in enumerate(super().train_batches(epoch, steps_done), 1):
            yield batch
            if number == 5:
                assert self.snapshot is not None
                raise _TakenAway

    def must_save(self) -> bool:
        return True

    def save(self, snapshot: Snapshot) -> None:
        assert self.snapshot is None
        self.snapshot = snapshot
        self.state = copy.deepcopy(snapshot.train_state())
        self.model = copy.deepcopy(snapshot.model)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_an_interrupted_epoch_is_resumed_and_counted_once(monkeypatch: pytest.MonkeyPatch, ema_decay: float) -> None:
    monkeypatch.setattr(loop, "_CHECK_EVERY_S", 0.0)
    config, data = job({"epochs": 2, "ema_decay": ema_decay}), faces(60)
    baseline = Baseline.fit(Labels.from_arrays(UTKFACE, data))
    context = _Preempted(data, data, config.train.batch_size)
    with pytest.raises(_TakenAway):
        train(context, network(config), TRANSFORM, config, baseline, 60)
    assert context.snapshot is not None
    assert (context.snapshot.epoch, context.snapshot.num_steps) == (1, 1)
    context.state["partial_epoch"]["train_s"] += 1000.0  # before the interruption

    rows, _, _ = run(config, data, model=context.model, resume=context.state)

    undisturbed, _, _ = run(config, data)
    assert [row["step"] for row in rows] == [row["step"] for row in undisturbed] == [8, 16]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["epoch_s"] > 1000.0 > rows[1]["epoch_s"]
    assert 56 <= rows[0]["num_train_rows"] <= 64  # the last batch of an epoch is smaller than the others
    assert rows[1]["num_train_rows"] == 60
    assert rows[0]["train_loss"] == pytest.approx(undisturbed[0]["train_loss"], rel=0.3)


def test_remaining_steps_of_an_epoch_draw_other_rows() -> None:
    context = LocalContext(faces(60), faces(1), 60)
    (first,), (rest,) = context.train_batches(1), context.train_batches(1, steps_done=3)
    assert not np.array_equal(first["age"], rest["age"])
    assert np.array_equal(np.sort(first["age"]), np.sort(rest["age"]))


def test_resuming_a_finished_run_does_nothing() -> None:
    config = job({"epochs": 1})
    rows, reports, model = run(config, faces(8))
    again, later, _ = run(config, faces(8), model=model, resume=reports[0].train_state())
    assert again == rows
    assert not later


def test_each_epoch_is_augmented_differently() -> None:
    seen: list[float] = []

    class Spy(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor, pose: Tensor | None) -> Any:
            seen.append(images.sum().item())
            return self.model(images, pose)

    class Context(LocalContext):
        def wrap(self, model: nn.Module) -> nn.Module:
            return Spy(model)

    # One face, four times: its order in the batch says nothing.
    data = {name: np.repeat(values, 4, axis=0) for name, values in faces(1).items()}
    config = job({"epochs": 2}, augment=AugmentConfig())
    baseline = Baseline.fit(Labels.from_arrays(UTKFACE, data))
    for _ in range(2):
        train(Context(data, data, 4), network(config), TRANSFORM, config, baseline, 4)
    assert len(set(seen)) == 2  # epochs differ, runs do not
    assert seen[:2] == seen[2:]


def test_cuts_before_an_interruption_are_remembered() -> None:
    # At a learning rate of nearly nothing and fixed statistics, hardly anything gets better.
    values = {"epochs": 6, "lr": 1e-12, "schedule": "plateau", "plateau_epochs": 1, "gamma": 0.1}
    config, states = job(values, {"bn_momentum": 1e-9}), []
    rows, _, model = run(config, faces(8), on_report=lambda report: states.append(report.train_state()))
    rates = [row["lr"] for row in rows]
    assert rates[3] < 0.5 * rates[0]
    state = {**states[3], "history": rows[:4]}  # the list itself goes on growing
    resumed, _, _ = run(config, faces(8), model=model, resume=state)
    assert [row["lr"] for row in resumed][4] == rates[4]


def test_weights_of_losses_are_learnt_and_kept() -> None:
    config = job({"epochs": 1, "lr": 1e-2}, loss=LossConfig(weighting="uncertainty", gender_weight=1.0))
    data = faces(16)
    data["race"] = np.full(16, -1)
    _, reports, _ = run(config, data)
    age, gender, race = reports[0].train_state()["log_variances"].tolist()
    assert 0.015 < age < 0.025  # the error is far over a year: two steps of Adam up
    assert gender != 0.0
    assert race == pytest.approx(math.log(2.0))


def test_a_sampler_draws_the_rows_of_an_epoch() -> None:
    data = faces(400)
    data["gender"] = np.arange(400) % 10 // 9  # one in ten is a man
    data["age"] = np.arange(400, dtype=np.float32) / 4
    sampler = Sampler.fit(Labels.from_arrays(UTKFACE, data), "gender", 1.0)
    plain, even = LocalContext(data, data, 64), LocalContext(data, data, 64, sampler=sampler)

    def epoch(context: LocalContext, number: int) -> Any:
        batches = list(context.train_batches(number))
        return {name: np.concatenate([batch[name] for batch in batches]) for name in ("age", "gender")}

    assert sorted(epoch(plain, 1)["age"]) == data["age"].tolist()
    drawn = epoch(even, 1)
    assert len(drawn["age"]) == 400
    assert drawn["gender"].mean() == pytest.approx(0.5, abs=0.08)
    assert np.array_equal(drawn["age"], epoch(even, 1)["age"])
    assert not np.array_equal(drawn["age"], epoch(even, 2)["age"])


def test_early_stopping_counts_epochs_without_a_better_objective() -> None:
    # At a learning rate of nearly nothing and fixed statistics, nothing can get better twice.
    config = job({"epochs": 30, "lr": 1e-12, "early_stopping_patience": 2}, {"bn_momentum": 1e-9})
    rows, reports, _ = run(config, faces(8))
    stopped = len(rows)
    assert stopped < 30
    assert reports[-1].finished == "early_stopping"
    assert not any(report.finished for report in reports[:-1])
    assert [report.is_best for report in reports[-2:]] == [False, False]
    best = min(row["val_objective"] for row in rows)
    assert [r.row["val_objective"] for r in reports if r.is_best][-1] == best


def test_without_validation_every_epoch_is_the_best() -> None:
    _, reports, _ = run(job({"epochs": 2, "early_stopping_patience": 1}), faces(8), faces(0))
    assert [report.is_best for report in reports] == [True, True]
    assert reports[1].row["val_objective"] is None
    assert reports[1].row["val_loss"] is None
    assert reports[1].finished == "epochs"


@pytest.mark.parametrize("task", ["age", "gender", "race"])
def test_single_task_model_learns_its_task(task: str) -> None:
    rows, reports, _ = run(job({"epochs": 1}, {"tasks": (task,)}), faces(8))
    others = {"age", "gender", "race"} - {task}
    assert all(reports[0].metrics[other]["n"] == 0 for other in others)
    assert rows[0]["val_objective"] > 0
    assert (rows[0]["val_age_mae_years"] is None) == (task != "age")


def test_a_task_without_labels_does_not_change_its_head() -> None:
    data = faces(16)
    data["race"] = np.full(16, -1)
    config = job({"epochs": 1, "optimizer": "sgd"})
    before = network(config).state_dict()
    rows, _, model = run(config, data)
    after = model.state_dict()
    assert math.isfinite(rows[0]["train_loss"])
    assert rows[0]["val_race_accuracy"] is None
    assert torch.equal(after["heads.race.layer.weight"], before["heads.race.layer.weight"])
    assert not torch.equal(after["heads.gender.layer.weight"], before["heads.gender.layer.weight"])


def test_batch_of_one_row_is_trained_on() -> None:
    # ResNet shrinks 32 pixels to one, and batch norm can't be trained on one value.
    rows, _, _ = run(job({"epochs": 1}, {"preset": "paper", "backbone": "resnet18"}), faces(9))
    assert rows[0]["step"] == 2
    assert math.isfinite(rows[0]["train_loss"])


def test_non_finite_loss_stops_and_names_epoch_step_and_tasks() -> None:
    config = job({"epochs": 3})
    model = network(config)
    with torch.no_grad():
        model.heads["age"].layer.bias.fill_(math.inf)
    before = model.heads["gender"].layer.weight.clone()
    with pytest.raises(NonFiniteLossError, match=r"epoch 1, step 1: loss inf: age inf, gender 0\.\d+, race 1\.\d+"):
        run(config, faces(16), model=model)
    assert torch.equal(model.heads["gender"].layer.weight, before)


def named(data: dict[str, Any]) -> dict[str, Any]:
    """Return faces that have ids: face-0, face-1 and so on."""
    return data | {"image_id": np.array([f"face-{k}" for k in range(len(data["age"]))], dtype=object)}


def test_non_finite_loss_names_the_rows_of_its_batch_and_no_others() -> None:
    data = named(faces(24))
    # Where a label is infinite it counts as missing, but a huge one overflows.
    data["age"][5] = 3e38
    config = job({"epochs": 1}, {"age_head": "linear"}, loss=LossConfig(age_weight=10.0))

    with pytest.raises(NonFiniteLossError, match=r"step \d: loss inf: .*; its batch holds image_id face-") as caught:
        run(config, data)

    order = np.random.default_rng([0, 1]).permutation(24)
    step = int(np.flatnonzero(order == 5)[0]) // 8
    assert f"step {step + 1}:" in str(caught.value)
    assert caught.value.image_ids == [f"face-{k}" for k in order[8 * step : 8 * step + 8]]


def test_non_finite_loss_of_a_large_batch_names_eight_rows_and_counts_the_rest() -> None:
    error = NonFiniteLossError("loss nan", [f"face-{k}" for k in range(11)])

    assert str(error) == f"loss nan; its batch holds image_id {', '.join(f'face-{k}' for k in range(8))} and 3 more"
    assert str(NonFiniteLossError("loss nan", [])) == "loss nan"


def test_non_finite_loss_on_validation_names_its_rows() -> None:
    val = named(faces(20, seed=1))
    val["age"][10] = 3.4e38
    config = job({"epochs": 1, "lr": 1e-12})
    model = network(config)
    with torch.no_grad():
        model.heads["age"].layer.bias.fill_(-3e37)

    with pytest.raises(NonFiniteLossError, match=r"on validation: loss inf: .* image_id face-8, ") as caught:
        run(config, faces(16), val, model)

    assert caught.value.image_ids == [f"face-{k}" for k in range(8, 16)]


def test_validation_is_reported_by_group() -> None:
    data = faces(30)
    _, reports, _ = run(job({"epochs": 1}), data)
    groups = reports[0].metrics["groups"]
    assert groups["race"]["asian"]["n"] == (data["race"] == 2).sum()
    weighted = sum(of["n"] * of["age"]["mae_years"] for of in groups["gender"].values()) / 30
    assert weighted == pytest.approx(reports[0].metrics["age"]["mae_years"])


@pytest.mark.parametrize(("sides", "expected"), [((), [88] * 5), ((48, 88), [48, 48, 88, 88, 88])])
def test_the_image_side_of_each_epoch(sides: tuple[int, ...], expected: list[int]) -> None:
    config = TrainConfig(epochs=5, image_sizes=sides)
    assert [epoch_side_px(epoch, config, 88) for epoch in range(1, 6)] == expected


def test_bfloat16_trains() -> None:
    config = job({"epochs": 1, "precision": "bfloat16"})
    rows, _, model = run(config, faces(8))
    assert math.isfinite(rows[0]["val_loss"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_progressive_resizing_divides_the_epochs() -> None:
    seen: list[tuple[int, bool]] = []
    config = job({"epochs": 4, "batch_size": 8, "image_sizes": (48, 40, SIDE)})
    model = network(config)
    model.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].shape[-1], module.training)))

    _, reports, _ = run(config, faces(8), model=model)

    assert [side for side, training in seen if training] == [48, 40, SIDE, SIDE]
    assert [side for side, training in seen if not training] == [48, 40, SIDE, SIDE]
    assert [report.transform.image_size for report in reports] == [48, 40, SIDE, SIDE]


@pytest.mark.parametrize(
    ("precision", "native", "expected"),
    [("float32", True, False), ("bfloat16", False, True), ("auto", True, True), ("auto", False, False)],
)
def test_auto_precision_follows_the_device(
    monkeypatch: pytest.MonkeyPatch, precision: str, native: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})

    with autocast(torch.device("cpu"), precision):
        product = torch.ones(2, 2) @ torch.ones(2, 2)

    assert (product.dtype == torch.bfloat16) == expected


class _Together:
    """The collectives of a test's ranks: sums over threads."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.tensors: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(world_size, timeout=60)

    def all_reduce_sum(self, rank: int, tensor: Tensor) -> Tensor:
        self.tensors[rank] = tensor
        self.barrier.wait()
        total = torch.stack([self.tensors[k] for k in range(self.world_size)]).sum(dim=0)
        self.barrier.wait()
        return total


class _Rank(LocalContext):
    """One of several ranks, each a thread; gradients are averaged as DDP does."""

    together: _Together

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return self.together.all_reduce_sum(self.rank, tensor.clone())

    def wrap(self, model: nn.Module) -> nn.Module:
        def average(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad.copy_(self.all_reduce_sum(parameter.grad) / self.world_size)

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(average)
        return model


def run_ranks(
    config: TrainJob,
    shares: list[Batch],
    vals: list[Batch],
    models: list[MultiTaskNet],
    resume: dict[str, Any] | None = None,
) -> tuple[list[list[Row]], list[BaseException]]:
    together = _Together(len(shares))
    rows: list[list[Row]] = [[] for _ in shares]
    errors: list[BaseException] = []
    data = faces(40)
    baseline = Baseline.fit(Labels.from_arrays(UTKFACE, data))

    def work(rank: int) -> None:
        context = _Rank(shares[rank], vals[rank], 4, rank=rank, world_size=len(shares))
        context.together = together
        num_rows = sum(len(share["age"]) for share in shares)
        try:
            rows[rank] = train(context, models[rank], TRANSFORM, config, baseline, num_rows, resume)
        except NonFiniteLossError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    return rows, errors


def part(data: dict[str, Any], rows: slice) -> Batch:
    return {name: values[rows] for name, values in data.items()}


@pytest.mark.parametrize("ema_decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_ranks_with_uneven_shares_end_together_with_equal_weights(ema_decay: float) -> None:
    data, config = faces(14), job({"epochs": 2, "ema_decay": ema_decay})
    models = [network(config), network(config)]
    # Rank 0 has three batches, rank 1 one; all validation rows are on rank 1.
    rows, _ = run_ranks(
        config,
        [part(data, slice(0, 10)), part(data, slice(10, 14))],
        [faces(0), faces(9, seed=1)],
        models,
    )
    assert rows[0][-1]["step"] == rows[1][-1]["step"] == 6
    assert rows[0][-1]["num_train_rows"] == 14
    assert rows[0][-1]["num_val_rows"] == 9
    assert rows[0][-1]["val_objective"] == rows[1][-1]["val_objective"]
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_two_ranks_take_the_same_step_as_one_process(weighting: Literal["fixed", "uncertainty"]) -> None:
    # Batch norm sees other batches on two ranks, so it is taken out of the comparison: SGD, heads only.
    data, config = faces(8), job({"epochs": 1, "optimizer": "sgd", "lr": 1e-2}, loss=LossConfig(weighting=weighting))
    data["age"][:3] = np.nan
    data["gender"][4:] = -1
    models = [network(config) for _ in range(3)]
    for model in models:
        still_norms(model)
    run_ranks(config, [part(data, slice(0, 4)), part(data, slice(4, 8))], [faces(2), faces(2)], models[:2])
    run(config, data, model=models[2])
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, models[2].state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)


class _OneProcess(LocalContext):
    """Gradients go through torch's own DDP, in a group of one process."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)


def test_ddp_works_with_a_backbone_that_is_unfrozen_later() -> None:
    config = job({"epochs": 3, "freeze_epochs": 1}, loss=LossConfig(weighting="uncertainty"))
    data = faces(16)
    baseline = Baseline.fit(Labels.from_arrays(UTKFACE, data))
    models = [network(config), network(config)]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        train(_OneProcess(data, data, 8), models[0], TRANSFORM, config, baseline, 16)
    finally:
        torch.distributed.destroy_process_group()
    train(LocalContext(data, data, 8), models[1], TRANSFORM, config, baseline, 16)
    torch.testing.assert_close(weights(models[0]), weights(models[1]))


def test_non_finite_loss_of_one_rank_stops_all() -> None:
    config = job({"epochs": 1})
    models = [network(config), network(config)]
    with torch.no_grad():
        models[1].heads["age"].layer.bias.fill_(math.nan)
    data = faces(8)
    _, errors = run_ranks(config, [part(data, slice(0, 4)), part(data, slice(4, 8))], [faces(2), faces(2)], models)
    assert len(errors) == 2
    assert {"another rank" in str(error) for error in errors} == {True, False}
    # Who tells of it is the rank whose batch it was.
    assert all(("another rank" in str(error)) == (error.image_ids is None) for error in errors)  # type: ignore[attr-defined]


def test_the_first_bad_batch_is_named_when_losses_are_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_CUDA", "cpu")  # as on a GPU: every so many steps
    config = job({"epochs": 1}, {"age_head": "linear"}, loss=LossConfig(age_loss="mse"))
    data = named(faces(24))
    bad = 12 + int(np.random.default_rng([0, 1, 0]).permutation(12)[0])  # in the second rank's first batch
    data["age"][bad] = 3e38  # its gradient overflows, too, so all later losses of both are non-finite
    errors = run_ranks(
        config,
        [part(data, slice(0, 12)), part(data, slice(12, 24))],
        [faces(2), faces(2)],
        [network(config), network(config)],
    )[1]

    blamed = [error.image_ids for error in errors if error.image_ids is not None]  # type: ignore[attr-defined]
    assert len(errors) == 2
    assert len(blamed) == 1
    assert f"face-{bad}" in blamed[0]


def test_a_resumed_epoch_without_a_step_left_keeps_its_statistics() -> None:
    config = job({"epochs": 1})
    data = faces(16)
    shares, vals = [part(data, slice(0, 8)), part(data, slice(8, 16))], [faces(2), faces(2)]
    reports: list[EpochReport] = []
    model = network(config)
    baseline = Baseline.fit(Labels.from_arrays(UTKFACE, data))
    train(LocalContext(data, data, 8, on_report=reports.append), model, TRANSFORM, config, baseline, 16)
    state = reports[0].train_state()
    steps = steps_per_epoch(16, config.train)
    begun = {"num_rows": 16, "num_steps": steps, "train_s": 1.0}
    resume = state | {"epoch": 0, "finished": "", "history": [], "partial_epoch": begun}
    models = [copy.deepcopy(model), copy.deepcopy(model)]

    rows, errors = run_ranks(config, shares, vals, models, resume)

    assert not errors
    assert [row["num_train_rows"] for row in rows[0]] == [16]
    for resumed in models:
        torch.testing.assert_close(dict(resumed.named_buffers()), dict(model.named_buffers()))


def test_step_schedule_is_the_papers() -> None:
    config = TrainConfig(lr=1e-4, epochs=50, schedule="step", step_size_epochs=20, gamma=0.5)
    rates = [learning_rate(epochs, config) for epochs in (0, 19.99, 20, 39.9, 40)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5, 2.5e-5])


def test_one_cycle_is_torchs() -> None:
    config = TrainConfig(lr=2e-3, epochs=10, schedule="one_cycle", warmup=0.3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    # torch's peak is at step pct_start * total_steps - 1, and its end at total_steps - 1.
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=1001, pct_start=0.3)
    rates = []
    for _ in range(1001):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step() if len(rates) < 1001 else None
    mine = [learning_rate(step / 100, config) for step in range(1001)]
    np.testing.assert_allclose(mine, rates, atol=2e-5)


def test_cosine_rises_then_falls_to_nothing() -> None:
    config = TrainConfig(lr=1.0, epochs=10, schedule="cosine", warmup=0.1)
    rates = [learning_rate(epochs, config) for epochs in (0, 0.5, 1, 5.5, 10, 11)]
    assert rates == pytest.approx([0.04, 0.52, 1.0, 0.5, 0.0, 0.0])


def test_plateau_cuts_after_the_configured_epochs_without_improvement() -> None:
    config = TrainConfig(lr=1.0, schedule="plateau", plateau_epochs=2, gamma=0.1)
    #            best       1    cut  best  1    cut  1    cut
    objectives = [0.9, 0.8, 0.8, 0.9, 0.7, 0.8, 0.7, 0.9, 0.7]
    cuts = [plateau_cuts(objectives[:done], config) for done in range(len(objectives) + 1)]
    assert cuts == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert [learning_rate(9, config, num) for num in (0, 1, 2)] == pytest.approx([1.0, 0.1, 0.01])


def test_plateau_ignores_epochs_without_validation() -> None:
    config = TrainConfig(schedule="plateau", plateau_epochs=2)
    assert plateau_cuts([0.5, 0.6, None, None], config) == 0
    assert plateau_cuts([0.5, 0.6, None, None, 0.6], config) == 1


def test_plateau_equals_torchs() -> None:
    config = TrainConfig(lr=1.0, epochs=60, schedule="plateau", plateau_epochs=3, gamma=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=0.0)
    objectives = np.random.default_rng(0).random(60).tolist()
    for done in range(1, 61):
        reference.step(objectives[done - 1])
        mine = learning_rate(done, config, plateau_cuts(objectives[:done], config))
        assert mine == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-8)


@pytest.mark.parametrize(
    ("backbone", "firsts"),
    [
        ("resnet18", ["conv1.", "layer1.0.", "layer2.0.", "layer3.0.", "layer4.0."]),
        ("resnet34", ["conv1.", "layer1.0.", "layer2.0.", "layer3.0.", "layer4.0."]),
        ("resnet50", ["conv1.", "layer1.0.", "layer2.0.", "layer3.0.", "layer4.0."]),
        ("mobilenet_v3_small", ["features.0.", "features.1.", "features.2.", "features.4.", "features.9."]),
        ("mobilenet_v3_large", ["features.0.", "features.2.", "features.4.", "features.7.", "features.13."]),
    ],
)
def test_a_stage_begins_where_the_resolution_drops(backbone: str, firsts: list[str]) -> None:
    with torch.device("meta"):
        model = MultiTaskNet(ModelConfig(backbone=backbone), UTKFACE)  # type: ignore[arg-type]  # one of them
    names = {id(parameter): name for name, parameter in model.backbone.named_parameters()}
    stages = [[names[id(parameter)] for parameter in stage] for stage in model.backbone.stages()]
    assert [name for stage in stages for name in stage] == list(names.values())
    assert [stage[0][: len(first)] for stage, first in zip(stages, firsts, strict=True)] == firsts


@pytest.mark.parametrize(
    ("model", "undecayed"),
    [
        ({"preset": "vit"}, ["backbone.class_token", "backbone.encoder.pos_embedding"]),
        ({"backbone": "swin_t"}, [f"backbone.features.{k}.{n}.attn.relative_position_bias_table" for k, n in SWIN]),
        ({"backbone": "convnext_tiny"}, [f"backbone.features.{k}.{n}.layer_scale" for k, n in CONVNEXT]),
        ({"backbone": "resnet18"}, []),
    ],
)
def test_adamw_decays_matrices_and_kernels_only(model: dict[str, Any], undecayed: list[str]) -> None:
    net = MultiTaskNet(ModelConfig(**{"image_size": 32, **model}), UTKFACE)
    built = build_optimizer(net, TrainConfig(optimizer="adamw", weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}

    assert [name for name, p in net.named_parameters() if p.ndim > 1 and not decay[id(p)]] == undecayed
    assert [name for name, p in net.named_parameters() if p.ndim <= 1 and decay[id(p)]] == []


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_layer_decay_lowers_the_rate_of_each_stage_by_its_distance_from_the_heads(optimizer: str) -> None:
    model = network(job({}))
    config = TrainConfig(optimizer=optimizer, layer_decay=0.5, weight_decay=0.1)  # type: ignore[arg-type]  # one of them
    built = build_optimizer(model, config)
    set_learning_rate(built, 1.0)
    rates = {id(p): group["lr"] for group in built.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert len(rates) == len(named)
    assert {rate for name, rate in named.items() if not name.startswith("backbone.")} == {1.0}
    assert named["backbone.features.12.0.weight"] == named["backbone.classifier.0.bias"] == 0.5
    assert named["backbone.features.4.block.0.0.weight"] == 0.25
    assert named["backbone.features.0.0.weight"] == named["backbone.features.0.1.bias"] == 0.5**5
    decays = {group["weight_decay"] for group in built.param_groups}
    assert decays == ({0.1, 0.0} if optimizer == "adamw" else {0.1})


def test_a_frozen_backbone_does_not_change_until_it_is_unfrozen() -> None:
    config = job({"epochs": 3, "freeze_epochs": 2, "weight_decay": 0.1, "batch_size": 8})
    model = network(config)
    kept = [{name: value.clone() for name, value in model.state_dict().items()}]

    def keep(report: EpochReport) -> None:
        kept.append({name: value.clone() for name, value in report.model.state_dict().items()})

    run(config, faces(17), model=model, on_report=keep)  # the last batch has one row
    backbone = [name for name in kept[0] if name.startswith("backbone.") and not name.endswith("num_batches_tracked")]
    assert all(torch.equal(kept[epoch][name], kept[0][name]) for name in backbone for epoch in (1, 2))
    assert not any(torch.equal(kept[3][name], kept[0][name]) for name in backbone)
    assert not torch.equal(kept[1]["heads.age.layer.weight"], kept[0]["heads.age.layer.weight"])


def test_adamw_decays_weights_only() -> None:
    model = network(job({}))
    optimizer = build_optimizer(model, TrainConfig(optimizer="adamw", weight_decay=0.05))
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.05
    assert free["weight_decay"] == 0.0
    assert {p.ndim for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_average_of_weights_warms_up() -> None:
    model = network(job({}))
    ema = Ema(model, decay=0.999)
    with torch.no_grad():
        model.heads["gender"].layer.weight.fill_(1.0)
        ema.model.heads["gender"].layer.weight.zero_()
    ema.update(model)
    assert ema.model.heads["gender"].layer.weight.unique().tolist() == pytest.approx([1 - 2 / 11])
